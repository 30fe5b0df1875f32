"""The driver's files of the run directory: status.json, cluster.json, metrics.jsonl.

Readers are people and tools on any host; the driver is the one writer.
"""

from __future__ import annotations

import os
import time
from typing import Any

from trainrt.run_dir import RunDir, append_line, now, write_json

STATUS_SECONDS = 0.5
"""How often status.json follows the steps; changes of state are written at once."""


class Status:
    """status.json. Keys are set; the file follows."""

    def __init__(self, run_dir: RunDir, **first: Any) -> None:
        self._run_dir = run_dir
        self._written_at = 0.0
        self.fields: dict[str, Any] = {
            "state": "starting", "run_id": "", "step": 0, "steps": 0, "incarnation": 0, "world_size": 0,
            "protection": "none", "message": "", **first,
        }  # fmt: skip

    def set(self, **fields: Any) -> None:
        """Change keys and write at once where one differs; for steps use `step`."""
        if any(self.fields.get(key) != value for key, value in fields.items()):
            self.fields.update(fields)
            self._write()

    def step(self, step: int) -> None:
        """A step was completed: written with the next change, or after a while."""
        self.fields["step"] = step
        if time.monotonic() - self._written_at > STATUS_SECONDS:
            self._write()

    def _write(self) -> None:
        self._written_at = time.monotonic()
        write_json(self._run_dir.status, {**self.fields, "time": now()})


class Phases:
    """The `start` of status.json: when its parts were done, in seconds since it `began`, and what its ranks took."""

    def __init__(self, began: float) -> None:
        self._began = began
        self.seconds: dict[str, float] = {}

    def done(self, name: str) -> None:
        self.seconds[name] = round(time.monotonic() - self._began, 3)

    def slowest(self, name: str, seconds: float) -> None:
        """Ranks do it at the same time: the slowest counts."""
        self.seconds[name] = max(self.seconds.get(name, 0.0), round(seconds, 3))


class Processes:
    """cluster.json: written when it changed."""

    def __init__(self, run_dir: RunDir) -> None:
        self._run_dir = run_dir
        self._last: dict[str, Any] | None = None

    def update(self, *, incarnation: int, agents: dict[str, list[dict[str, Any]]], raylets: dict[str, int]) -> None:
        found: list[dict[str, Any]] = [{"role": "driver", "pid": os.getpid(), "node": None, "rank": None}]
        for node in sorted(agents):
            found += agents[node]
        found += [{"role": "raylet", "pid": pid, "node": node, "rank": None} for node, pid in sorted(raylets.items())]
        document = {"incarnation": incarnation, "processes": found}
        if document != self._last:
            self._last = document
            write_json(self._run_dir.cluster, document)

    def clear(self, *, incarnation: int) -> None:
        """The run is over: nothing of it runs."""
        write_json(self._run_dir.cluster, {"incarnation": incarnation, "processes": []})


def append_metrics(run_dir: RunDir, line: dict[str, Any]) -> None:
    append_line(run_dir.metrics, line)
