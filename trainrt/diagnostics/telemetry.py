"""The summaries of a run as they grow: who sat where, and what each rank said of each step.

`events/summaries.bin` is read once, then only what was appended. Of a long run the last steps are held, within a budget of bytes.

Legend: S steps, R ranks.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from trainrt.diagnostics.table import AXES, PARTS, SUMMARY, WORK, Links, Numbers, Roles, StepTable
from trainrt.diagnostics.tail import Tail
from trainrt.run_dir import RunDir, read_lines

KEPT_STEPS = 2000
KEPT_BYTES = 256 << 20
"""At 16,384 ranks about 140 steps."""
KEPT_LINKS = 65536
LEAST_BYTES = 1 << 20
"""Of a transfer between hosts: what a smaller one takes says nothing of the link."""
BLOCK_RECORDS = 65536
COLUMNS = ("seconds", *PARTS, *AXES, *WORK, "bytes", "memory")
"""The float32 fields of a summary, in their order."""
NOBODY = Roles({}, (), np.zeros(0, dtype=np.int64), {})


@dataclass(frozen=True, slots=True)
class Seats:
    """Who sat where in one incarnation, from its first step on. time: seconds since the epoch."""

    incarnation: int
    roles: Roles
    first_step: int
    time: float


def read_seats(run_dir: RunDir) -> list[Seats]:
    """The seats of every incarnation, oldest first; of one that stands twice, both."""
    return [seats_of(line) for line in read_lines(run_dir.seats)]


def seats_of(line: dict[str, Any]) -> Seats:
    """A line of events/seats.jsonl. Axes of length 1 tell nobody apart and are left out."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(line["hosts"]))}
    host = np.array([numbers[name] for name in line["hosts"]], dtype=np.int64)
    places = {axis: np.array(where, dtype=np.int64) for axis, where in line["coordinates"].items()}
    spread = {axis: where for axis, where in places.items() if len(where) and where.max() > 0}
    roles = Roles(dict(line["mesh"]), tuple(numbers), host, spread)
    return Seats(line["incarnation"], roles, line.get("first_step", 1), line.get("time", 0.0))


class Summaries:
    """The summaries of the newest incarnation. `revision` grows with every change."""

    def __init__(self, run_dir: RunDir, *, kept_bytes: int = KEPT_BYTES) -> None:
        self.run_dir = run_dir
        self.seats: Seats | None = None
        self.revision = 0
        self._kept_bytes = kept_bytes
        self._seats_tail = Tail(run_dir.seats)
        self._links_tail = Tail(run_dir.links)
        self._links: deque[dict[str, Any]] = deque(maxlen=KEPT_LINKS)
        self._steps: list[int] = []
        # By step: (columns, R), so that a column of all ranks lies in one piece, and the starts (R,). NaN: not heard yet.
        self._values: dict[int, NDArray[np.float32]] = {}
        self._starts: dict[int, Numbers] = {}
        self._offset: int | None = None
        self._inode: int | None = None
        self._unplaced = False

    @property
    def incarnation(self) -> int:
        """The newest whose seats are known; 0 before the first."""
        return self.seats.incarnation if self.seats else 0

    @property
    def roles(self) -> Roles:
        return self.seats.roles if self.seats else NOBODY

    @property
    def steps(self) -> list[int]:
        """The steps that are held, ascending."""
        return self._steps

    def refresh(self) -> bool:
        """Take in what was appended. True if anything was."""
        before = self.revision
        lines, replaced = self._seats_tail.read()
        newest = max(lines, key=lambda line: line["incarnation"], default=None)
        if newest is not None and (replaced or newest["incarnation"] > self.incarnation):
            self._sit(seats_of(newest))
        self._links.extend(self._links_tail.read()[0])
        try:
            with self.run_dir.summaries.open("rb") as file:
                self._follow(file)
        except FileNotFoundError:
            pass
        return self.revision != before

    def complete(self, step: int) -> bool:
        """Whether every rank was heard of this step."""
        return step in self._values and not np.isnan(self._values[step][0]).any()

    def column(self, name: str, last: int) -> Numbers:
        """One number of a summary by step and rank, (S, R), of the last steps: seconds, bytes or tokens by its name."""
        row = COLUMNS.index(name)
        kept = [self._values[step][row] for step in self._steps[-last:]]
        return np.array(kept, dtype=np.float64).reshape(len(kept), self.roles.ranks)

    def column_of(self, name: str, step: int) -> NDArray[np.float32]:
        """The same of one step that is held, (R,)."""
        return self._values[step][COLUMNS.index(name)]

    def table(self, last: int) -> StepTable:
        """The last steps (at most those held), for detectors. Without seats it is empty."""
        return self.table_of(self._steps[-last:] if last > 0 else [])

    def table_of(self, steps: Sequence[int]) -> StepTable:
        """Of steps that are held."""
        shape = (len(COLUMNS), len(steps), self.roles.ranks)
        values = np.empty(shape, dtype=np.float64)
        for index, step in enumerate(steps):
            values[:, index] = self._values[step]
        column = dict(zip(COLUMNS, values, strict=True))
        start = np.array([self._starts[step] for step in steps], dtype=np.float64).reshape(shape[1:])
        return StepTable(
            np.array(steps, dtype=np.int64), self.roles, start, column["seconds"], {name: column[name] for name in PARTS},
            {name: column[name] for name in AXES if (column[name] > 0).any()}, {name: column[name] for name in WORK},
            self._between(steps),
        )  # fmt: skip

    def _between(self, steps: Sequence[int]) -> Links:
        """What went between hosts of this incarnation in these steps."""
        number = {host: index for index, host in enumerate(self.roles.hosts)}
        if not self._links or not steps:
            return Links.none()
        kept = [
            (line["step"], number[line["from"]], number[line["to"]], line["bytes"], line["seconds"]) for line in self._links
            if steps[0] <= line["step"] <= steps[-1] and line["bytes"] >= LEAST_BYTES
            and line["from"] in number and line["to"] in number
        ]  # fmt: skip
        step, source, target, amount, seconds = np.array(kept, dtype=np.float64).reshape(-1, 5).T
        return Links(step.astype(np.int64), source.astype(np.int64), target.astype(np.int64), amount, seconds)

    def _sit(self, seats: Seats) -> None:
        """A new incarnation: what was heard of older ones goes."""
        self.seats = seats
        self.revision += 1
        self._steps, self._values, self._starts = [], {}, {}
        if self._unplaced:
            self._offset, self._unplaced = None, False

    def _follow(self, file: BinaryIO) -> None:
        size = file.seek(0, 2)
        inode = self.run_dir.summaries.stat().st_ino
        if self._inode not in (None, inode) or size < (self._offset or 0):
            self._steps, self._values, self._starts, self._offset = [], {}, {}, None
            self.revision += 1
        self._inode = inode
        if self._offset is None:
            self._offset = max(0, size - self._kept_bytes) // SUMMARY.itemsize * SUMMARY.itemsize
        for records in self._blocks(file):
            self._take(records)

    def _blocks(self, file: BinaryIO) -> Iterator[NDArray[Any]]:
        """Whole records from the offset on. A record that is being written waits for the next call."""
        assert self._offset is not None
        file.seek(self._offset)
        while data := file.read(BLOCK_RECORDS * SUMMARY.itemsize):
            whole = len(data) // SUMMARY.itemsize
            self._offset += whole * SUMMARY.itemsize
            yield np.frombuffer(data, dtype=SUMMARY, count=whole)
            if len(data) < BLOCK_RECORDS * SUMMARY.itemsize:
                return

    def _take(self, records: NDArray[Any]) -> None:
        self._unplaced = self._unplaced or bool((records["incarnation"] > self.incarnation).any())
        ours = records[(records["incarnation"] == self.incarnation) & (records["rank"] < self.roles.ranks)]
        if not len(ours):
            return
        ours = ours[np.argsort(ours["step"], kind="stable")]
        steps, first = np.unique(ours["step"], return_index=True)
        for step, some in zip(steps.tolist(), np.split(ours, first[1:]), strict=True):
            self._put(step, some)
        self._forget()
        self.revision += 1

    def _put(self, step: int, some: NDArray[Any]) -> None:
        if step not in self._values:
            insort(self._steps, step)
            self._values[step] = np.full((len(COLUMNS), self.roles.ranks), np.nan, dtype=np.float32)
            self._starts[step] = np.full(self.roles.ranks, np.nan)
        # The fields after the start are float32, one beside the other.
        plain = np.ascontiguousarray(some).view(np.uint8).reshape(len(some), SUMMARY.itemsize)
        after = SUMMARY.fields["seconds"][1] if SUMMARY.fields else 0
        numbers = np.ascontiguousarray(plain[:, after:]).view(np.float32)
        self._values[step][:, some["rank"]] = numbers.T
        self._starts[step][some["rank"]] = some["start"]

    def _forget(self) -> None:
        """Drop the oldest steps beyond what is kept."""
        room = self._kept_bytes // max(1, SUMMARY.itemsize * self.roles.ranks)
        for step in self._steps[: max(0, len(self._steps) - min(KEPT_STEPS, max(2, room)))]:
            del self._values[step], self._starts[step]
        self._steps = self._steps[bisect_left(self._steps, min(self._values, default=0)) :]
