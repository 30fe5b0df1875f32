"""Effective training time under kills: steps in windows with a kill every 60 s and every 15 s, against windows without.

    python -m benchmarks.effective [--rounds 5] [--window 60] [--seed 0]

One job of three nodes (two data shards, one of parity). In each round the windows alternate: none, a kill every 60 s, none, a
kill every 15 s. What is killed is drawn: a worker (half of the time), a worker with its node's store (a third), the driver (the
rest; it is launched again at once, as a supervisor would). A kill falls at the middle of its interval, and a window is as
long as it takes for its last kill to be followed by half an interval. Steps that are done again count once.
"""

from __future__ import annotations

import argparse
import random
import signal
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.recovery import Job

INTERVALS = (60.0, 15.0)


def steps(job: Job) -> int:
    """The newest step that was completed."""
    return max(int(line["step"]) for line in job.lines("metrics.jsonl"))


def kill(job: Job, chance: random.Random) -> str:
    number = chance.random()
    if number < 1 / 6:
        job.kill(job.processes("driver"))
        job.process.wait()
        job.launch()
        return "driver"
    node = chance.choice([entry["node"] for entry in job.processes("worker")])
    roles = ("worker",) if number < 2 / 3 else ("worker", "store")
    job.kill([entry for entry in job.processes(*roles) if entry["node"] == node])
    return " and ".join(roles)


def window(job: Job, seconds: float, chance: random.Random, *, every: float | None) -> float:
    """Steps per second over a window."""
    first, began = steps(job), time.monotonic()
    killed = []
    for number in range(int(seconds // every) if every else 0):
        time.sleep(max(0.0, began + (number + 0.5) * (every or 0.0) - time.monotonic()))
        killed.append(kill(job, chance))
    time.sleep(max(0.0, began + seconds - time.monotonic()))
    rate = (steps(job) - first) / (time.monotonic() - began)
    print(f"  {rate:6.2f} steps/s  {', '.join(killed) or 'undisturbed'}", flush=True)
    return rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--window", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    ratios: dict[float, list[float]] = {every: [] for every in INTERVALS}
    with tempfile.TemporaryDirectory() as folder:
        job = Job(Path(folder) / "run")
        job.launch()
        try:
            job.protected()
            for _ in range(options.rounds):
                for every in INTERVALS:
                    plain = window(job, options.window / 2, chance, every=None)
                    ratios[every].append(window(job, options.window, chance, every=every) / plain)
        finally:
            job.process.send_signal(signal.SIGTERM)
            job.process.wait(60)
    for every, found in ratios.items():
        print(
            f"a kill every {every:.0f} s: {statistics.median(found):.3f} of the undisturbed steps "
            f"(median of {len(found)} windows, {min(found):.3f}-{max(found):.3f})"
        )


if __name__ == "__main__":
    main()
