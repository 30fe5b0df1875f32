"""Runs with faults on order: a process is slow for as long as a file with its pid says so, wherever its rank is later."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.launch.runs import Run, write_job

MODULE = """
import gc
import os
import time
from pathlib import Path

from trainrt import Pipeline
from trainrt.training.data import collate as usual
from trainrt.training.objectives import cross_entropy_sum

ORDERS = Path({orders!r})


def ordered(place):
    try:
        return float((ORDERS / f"{{place}}-{{os.getpid()}}").read_text())
    except (FileNotFoundError, ValueError):
        return 0.0


def collate(samples):
    time.sleep(ordered("data"))
    return usual(samples)


def collect(seconds):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        gc.collect()


def loss(model, batch):
    time.sleep(ordered("compute"))
    collect(ordered("collect"))
    return cross_entropy_sum(model(batch["input_ids"]).logits, batch["labels"])


pipeline = Pipeline(loss=loss, collate=collate)
"""


class Injected(Run):
    """A run of one rank a node that takes orders."""

    @classmethod
    def of(cls, folder: Path, **sections: dict[str, Any]) -> Injected:
        (folder / "orders").mkdir()
        (folder / "injected.py").write_text(MODULE.format(orders=str(folder / "orders")))
        sections["run"] = {"steps": 100000, "pipeline": "injected:pipeline"}
        return cls(folder / "run", write_job(folder / "job.toml", **sections))

    def order(self, place: str, pid: int, seconds: float) -> Path:
        """Lose so many seconds a call at a place: compute, data or collect. Remove the file to end it."""
        path = self.directory.parent / "orders" / f"{place}-{pid}"
        path.write_text(str(seconds))
        return path

    def verdict(self, cause: str) -> dict[str, Any]:
        """The verdict of this cause in diagnosis.json, waited for."""

        def found() -> dict[str, Any] | None:
            verdicts = self.document("diagnosis").get("verdicts", [])
            return next((verdict for verdict in verdicts if verdict["cause"] == cause), None)

        verdict: dict[str, Any] = self.until(found, f"a verdict {cause}; {json.dumps(self.document('diagnosis'))}")
        return verdict
