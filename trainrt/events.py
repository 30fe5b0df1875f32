"""The event ring: nested, timed events of one rank, written into by every room, read by diagnostics.

A `span` costs two clock reads and one slot of a preallocated ring; nothing is formatted or written
inside a step. `EventWriter.step` turns the ring into one line of `events/rank-NNNNN.jsonl` per step.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

KINDS = (
    "step", "data", "forward", "backward", "collective", "optimizer",
    "snapshot", "checkpoint", "evaluation", "other",
)  # fmt: skip


@dataclass(slots=True)
class Event:
    """One timed event. `start` is of `time.perf_counter()`; `seconds` its duration.

    `waiting` says that the time went by blocked on other ranks (a collective's wait); it is what
    self time leaves out.
    """

    name: str
    kind: str
    depth: int
    start: float
    seconds: float
    bytes: int
    group: str
    waiting: bool


class EventRing:
    """A ring of the last `capacity` events of this rank. Written by one thread."""

    def __init__(self, capacity: int = 65536) -> None:
        self._slots: list[Event | None] = [None] * capacity
        self._written = 0
        self._read = 0
        self._depth = 0
        self.dropped = 0

    @contextmanager
    def span(self, name: str, *, kind: str, bytes: int = 0, group: str = "", waiting: bool = False) -> Iterator[None]:
        """Record the time from entry to exit; spans inside it are its children."""
        depth = self._depth
        self._depth = depth + 1
        start = time.perf_counter()
        try:
            yield
        finally:
            self._depth = depth
            event = Event(name, kind, depth, start, time.perf_counter() - start, bytes, group, waiting)
            self._slots[self._written % len(self._slots)] = event
            self._written += 1

    def drain(self) -> list[Event]:
        """The events since the last drain, in order of their ends; counts those overwritten."""
        capacity = len(self._slots)
        first = max(self._read, self._written - capacity)
        self.dropped += first - self._read
        events = [self._slots[i % capacity] for i in range(first, self._written)]
        self._read = self._written
        return [event for event in events if event is not None]


ring = EventRing()
"""The ring of this process: a worker is one rank, so there is one."""


class EventWriter:
    """Appends one line a step to the events file of a rank (docs/reference/events.schema.json)."""

    def __init__(self, path: Path, *, rank: int, node: str, incarnation: int, source: EventRing = ring) -> None:
        self._file = path.open("a", buffering=1)
        self._head = {"rank": rank, "node": node, "incarnation": incarnation}
        self._ring = source
        self._epoch = time.time() - time.perf_counter()

    def step(self, step: int) -> dict[str, float] | None:
        """Write what the ring holds as the line of `step`; return its three durations for the driver."""
        events = self._ring.drain()
        whole = [event for event in events if event.kind == "step"]
        if not whole:
            return None
        start, seconds = whole[-1].start, whole[-1].seconds
        waiting = min(seconds, sum(event.seconds for event in events if event.waiting))
        line = {
            "step": step,
            **self._head,
            "time": self._epoch + start,
            "seconds": seconds,
            "waiting_seconds": waiting,
            "self_seconds": seconds - waiting,
            "dropped": self._ring.dropped,
            "events": [
                {
                    "name": event.name, "kind": event.kind, "depth": event.depth,
                    "start": round(event.start - start, 7), "seconds": round(event.seconds, 7),
                    "bytes": event.bytes, "group": event.group, "waiting": event.waiting,
                }
                for event in events
            ],
        }  # fmt: skip
        self._file.write(json.dumps(line) + "\n")
        return {"seconds": seconds, "self_seconds": seconds - waiting, "waiting_seconds": waiting}

    def close(self) -> None:
        self._file.close()
