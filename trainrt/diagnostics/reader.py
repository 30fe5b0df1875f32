"""The run directory as it grows: each file is read once, then only what was appended.

Robust to a run that has not begun, to torn last lines, and to files replaced by shorter ones.
"""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from typing import Any

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
        self._metrics_tail = Tail(run_dir.metrics)
        self._incidents_tail = Tail(run_dir.incidents)
        self._event_tails: dict[int, Tail] = {}

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
        return self._refresh_events() or changed or bool(found)

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

    def status(self) -> dict[str, Any]:
        """status.json, and whether a driver holds the directory: a run that says "running" may be dead."""
        document = self.run_dir.read_status() or {"state": "unknown", "message": "the run has not begun"}
        return {**document, "live": self.run_dir.locked()}

    def steps(self) -> list[int]:
        """The steps whose events are kept."""
        return sorted({line["step"] for lines in self.events.values() for line in lines})
