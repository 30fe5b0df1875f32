"""Seconds from a kill to the next step: worker, worker with its store, node with and without a spare, driver; and by restart.

    python -m benchmarks.recovery [--runs 5]

Each round launches one job of three nodes and a spare (two data shards, one of parity), kills one thing after another with
SIGKILL, and at the end everything at once, after which the same command starts again from the checkpoint on disk. Prints
medians and spread of: the kill to the next step, and of it the part until the fault was known.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OPTIONS = {
    "run.steps": 100000, "cluster.nodes": 3, "cluster.workers_per_node": 1, "cluster.spare_nodes": 1,
    "checkpoint.every": 100, "diagnostics.dashboard": False, "evaluation.samples": 0, "optimizer.schedule": "constant",
    "data.global_batch": 12, "parallel.fsdp": 3, "parallel.ep": 1,
}  # fmt: skip


class Job:
    """One run of the quickstart's model, and what can be killed of it."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def launch(self) -> None:
        words = [sys.executable, "-m", "trainrt.cli", "launch", str(ROOT / "examples" / "quickstart.toml")]
        words += ["--run-dir", str(self.run_dir)]
        for key, value in OPTIONS.items():
            words += ["--set", f"{key}={json.dumps(value)}"]
        self.process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, cwd=ROOT)

    def read(self, name: str) -> Any:
        return json.loads((self.run_dir / name).read_text())

    def lines(self, name: str) -> list[dict[str, Any]]:
        path = self.run_dir / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def processes(self, *roles: str) -> list[dict[str, Any]]:
        return [entry for entry in self.read("cluster.json")["processes"] if entry["role"] in roles]

    def until(self, holds: Any) -> None:
        while not holds():
            if self.process.poll() not in (None, -signal.SIGKILL):
                raise SystemExit(f"the launch ended: {self.read('status.json')['message']}")
            time.sleep(0.01)

    def protected(self) -> None:
        self.until(lambda: (self.run_dir / "status.json").exists() and self.read("status.json")["protection"] == "full")
        step = self.lines("metrics.jsonl")[-1]["step"]
        self.until(lambda: self.lines("metrics.jsonl")[-1]["step"] > step + 5)

    def next_step(self, incarnation: int) -> float:
        """When the first step after an incarnation was done."""
        self.until(lambda: self.lines("metrics.jsonl")[-1]["incarnation"] > incarnation)
        return float(next(line["time"] for line in self.lines("metrics.jsonl") if line["incarnation"] > incarnation))

    def kill(self, entries: list[dict[str, Any]]) -> None:
        for role in ("store", "agent", "worker", "raylet", "driver"):
            for entry in entries:
                if entry["role"] == role:
                    os.kill(entry["pid"], signal.SIGKILL)


def measure(job: Job, kill: Any, *, relaunch: bool = False) -> tuple[float, float]:
    """(seconds from the kill to the next step, of them until the fault was known)."""
    incarnation, seen = job.read("status.json")["incarnation"], len(job.lines("incidents.jsonl"))
    at = time.time()
    kill()
    if relaunch:
        job.process.wait()
        job.launch()
    seconds = job.next_step(incarnation) - at
    job.until(lambda: len(job.lines("incidents.jsonl")) > seen or relaunch)
    incident = job.lines("incidents.jsonl")[seen] if len(job.lines("incidents.jsonl")) > seen else {}
    known = seconds - (incident.get("recovered_seconds") or 0.0)
    return seconds, known


def round_of_kills(job: Job, found: dict[str, list[tuple[float, float]]]) -> None:
    def of(node: str, *roles: str) -> list[dict[str, Any]]:
        return [entry for entry in job.processes(*roles) if entry["node"] == node]

    everything = ("store", "agent", "worker", "raylet")
    job.protected()
    found["worker (memory)"].append(measure(job, lambda: job.kill(of("n1", "worker"))))
    job.protected()
    found["worker and its store (parity)"].append(measure(job, lambda: job.kill(of("n1", "worker", "store"))))
    job.protected()
    found["node, with a spare (parity)"].append(measure(job, lambda: job.kill(of("n2", *everything))))
    job.protected()
    found["driver (memory)"].append(measure(job, lambda: job.kill(job.processes("driver")), relaunch=True))
    job.protected()
    found["node, without a spare (parity)"].append(measure(job, lambda: job.kill(of("n1", *everything))))
    job.until(lambda: any((job.run_dir / "checkpoints").glob("step-*/COMMIT")))
    found["everything (disk)"].append(
        measure(job, lambda: job.kill(job.processes(*everything, "driver")), relaunch=True)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for _ in range(options.runs):
        with tempfile.TemporaryDirectory() as folder:
            job = Job(Path(folder) / "run")
            job.launch()
            try:
                round_of_kills(job, found)
            finally:
                job.process.send_signal(signal.SIGTERM)
                job.process.wait(60)
    print(f"seconds from the kill to the next step, {options.runs} rounds")
    for name, values in found.items():
        totals, known = [total for total, _ in values], [early for _, early in values]
        print(
            f"  {name:32s} median {statistics.median(totals):6.2f}  min {min(totals):6.2f}  max {max(totals):6.2f}"
            f"   of it until known {statistics.median(known):6.2f}"
        )


if __name__ == "__main__":
    main()
