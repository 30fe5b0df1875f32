"""Incidents: what went wrong, and what became of it. One fault, one line of incidents.jsonl.

A line is written when its fault is over: with the next step that all ranks completed, or at the end
of the run. Until then it is open.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from trainrt.run_dir import RunDir, append_line, now


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

    def to_json(self) -> dict[str, Any]:
        document = asdict(self)
        del document["detected_at"]
        return {**document, "time": now()}


class Ledger:
    """The incidents of this run: the open ones here, the closed ones in the file."""

    def __init__(self, run_dir: RunDir, *, tell: Callable[[dict[str, Any]], None]) -> None:
        self._run_dir, self._tell = run_dir, tell
        self._open: list[Incident] = []

    def open(self, incident: Incident) -> None:
        self._open.append(incident)

    def stop(self, incident: Incident) -> None:
        """A fault that ends the run. One that came again, before a step was completed, is the same fault."""
        again = [held for held in self._open if held.kind == incident.kind and held.step == incident.step]
        if again:
            again[-1].action = "stop"
        else:
            incident.action = "stop"
            self._open.append(incident)

    @property
    def pending(self) -> list[Incident]:
        return list(self._open)

    def close_all(self, *, recovered: bool) -> None:
        """Write the open incidents: recovered just now, or never."""
        at = time.monotonic()
        for incident in self._open:
            if recovered:
                incident.recovered_seconds = at - incident.detected_at
            self.write(incident.to_json())
        self._open.clear()

    def write(self, document: dict[str, Any]) -> None:
        """Write a closed incident (a worker may report one of its own, such as a skipped update)."""
        append_line(self._run_dir.incidents, document)
        self._tell(document)
