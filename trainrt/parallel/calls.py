"""The log of collective calls of one rank: the last ones, in memory that outlives the rank and needs no help of it to be read.

The agent makes the memory and hands its file descriptor to the worker, which writes (`Log`); whoever maps the same memory
reads (`read`), also when the worker is stopped, holds its GIL or is dead. It lies in no file system: nothing is left of it
when the last holder ends, and no disk can make a collective wait.

Layout: a header, a row for each group with the calls entered so far, and a ring of slots, one a call. Lists of a slot's or
row's texts are separated by "|"; what does not fit is cut off at the end.
"""

from __future__ import annotations

import itertools
import mmap
import os
import struct
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

HEADER = struct.Struct("<8sQQ")
ROW = struct.Struct("<QI")
SLOT = struct.Struct("<QQdIB219sQ")
"""Order, number, time, row, state, text, and the order again: a reader leaves out a slot that is just being written."""
NUMBER = struct.Struct("<Q")
MAGIC = b"calls-1\n"
HEADER_BYTES, ROW_BYTES, SLOT_BYTES = 64, 512, 256
ROWS, SLOTS = 128, 512
BYTES = HEADER_BYTES + ROWS * ROW_BYTES + SLOTS * SLOT_BYTES
STATE_AT = 28
STATES = ("entered", "issued", "waiting", "left", "failed")
ENTERED, ISSUED, WAITING, LEFT, FAILED = range(len(STATES))
INSIDE = ("entered", "waiting")
POINT_TO_POINT = ("send", "recv")


@dataclass(frozen=True, slots=True)
class Call:
    """One call. number: of its group's collectives, from 1 (point to point: of those with this peer in this direction).

    detail: reduction, root, splits or peer. shapes: "4x3", or "8*4x3" for a list of eight such. entered: seconds since the
    epoch. state: entered (the backend has not taken it yet), issued, waiting (somebody waits for it), left, failed.
    site: "path:line name" of the caller outside of torch. order: position among all calls of the rank.
    """

    group: str
    number: int
    kind: str
    detail: str
    shapes: str
    dtypes: str
    state: str
    entered: float
    site: str
    order: int

    @property
    def collective(self) -> bool:
        return self.kind not in POINT_TO_POINT

    def __str__(self) -> str:
        what = ", ".join(filter(None, (self.detail, " ".join(filter(None, (self.dtypes, self.shapes))))))
        return f"{self.kind}({what})"

    @property
    def place(self) -> str:
        """Where it was called, as frames are shown: "name (file.py:12)"."""
        path, _, name = self.site.partition(" ")
        return f"{name} ({path.rpartition('/')[2]})" if name else self.site or "an unknown place"


@dataclass(frozen=True, slots=True)
class Membership:
    """A group as one of its members knows it. entered: collectives called so far; name: as events carry it."""

    key: str
    name: str
    members: tuple[int, ...]
    entered: int


@dataclass(frozen=True, slots=True)
class Calls:
    """What the log of a rank says: its groups by key, and its last calls, oldest first."""

    incarnation: int
    groups: Mapping[str, Membership]
    calls: Sequence[Call]

    def inside(self) -> list[Call]:
        """The calls that the rank is inside of. After one that failed it may have gone on."""
        return [call for call in self.calls if call.state in INSIDE]

    def to_json(self) -> dict[str, Any]:
        groups = [[one.key, one.name, spans(one.members), one.entered] for one in self.groups.values()]
        calls = [[getattr(call, name) for name in Call.__slots__] for call in self.calls]
        return {"incarnation": self.incarnation, "groups": groups, "calls": calls}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Calls:
        groups = {key: Membership(key, name, members(text), n) for key, name, text, n in document["groups"]}
        return cls(document["incarnation"], groups, [Call(*values) for values in document["calls"]])


def make_memory() -> int:
    """A file descriptor of memory for one log, without a name in any file system."""
    fd = os.memfd_create("trainrt-calls", os.MFD_CLOEXEC)
    os.ftruncate(fd, BYTES)
    return fd


# Writing.


class Log:
    """The writer's side. Threads of one process may share it."""

    def __init__(self, fd: int) -> None:
        self._memory = mmap.mmap(fd, BYTES)
        self._lock = threading.Lock()
        self.begin(0)

    def begin(self, incarnation: int) -> None:
        """Forget everything: groups are made anew, and count from 1."""
        self._memory[HEADER_BYTES:] = bytes(BYTES - HEADER_BYTES)
        HEADER.pack_into(self._memory, 0, MAGIC, incarnation, os.getpid())
        self._rows = 0
        self._orders = itertools.count(1)

    def add_group(self, key: str, name: str, ranks: Sequence[int]) -> int | None:
        """A group that calls can be entered for, or None where there is no room for one more."""
        with self._lock:
            row, text = self._rows, "|".join((key, spans(ranks), name.replace("|", "/"))).encode()
            if row == ROWS or len(text) > ROW_BYTES - ROW.size:
                return None
            at = HEADER_BYTES + row * ROW_BYTES
            self._memory[at + ROW.size : at + ROW.size + len(text)] = text
            ROW.pack_into(self._memory, at, 0, len(text))
            self._rows += 1
            return row

    def enter(self, row: int, number: int, text: bytes, *, collective: bool) -> int:
        """A call begins. text: kind, detail, shapes, dtypes and site. Returns where its state is kept, for `mark`."""
        order = next(self._orders)
        at = FIRST_SLOT + order % SLOTS * SLOT_BYTES
        SLOT.pack_into(self._memory, at, order, number, time.time(), row, ENTERED, text, order)
        if collective:
            NUMBER.pack_into(self._memory, HEADER_BYTES + row * ROW_BYTES, number)
        return at + STATE_AT

    def mark(self, place: int, state: int) -> None:
        """The state of a call that was entered not long ago (a ring's length of calls)."""
        self._memory[place] = state


FIRST_SLOT = HEADER_BYTES + ROWS * ROW_BYTES


# Reading.


def read(fd: int) -> Calls | None:
    """What a log's memory says now, or None where no log was ever begun there."""
    data = os.pread(fd, BYTES, 0)
    if len(data) < BYTES or not data.startswith(MAGIC):
        return None
    groups = list(_rows(data))
    keys = [one.key for one in groups]
    calls = sorted(_slots(data, keys), key=lambda call: call.order)
    return Calls(HEADER.unpack_from(data)[1], {one.key: one for one in groups}, calls)


def _rows(data: bytes) -> Iterator[Membership]:
    for row in range(ROWS):
        at = HEADER_BYTES + row * ROW_BYTES
        entered, size = ROW.unpack_from(data, at)
        if not size:
            return
        key, ranks, name = data[at + ROW.size : at + ROW.size + size].decode(errors="replace").split("|", 2)
        yield Membership(key, name, members(ranks), entered)


def _slots(data: bytes, keys: Sequence[str]) -> Iterator[Call]:
    for slot in range(SLOTS):
        at = FIRST_SLOT + slot * SLOT_BYTES
        order, number, entered, row, state, packed, again = SLOT.unpack_from(data, at)
        if not order or order != again or row >= len(keys):
            continue
        text = packed.rstrip(b"\0").decode(errors="replace")
        kind, detail, shapes, dtypes, site = (text.split("|", 4) + [""] * 4)[:5]
        yield Call(keys[row], number, kind, detail, shapes, dtypes, STATES[state], entered, site, order)


# Ranks as text.


def spans(ranks: Sequence[int]) -> str:
    """Ranks as ranges: "0-6:2,9" for 0, 2, 4, 6 and 9. The order is kept."""
    found, at = [], 0
    while at < len(ranks):
        step = ranks[at + 1] - ranks[at] if at + 1 < len(ranks) else 0
        end = at
        while step > 0 and end + 1 < len(ranks) and ranks[end + 1] - ranks[end] == step:
            end += 1
        if end - at < 2:
            end = at
        found.append(f"{ranks[at]}-{ranks[end]}:{step}" if end > at else str(ranks[at]))
        at = end + 1
    return ",".join(found)


def members(text: str) -> tuple[int, ...]:
    """The ranks that `spans` wrote."""
    found: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, rest = part.partition("-")
        last, _, step = rest.partition(":")
        found += range(int(first), int(last) + 1, int(step)) if rest else [int(first)]
    return tuple(found)
