"""How well the state in memory is protected right now, for status.json, and the loss of a store."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from trainrt.config import JobConfig
from trainrt.launch.incidents import STORE_LOSS, Incident, Ledger

if TYPE_CHECKING:
    from trainrt.launch.incarnation import Incarnation

ASK_SECONDS = 0.5


class Protection:
    """full: what was asked for is in force. degraded: less than that. none: nothing is in memory.

    Parity over nodes is not built yet, so a job that asks for it is protected against the loss of
    workers only: degraded.
    """

    def __init__(self, config: JobConfig, ledger: Ledger) -> None:
        self._snapshots = config.snapshot.every != 0
        self._parity_asked = config.snapshot.parity_shards != 0
        self._ledger = ledger
        self._committed = False
        self._asked_at = 0.0

    def ordered(self, running: Incarnation) -> None:
        """A new incarnation: what it was restored from in memory still protects it."""
        self._committed = running.origin.kind == "memory"

    def store_lost(self, node: str, *, at: float, step: int) -> None:
        self._ledger.open(Incident(STORE_LOSS, f"the store of node {node} died", at, nodes=[node], step=step))
        self._committed = False

    def level(self, running: Incarnation) -> str:
        """Asks the stores now and then while something is open."""
        if not self._snapshots:
            return "none"
        waiting = not self._committed or running.stores_retired or self._ledger.store_lost
        if waiting and time.monotonic() - self._asked_at > ASK_SECONDS:
            self._asked_at = time.monotonic()
            self._ask(running)
        if self._ledger.store_lost:
            return "degraded"
        if not self._committed:
            return "none"
        return "degraded" if self._parity_asked else "full"

    def _ask(self, running: Incarnation) -> None:
        """Is there a generation of this incarnation's ranks in the stores that serve them?"""
        if not running.committed():
            return
        self._committed = True
        running.forget_retired()
        self._ledger.protected()
