"""Ranks move while nothing is wrong with them: onto nodes that came (back), and away from a host that is to leave.

Both go the same way: all ranks stop after their step, which leaves their state in memory and on disk, and are seated anew.
One such move at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from trainrt.diagnostics.verdict import Diagnosis
from trainrt.errors import PlanError
from trainrt.launch.eviction import Eviction, Evictions
from trainrt.launch.ground import Ground
from trainrt.launch.incarnation import Incarnation
from trainrt.launch.incidents import Incident, Ledger
from trainrt.run_dir import write_json

NODES_SECONDS = 2.0


class Moves:
    """`look` finds that a move is due, and stops the ranks for it; `move` seats them; `over` when they are ordered again."""

    def __init__(self, ground: Ground, evictions: Evictions, ledger: Ledger, *, tell: Callable[[str], None]) -> None:
        self._ground, self._evictions, self._ledger, self._tell = ground, evictions, ledger, tell
        self._growing = False
        self._leaving: Eviction | None = None
        self._looked_for_nodes = 0.0

    def look(self, running: Incarnation, diagnosis: Diagnosis | None) -> None:
        """To be called while steps are completed and nobody has asked to stop. diagnosis: the newest."""
        self._look_for_nodes(running)
        self._look_for_evictions(diagnosis)

    def _look_for_nodes(self, running: Incarnation) -> None:
        """Where nodes were lost, has one come (back)?"""
        at = time.monotonic()
        if self._growing or not running.incomplete:
            return
        if at - self._looked_for_nodes > NODES_SECONDS:
            self._looked_for_nodes = at
            if self._ground.waiting():
                self._growing = True
                self._tell("a node has come: all ranks stop after this step, and go on with it")
                self._ground.fleet.call_all("stop")

    def _look_for_evictions(self, diagnosis: Diagnosis | None) -> None:
        """Is a host to leave?"""
        if self._growing or self._leaving is not None:
            return
        self._leaving = self._evictions.wanted(diagnosis, hosts=self._ground.fleet.nodes, now=time.monotonic())
        if self._leaving is not None:
            self._tell(f"evict host={self._leaving.host}: all ranks stop after this step, and go on without it")
            self._ground.fleet.call_all("stop")

    def move(self, running: Incarnation, *, check: Callable[[], None]) -> None:
        """All ranks stopped: seat them for what is due."""
        if self._leaving is None:
            self._grow(running, check=check)
        else:
            self._evict(running, self._leaving, check=check)

    def _grow(self, running: Incarnation, *, check: Callable[[], None]) -> None:
        """Go on with the nodes that are there now."""
        at = time.monotonic()
        nodes = running.grow(check=check)
        message = f"went on with {', '.join(nodes) or 'the same nodes'}"
        self._ledger.open(Incident("node_loss", message, at, nodes=nodes, step=running.completed, action="grow"))
        write_json(self._ground.run_dir.plan, running.plan.to_json())

    def _evict(self, running: Incarnation, leaving: Eviction, *, check: Callable[[], None]) -> None:
        """Go on without a host."""
        at = time.monotonic()
        incident = Incident(
            "node_loss", f"{leaving.host} was evicted: {leaving.why}", at, ranks=list(leaving.ranks), nodes=[leaving.host],
            step=running.completed,
        )  # fmt: skip
        try:
            incident.action = running.evict(leaving.host, check=check)
            write_json(self._ground.run_dir.plan, running.plan.to_json())
        except PlanError as error:
            incident.action = "skip"
            incident.message = f"{leaving.host} was not evicted, the mesh cannot shrink: {error}"
        self._evictions.done(at)
        self._ledger.open(incident)

    def over(self) -> None:
        """The next incarnation was ordered, for whatever reason."""
        self._growing, self._leaving = False, None
