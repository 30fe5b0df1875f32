"""Seconds from a kill to the next step: worker, worker with its store, node with and without a spare, driver; and by restart.

    python -m benchmarks.recovery [--runs 5] [--set key=value ...]

Each round launches one job of three nodes and a spare (two data shards, one of parity), kills one thing after another with
SIGKILL, and at the end everything at once, after which the same command starts again from the checkpoint on disk. Prints
medians and spread of: the kill to the next step, and of it the parts: until the fault was known, restart, restore, first step.
Peers that are installed (benchmarks.recovery_peers) take their turn in every round.
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
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.recovery_peers import installed
from trainrt.config import load, to_toml

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


@dataclass(frozen=True, slots=True)
class Seconds:
    """From the kill to the next step, until the fault was known, and the parts of the rest that the incident names."""

    total: float
    known: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)


def measure(job: Job, kill: Callable[[], None], *, relaunch: bool = False) -> Seconds:
    """`relaunch`: the same command is given again, at once."""
    incarnation, seen = job.read("status.json")["incarnation"], len(job.lines("incidents.jsonl"))
    at = time.time()
    kill()
    if relaunch:
        job.process.wait()
        job.launch()
    seconds = job.next_step(incarnation) - at
    job.until(lambda: len(job.lines("incidents.jsonl")) > seen)
    incident = job.lines("incidents.jsonl")[seen]
    return Seconds(seconds, seconds - (incident.get("recovered_seconds") or 0.0), incident.get("phases") or {})


def forget(folder: Path) -> None:
    """Drop files from the page cache, so that they are read from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def round_of_kills(job: Job, found: dict[str, list[Seconds]]) -> None:
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

    def kill_all() -> None:
        job.kill(job.processes(*everything, "driver"))
        forget(job.run_dir / "checkpoints")

    found["everything (disk)"].append(measure(job, kill_all, relaunch=True))


def round_of_peers(found: dict[str, list[Seconds]]) -> None:
    """The same model under those peers that are installed."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"{key}={json.dumps(value)}" for key, value in OPTIONS.items()]
        path = Path(folder) / "job.toml"
        path.write_text(to_toml(load(ROOT / "examples" / "quickstart.toml", overrides)))
        for number, peer in enumerate(installed().values()):
            place = Path(folder) / str(number)
            place.mkdir()
            for name, seconds in peer(path, place).items():
                found[name].append(Seconds(seconds))


def report(found: dict[str, list[Seconds]]) -> None:
    for name, values in found.items():
        totals = [value.total for value in values]
        parts = {key: statistics.median(v.parts[key] for v in values) for key in values[0].parts}
        print(
            f"  {name:32s} median {statistics.median(totals):6.2f}  min {min(totals):6.2f}  max {max(totals):6.2f}"
            f"   until known {statistics.median(value.known for value in values):5.2f}  "
            + "  ".join(f"{key.removesuffix('_seconds')} {seconds:.2f}" for key, seconds in parts.items())
        )
    disk = "everything (disk)"
    for name in ("worker (memory)", "worker and its store (parity)"):
        pairs = zip(found[name], found[disk], strict=True)
        ratios = [a.parts["restore_seconds"] / b.parts["restore_seconds"] for a, b in pairs if a.parts and b.parts]
        if ratios:
            print(
                f"  restore, {name} over disk: {statistics.median(ratios):.2f}x ({min(ratios):.2f}-{max(ratios):.2f})"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--set", action="append", default=[], help="a key of the job, such as model.config.hidden_size=512"
    )
    options = parser.parse_args()
    for key, _, value in (text.partition("=") for text in options.set):
        OPTIONS[key] = json.loads(value)
    found: dict[str, list[Seconds]] = defaultdict(list)
    for _ in range(options.runs):
        with tempfile.TemporaryDirectory() as folder:
            job = Job(Path(folder) / "run")
            job.launch()
            try:
                round_of_kills(job, found)
            finally:
                job.process.send_signal(signal.SIGTERM)
                job.process.wait(60)
        round_of_peers(found)
    print(f"seconds from the kill to the next step, {options.runs} rounds")
    report(found)


if __name__ == "__main__":
    main()
