"""The run directory as it grows: each file is read once, then only what was appended.

Robust to a run that has not begun, to torn last lines, and to files replaced by shorter ones.
"""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainrt.diagnostics.table import SUMMARY, StepTable, roles_of
from trainrt.run_dir import RunDir

STEPS_KEPT = 512


class Tail:
    """The complete lines of one JSONL file that are new since the last call."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0
        self._inode: int | None = None

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """(new lines, whether the file was replaced, so that they are all there is)."""
        try:
            with self.path.open("rb") as file:
                facts = self.path.stat()
                restarted = self._inode is not None and (facts.st_ino != self._inode or facts.st_size < self._offset)
                if restarted:
                    self._offset = 0
                self._inode = facts.st_ino
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return [], False
        end = data.rfind(b"\n") + 1
        self._offset += end
        return [line for text in data[:end].splitlines() if (line := _parse(text)) is not None], restarted


class Records:
    """The whole records of a file of summaries that are new since the last call."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0
        self._inode: int | None = None

    def read(self, *, most: int) -> tuple[NDArray[Any], bool]:
        """(new records, of which the last `most`; whether the file was replaced, so that they are all there is)."""
        try:
            with self.path.open("rb") as file:
                facts = self.path.stat()
                restarted = self._inode is not None and (facts.st_ino != self._inode or facts.st_size < self._offset)
                whole = facts.st_size // SUMMARY.itemsize
                first = max(0 if restarted else self._offset // SUMMARY.itemsize, whole - most)
                file.seek(first * SUMMARY.itemsize)
                data = file.read((whole - first) * SUMMARY.itemsize)
        except FileNotFoundError:
            return np.zeros(0, dtype=SUMMARY), False
        self._inode, self._offset = facts.st_ino, whole * SUMMARY.itemsize
        return np.frombuffer(data, dtype=SUMMARY), restarted


def _parse(text: bytes) -> dict[str, Any] | None:
    """A line, or None for one that a killed writer left torn."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None


class RunReader:
    """Everything a run directory says, kept current by `refresh`."""

    def __init__(self, run_dir: RunDir) -> None:
        self.run_dir = run_dir
        self.metrics: dict[int, dict[str, Any]] = {}
        self.incidents: list[dict[str, Any]] = []
        self.events: dict[int, deque[dict[str, Any]]] = {}
        self.seats: dict[int, dict[str, Any]] = {}
        self.summaries: NDArray[Any] = np.zeros(0, dtype=SUMMARY)
        self._metrics_tail = Tail(run_dir.metrics)
        self._incidents_tail = Tail(run_dir.incidents)
        self._event_tails: dict[int, Tail] = {}
        self._seats_tail = Tail(run_dir.seats)
        self._records = Records(run_dir.summaries)

    def refresh(self) -> bool:
        """Take in what was appended. True if anything was."""
        changed = False
        lines, restarted = self._metrics_tail.read()
        if restarted:
            self.metrics.clear()
        for line in lines:
            held = self.metrics.get(line["step"])
            if held is None or line["incarnation"] >= held["incarnation"]:
                self.metrics[line["step"]] = line
            changed = True
        found, restarted = self._incidents_tail.read()
        self.incidents = found if restarted else self.incidents + found
        return self._refresh_events() | self._refresh_summaries() | changed | bool(found)

    def _refresh_events(self) -> bool:
        changed = False
        for path in sorted(self.run_dir.events.glob("rank-*.jsonl")):
            rank = int(path.stem.removeprefix("rank-"))
            tail = self._event_tails.setdefault(rank, Tail(path))
            kept = self.events.setdefault(rank, deque(maxlen=STEPS_KEPT))
            lines, restarted = tail.read()
            if restarted:
                kept.clear()
            kept.extend(lines)
            changed = changed or bool(lines)
        return changed

    def _refresh_summaries(self) -> bool:
        lines, restarted = self._seats_tail.read()
        if restarted:
            self.seats.clear()
        self.seats.update((line["incarnation"], line) for line in lines)
        most = STEPS_KEPT * max((len(line["hosts"]) for line in self.seats.values()), default=1)
        records, restarted = self._records.read(most=most)
        held = records[:0] if restarted else self.summaries
        self.summaries = np.concatenate((held, records))[-most:] if len(records) or restarted else held
        return bool(lines) or bool(len(records))

    def table(self, incarnation: int | None = None) -> StepTable | None:
        """The last steps of an incarnation (the last one that was heard of, if none is named), or None without any."""
        known = self.summaries[np.isin(self.summaries["incarnation"], list(self.seats))]
        if incarnation is None:
            incarnation = int(known["incarnation"].max(initial=0))
        records = known[known["incarnation"] == incarnation]
        if not len(records):
            return None
        seats = self.seats[incarnation]
        coordinates, ranks = seats["coordinates"], range(len(seats["hosts"]))
        places = [{axis: by_rank[rank] for axis, by_rank in coordinates.items()} for rank in ranks]
        return StepTable.of(records, roles_of(seats["mesh"], seats["hosts"], places))

    def status(self) -> dict[str, Any]:
        """status.json, and whether a driver holds the directory: a run that says "running" may be dead."""
        document = self.run_dir.read_status() or {"state": "unknown", "message": "the run has not begun"}
        return {**document, "live": self.run_dir.locked()}

    def steps(self) -> list[int]:
        """The steps whose events are kept."""
        return sorted({line["step"] for lines in self.events.values() for line in lines})
