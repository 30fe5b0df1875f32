"""The event ring: nested, timed events of one rank, written into by every room, read by diagnostics.

An event costs two reads of a clock and one slot of a preallocated ring; nothing is formatted, added up or written inside a
step. `trainrt.diagnostics` makes the step's summary of the ring, and of few steps a line of `events/rank-NNNNN.jsonl`.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple

KINDS = (
    "step", "data", "forward", "backward", "collective", "optimizer", "snapshot", "checkpoint", "evaluation", "compile",
    "garbage_collection", "other",
)  # fmt: skip
NO_ROUND = -1
"""The microbatch of what belongs to none."""
DEVICE_KINDS = frozenset(("forward", "backward", "collective", "optimizer", "evaluation"))
"""What is asked of a device and goes on after the call returns."""


class Event(NamedTuple):
    """One timed event, from `start` to `end` of `time.monotonic()`, which all processes of a host share.

    waiting: the time went by blocked on others (a collective from this rank's arrival on). sequence: of a collective, its
    number in its group, else -1. microbatch: the round of the step.
    """

    name: str
    kind: str
    depth: int
    start: float
    end: float
    bytes: int
    group: str
    waiting: bool
    sequence: int
    microbatch: int

    @property
    def seconds(self) -> float:
        return self.end - self.start


class EventRing:
    """A ring of the last `capacity` events of this rank. Written by one thread at a time."""

    def __init__(self, capacity: int = 65536) -> None:
        self._slots: list[Any] = [None] * capacity
        self._written = self._read = self.dropped = 0
        self._open: list[tuple[Any, ...]] = []
        self._sequences: dict[str, int] = {}
        self._mark: Callable[[str], Any] | None = None
        self._time: Callable[[Any], float] = float
        self.enabled = True
        self.microbatch = NO_ROUND
        self.rows = 0

    def follow(self, mark: Callable[[str], Any], time_of: Callable[[Any], float]) -> None:
        """Time by another clock: `mark(kind)` is a moment, of which `time_of` makes one of `time.monotonic` when it is read."""
        self._mark, self._time = mark, time_of

    def begin(
        self, name: str, kind: str, bytes: int = 0, group: str = "", waiting: bool = False, sequence: int = -1
    ) -> None:
        """An event begins; those that begin before its end are its children."""
        if self.enabled:
            at = time.monotonic() if self._mark is None else self._mark(kind)
            self._open.append((at, name, kind, bytes, group, waiting, sequence, self.microbatch))

    def end(self) -> None:
        """The innermost open event ends."""
        if not self._open:
            return
        start, name, kind, bytes, group, waiting, sequence, microbatch = self._open.pop()
        end = time.monotonic() if self._mark is None else self._mark(kind)
        # A collection of garbage may record itself between any two lines that allocate: from here on none does.
        event = (name, kind, len(self._open), start, end, bytes, group, waiting, sequence, microbatch)
        index = self._written
        self._written = index + 1
        self._slots[index % len(self._slots)] = event

    def span(self, name: str, *, kind: str, bytes: int = 0, group: str = "", waiting: bool = False) -> Span:
        """An event from entry to exit, also of what an exception leaves open inside."""
        return Span(self, (name, kind, bytes, group, waiting))

    def collective(self, name: str, *, group: str, bytes: int, sequence: int | None = None) -> Span:
        """The wait for a collective, from this rank's arrival to the end. `sequence`: of one that was started before."""
        number = self.next_of(group) if sequence is None else sequence
        return Span(self, (name, "collective", bytes, group, True, number))

    def next_of(self, group: str) -> int:
        """The number of the next collective of a group, from 0; the same on all of its members."""
        number = self._sequences.get(group, 0)
        self._sequences[group] = number + 1
        return number

    @property
    def depth(self) -> int:
        return len(self._open)

    @property
    def innermost(self) -> str:
        """The kind of the innermost open event, or nothing."""
        return self._open[-1][2] if self._open else ""

    def computed(self, rows: int) -> None:
        """Experts computed so many rows in a forward pass; what checkpointing computes again, and evaluation, is not counted."""
        if self.innermost == "forward":
            self.rows += rows

    def unwind(self, depth: int) -> None:
        """End what is open beyond a depth."""
        while len(self._open) > depth:
            self.end()

    def drain(self) -> list[Event]:
        """The events since the last drain, in order of their ends; counts those overwritten."""
        capacity = len(self._slots)
        first = max(self._read, self._written - capacity)
        self.dropped += first - self._read
        found = [self._slots[index % capacity] for index in range(first, self._written)]
        self._read = self._written
        if self._mark is not None:
            found = [(*slot[:3], self._time(slot[3]), self._time(slot[4]), *slot[5:]) for slot in found]
        return [*map(Event._make, found)]

    def clear(self) -> None:
        """Forget everything, for another incarnation: groups count anew."""
        self._open.clear()
        self._sequences.clear()
        self._read = self._written
        self.dropped, self.microbatch, self.rows = 0, NO_ROUND, 0


class Span:
    """An event as a context."""

    __slots__ = ("_depth", "_ring", "_what")

    def __init__(self, ring: EventRing, what: tuple[Any, ...]) -> None:
        self._ring, self._what, self._depth = ring, what, 0

    def __enter__(self) -> None:
        self._depth = len(self._ring._open)
        self._ring.begin(*self._what)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if len(self._ring._open) == self._depth + 1:
            self._ring.end()
        else:
            self._ring.unwind(self._depth)


ring = EventRing()
"""The ring of this process: a worker is one rank, so there is one."""

_GARBAGE = tuple(f"garbage_collection.{generation}" for generation in range(3))


def record_garbage() -> None:
    """Have collections of garbage inside a step recorded, with their generation in the name."""
    if _collecting not in gc.callbacks:
        gc.callbacks.append(_collecting)


def _collecting(phase: str, facts: dict[str, int]) -> None:
    """Of this rank's thread, or autograd's; while another one collects, it goes on with what needs no interpreter."""
    if not ring.depth or not _computes(threading.current_thread()):
        return
    if phase == "start":
        ring.begin(_GARBAGE[facts["generation"]], "garbage_collection")
    else:
        ring.end()


def _computes(thread: threading.Thread) -> bool:
    return thread is threading.main_thread() or isinstance(thread, threading._DummyThread)
