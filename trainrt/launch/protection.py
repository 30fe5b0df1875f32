"""How well the state in memory is protected right now, for status.json, and the loss of a store."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from trainrt.checkpoint.store.inventory import Holding
from trainrt.config import JobConfig
from trainrt.launch.incidents import STORE_LOSS, Incident, Ledger

if TYPE_CHECKING:
    from trainrt.launch.incarnation import Incarnation

ASK_SECONDS = 0.5


class Protection:
    """full: the parity that was asked for is in force. degraded: less than that. none: nothing is in memory.

    Too few nodes for the parity asked for is degraded too, all along: the message of it is the loss that it means.
    """

    def __init__(self, config: JobConfig, ledger: Ledger) -> None:
        self._snapshots = config.snapshot.every != 0
        self._ledger = ledger
        self._committed = False
        self._parity = False
        self._full = False
        self._asked_at = 0.0
        self._answer: Future[Holding | None] | None = None
        # A store that does not answer must not hold up the driver.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="protection")

    def ordered(self, running: Incarnation) -> None:
        """A new incarnation: what it was restored from in memory still protects it, against the loss of workers."""
        self._committed = running.origin.kind in ("memory", "parity")
        self._parity = self._full = False
        self._answer = None

    def store_lost(self, node: str, *, at: float, step: int) -> None:
        self._ledger.open(Incident(STORE_LOSS, f"the store of node {node} died", at, nodes=[node], step=step))
        self._committed = self._parity = self._full = False
        self._answer = None

    def level(self, running: Incarnation) -> str:
        """Asks the stores now and then while something is open. Does not wait for them."""
        if not self._snapshots:
            return "none"
        waiting = not self._parity or running.stores_retired or self._ledger.store_lost
        if self._answer is not None and self._answer.done():
            self._take(running, self._answer.result())
            self._answer = None
        elif waiting and self._answer is None and time.monotonic() - self._asked_at > ASK_SECONDS:
            self._asked_at = time.monotonic()
            self._answer = self._thread.submit(running.committed)
        if self._ledger.store_lost:
            return "degraded"
        if not self._committed:
            return "none"
        return "full" if self._full else "degraded"

    def _take(self, running: Incarnation, found: Holding | None) -> None:
        """A generation of this incarnation's ranks in the stores that serve them, and what parity it has."""
        if found is None:
            return
        self._committed, self._parity = True, found.protected
        self._full = found.protected and all(group.m >= running.parity_shards for group in found.groups)
        running.forget_retired()
        self._ledger.protected()
