"""The events of ranks, step by step: an index of where each line stands, so that only the lines asked for are parsed.

Ranks write events for some steps only, and at 16,384 ranks there are as many files: the steps known are those of some files and
of those that were asked for.
"""

from __future__ import annotations

import os
import re
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from trainrt.diagnostics.tail import parse_line
from trainrt.run_dir import RunDir

STEPS_KEPT = 512
FILES_FOLLOWED = 64
LINES_CACHED = 512
FRESH_NANOSECONDS = 1_000_000_000
STEP = re.compile(rb'\{"step": ?(\d+)\b')


class EventFile:
    """The lines of one rank: by step where its newest line stands."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.places: OrderedDict[int, tuple[int, int]] = OrderedDict()
        self._offset = 0
        self._inode: int | None = None

    def refresh(self) -> bool:
        """Index what was appended. True if anything was."""
        try:
            facts = self.path.stat()
            if facts.st_ino == self._inode and facts.st_size == self._offset:
                return False
            if facts.st_ino != self._inode or facts.st_size < self._offset:
                self.places.clear()
                self._offset = 0
            self._inode = facts.st_ino
            with self.path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return False
        end = data.rfind(b"\n") + 1
        at = 0
        for line in data[:end].splitlines(keepends=True):
            self._index(line, self._offset + at)
            at += len(line)
        self._offset += end
        return end > 0

    def _index(self, line: bytes, offset: int) -> None:
        found = STEP.match(line)
        document = None if found else parse_line(line)
        if not found and (document is None or "step" not in document):
            return
        step = int(found.group(1)) if found else int((document or {})["step"])
        self.places.pop(step, None)
        self.places[step] = (offset, len(line))
        if len(self.places) > STEPS_KEPT:
            self.places.popitem(last=False)

    def line(self, step: int) -> dict[str, Any] | None:
        """The newest line of a step, or None where there is none, or a torn one."""
        place = self.places.get(step)
        if place is None:
            return None
        with self.path.open("rb") as file:
            file.seek(place[0])
            return parse_line(file.read(place[1]))


class Windows:
    """The events of a run."""

    def __init__(self, run_dir: RunDir) -> None:
        self.run_dir = run_dir
        self.ranks: Sequence[int] = ()
        self._files: dict[int, EventFile] = {}
        self._listed: int | None = None
        self._lines: OrderedDict[tuple[int, int, int], dict[str, Any]] = OrderedDict()
        self.revision = 0

    def refresh(self) -> bool:
        """Look at the folder and at the files that are followed. True if anything is new."""
        changed = self._list()
        for rank in self._followed():
            changed = self._file(rank).refresh() or changed
        self.revision += changed
        return changed

    def steps(self) -> list[int]:
        """The steps that the files looked at have events of."""
        return sorted(set().union(*(file.places for file in self._files.values())))

    def newest_whole(self) -> int | None:
        """The newest step that all files followed have, or else the newest of any."""
        held = [self._file(rank).places.keys() for rank in self._followed()]
        held = [steps for steps in held if steps]
        if not held:
            return None
        common = set(held[0]).intersection(*held[1:])
        return max(common) if common else max(max(steps) for steps in held)

    def lines(self, step: int, ranks: Iterable[int] | None = None) -> dict[int, dict[str, Any]]:
        """By rank the line of a step, of the ranks that have one; of all ranks, or of those named."""
        found = {}
        known = set(self.ranks)
        for rank in sorted(known if ranks is None else known & set(ranks)):
            line = self._line(rank, step)
            if line is not None:
                found[rank] = line
        return found

    def _line(self, rank: int, step: int) -> dict[str, Any] | None:
        file = self._file(rank)
        file.refresh()
        place = file.places.get(step)
        if place is None:
            return None
        key = (rank, step, place[0])
        if key not in self._lines:
            line = file.line(step)
            if line is None:
                return None
            self._lines[key] = line
            if len(self._lines) > LINES_CACHED:
                self._lines.popitem(last=False)
        self._lines.move_to_end(key)
        return self._lines[key]

    def _file(self, rank: int) -> EventFile:
        return self._files.setdefault(rank, EventFile(self.run_dir.events_of(rank)))

    def _followed(self) -> Sequence[int]:
        """Ranks whose files are looked at each time: all of a small run, evenly chosen ones of a large one."""
        every = max(1, -(-len(self.ranks) // FILES_FOLLOWED))
        return self.ranks[::every]

    def _list(self) -> bool:
        """The ranks that have a file; the folder is read again only where its own time says that a name is new."""
        try:
            stamp = self.run_dir.events.stat().st_mtime_ns
            if stamp == self._listed:
                return False
            names = os.listdir(self.run_dir.events)
        except FileNotFoundError:
            return False
        # The clock of a folder ticks slowly: a name may yet come within the same tick.
        self._listed = stamp if time.time_ns() - stamp > FRESH_NANOSECONDS else None
        found = sorted(
            int(name[5:-6])
            for name in names
            if name.startswith("rank-") and name.endswith(".jsonl") and name[5:-6].isdigit()
        )
        changed = found != list(self.ranks)
        self.ranks = found
        return changed
