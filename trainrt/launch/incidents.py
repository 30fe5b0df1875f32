"""Incidents: what went wrong, and what became of it. One fault, one line of incidents.jsonl.

A line is written when its fault is over: with the next step that all ranks completed (a store's loss:
with the next commit), or at the end of the run. Until then it is open.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trainrt.run_dir import RunDir, append_line, now, read_json, write_json

STORE_LOSS = "store_loss"


@dataclass(slots=True)
class Incident:
    """One fault. `detected_at` is of `time.monotonic()`; `detected_seconds`: how old it was then, as far as known."""

    kind: str
    message: str
    detected_at: float
    ranks: list[int] = field(default_factory=list)
    nodes: list[str] = field(default_factory=list)
    step: int = 0
    detected_seconds: float = 0.0
    recovered_seconds: float | None = None
    steps_lost: int = 0
    restored_from: str = "none"
    action: str = "restart"
    phases: dict[str, float] | None = None

    def to_json(self) -> dict[str, Any]:
        document = asdict(self)
        del document["detected_at"]
        return {**document, "time": now()}


@dataclass(slots=True)
class Restore:
    """How the newest incarnation got its state: `find_seconds` to find it (and decode what was lost), `read_seconds` of the
    slowest rank to read it. `done_at`, of `time.monotonic()`: when the last rank had it.
    """

    find_seconds: float
    read_seconds: float = 0.0
    done_at: float | None = None

    def phases(self, detected_at: float, stepped_at: float) -> dict[str, float] | None:
        """The parts of `recovered_seconds`: all before and between is the restart's. None where nothing was restored since."""
        if self.done_at is None or self.done_at < detected_at:
            return None
        restoring = self.find_seconds + self.read_seconds
        return {
            "restart_seconds": self.done_at - detected_at - restoring,
            "restore_seconds": restoring,
            "first_step_seconds": stepped_at - self.done_at,
        }


class Ledger:
    """The incidents of this run: closed ones in incidents.jsonl, open ones in `kept`, so that none goes with a driver.

    Where a driver was killed, the next one holds what it left open.
    """

    def __init__(self, run_dir: RunDir, kept: Path, *, tell: Callable[[dict[str, Any]], None]) -> None:
        self._run_dir, self._kept, self._tell = run_dir, kept, tell
        age = time.time() - time.monotonic()
        self._restore: Restore | None = None
        left = read_json(kept) or {"open": []}
        self._open = [Incident(**{**entry, "detected_at": entry["detected_at"] - age}) for entry in left["open"]]

    def open(self, incident: Incident) -> None:
        """A fault. The loss of a node takes in that of its store, which may have been heard of first."""
        if incident.kind == "node_loss":
            lost = [held for held in self._open if held.kind == STORE_LOSS and set(held.nodes) <= set(incident.nodes)]
            self._open = [held for held in self._open if held not in lost]
        self._open.append(incident)
        self._keep()

    def stop(self, incident: Incident) -> None:
        """A fault that ends the run. One that came again, before a step was completed, is the same fault."""
        again = [held for held in self._open if held.kind == incident.kind and held.step == incident.step]
        if again:
            again[-1].action = "stop"
        else:
            incident.action = "stop"
            self.open(incident)

    def cannot_restore(self) -> None:
        """Nothing is left to go on from: the faults that are open end the run."""
        for incident in self._open:
            if incident.kind != STORE_LOSS:
                incident.action = "stop"
        self._keep()

    def last(self) -> Incident:
        """The fault that is being dealt with."""
        return [held for held in self._open if held.kind != STORE_LOSS][-1]

    def restored(self, origin: str, *, steps_lost: int, find_seconds: float) -> None:
        """An incarnation was ordered: the first open fault that had none yet bears the steps to redo.

        `find_seconds`: how long it took to find the state, and to decode what was lost of it.
        """
        self._restore = Restore(find_seconds)
        for incident in self._open:
            if incident.kind != STORE_LOSS and incident.restored_from == "none":
                incident.restored_from, incident.steps_lost = origin, steps_lost
                steps_lost = 0
        self._keep()

    def has_read(self, seconds: float) -> None:
        """A rank of the newest incarnation has read its state."""
        if self._restore is not None:
            self._restore.read_seconds = max(self._restore.read_seconds, seconds)
            self._restore.done_at = time.monotonic()

    def stepped(self) -> None:
        """All ranks completed a step: every fault but a store's is over."""
        self._close([held for held in self._open if held.kind != STORE_LOSS], recovered=True)

    def protected(self) -> None:
        """A generation was committed in all stores: the loss of one is over."""
        self._close([held for held in self._open if held.kind == STORE_LOSS], recovered=True)

    def end(self) -> None:
        """The run is over; what is still open stays as it is."""
        self._close(list(self._open), recovered=False)

    @property
    def store_lost(self) -> bool:
        """Whether a store was lost and nothing has been committed since."""
        return any(held.kind == STORE_LOSS for held in self._open)

    def write(self, document: dict[str, Any]) -> None:
        """Write a closed incident (a worker may report one of its own, such as a skipped update)."""
        append_line(self._run_dir.incidents, document)
        self._tell(document)

    def _close(self, incidents: list[Incident], *, recovered: bool) -> None:
        at = time.monotonic()
        for incident in incidents:
            if recovered:
                incident.recovered_seconds = at - incident.detected_at
                if self._restore is not None and incident.kind != STORE_LOSS:
                    incident.phases = self._restore.phases(incident.detected_at, at)
            self._open.remove(incident)
            self.write(incident.to_json())
        if incidents:
            self._keep()

    def _keep(self) -> None:
        age = time.time() - time.monotonic()
        entries = [{**asdict(held), "detected_at": held.detected_at + age} for held in self._open]
        write_json(self._kept, {"open": entries})
