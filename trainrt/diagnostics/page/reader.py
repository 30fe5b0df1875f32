"""The run directory as it grows: each file is read once, then only what was appended.

Robust to a run that has not begun, to torn last lines, and to files replaced by shorter ones.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainrt.diagnostics.tail import Tail
from trainrt.diagnostics.telemetry import Summaries
from trainrt.diagnostics.windows import Windows
from trainrt.run_dir import RunDir, read_json

__all__ = ["Document", "RunReader", "Tail"]


class Document:
    """A JSON file that is replaced as a whole: parsed again only when it is another."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.revision = 0
        self.time: float | None = None
        self._stamp: tuple[int, ...] | None = None
        self._held: dict[str, Any] | None = None

    def read(self) -> dict[str, Any] | None:
        """The document, or None where there is none or it is no JSON object."""
        try:
            facts = self.path.stat()
        except FileNotFoundError:
            stamp, self.time = None, None
        else:
            stamp = (facts.st_ino, facts.st_mtime_ns, facts.st_size)
            self.time = facts.st_mtime
        if stamp != self._stamp:
            self._stamp = stamp
            self.revision += 1
            self._held = self._parse()
        return self._held

    def _parse(self) -> dict[str, Any] | None:
        try:
            document = read_json(self.path)
        except (json.JSONDecodeError, UnicodeDecodeError):
            return None
        return document if isinstance(document, dict) else None


class RunReader:
    """Everything a run directory says, kept current by `refresh`."""

    def __init__(self, run_dir: RunDir) -> None:
        self.run_dir = run_dir
        self.metrics: dict[int, dict[str, Any]] = {}
        self.metrics_revision = 0
        self.incidents: list[dict[str, Any]] = []
        self.summaries = Summaries(run_dir)
        self.windows = Windows(run_dir)
        self.diagnosis = Document(run_dir.diagnosis)
        self.plan = Document(run_dir.plan)
        self.cluster = Document(run_dir.cluster)
        self._status = Document(run_dir.status)
        self._metrics_tail = Tail(run_dir.metrics)
        self._incidents_tail = Tail(run_dir.incidents)

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
        self.metrics_revision += changed
        found, restarted = self._incidents_tail.read()
        self.incidents = found if restarted else self.incidents + found
        changed = self.summaries.refresh() or changed
        changed = self.windows.refresh() or changed
        before = self.diagnosis.revision
        self.diagnosis.read()
        return changed or bool(found) or self.diagnosis.revision != before

    def status(self) -> dict[str, Any]:
        """status.json, and whether a driver holds the directory: a run that says "running" may be dead."""
        document = self._status.read() or {"state": "unknown", "message": "the run has not begun"}
        return {**document, "live": self.run_dir.locked()}
