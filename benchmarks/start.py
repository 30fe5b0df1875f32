"""Seconds from the command to the first step, by phase, and from a worker's kill to the next step.

    python -m benchmarks.start [--runs 5]

Each run is a launch of two simulated nodes with two workers each; when it has made some steps a worker is killed with SIGKILL.
Phases are those that status.json keeps: cluster, agents and plan are on the clock of the driver, since its start (they overlap);
imports to first_step are of the slowest rank.
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
from pathlib import Path

ROOT = Path(__file__).parents[1]


def measure(folder: Path) -> tuple[dict[str, float], float]:
    run_dir = folder / "run"
    command = [sys.executable, "-m", "trainrt.cli", "launch", str(ROOT / "examples" / "quickstart.toml")]
    began = time.time()
    process = subprocess.Popen(
        [*command, "--run-dir", str(run_dir), "--set", "run.steps=100000", "--set", "diagnostics.dashboard=false"],
        stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, cwd=ROOT,
    )  # fmt: skip
    try:
        lines = wait_lines(run_dir / "metrics.jsonl", 20, process)
        first = lines[0]["time"] - began
        processes = json.loads((run_dir / "cluster.json").read_text())["processes"]
        victim = next(p["pid"] for p in processes if p["role"] == "worker" and p["rank"] == 3)
        killed = time.time()
        os.kill(victim, signal.SIGKILL)
        again = wait_for_incarnation(run_dir / "metrics.jsonl", 2, process)
        phases = json.loads((run_dir / "status.json").read_text()).get("start", {})
        return {**phases, "command to first step": first}, again - killed
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def wait_lines(path: Path, count: int, process: subprocess.Popen[bytes]) -> list[dict[str, float]]:
    while process.poll() is None:
        lines = path.read_text().splitlines() if path.exists() else []
        if len(lines) > count:
            return [json.loads(line) for line in lines[:count]]
        time.sleep(0.02)
    raise SystemExit("the launch ended early")


def wait_for_incarnation(path: Path, incarnation: int, process: subprocess.Popen[bytes]) -> float:
    while process.poll() is None:
        for text in path.read_text().splitlines()[-3:]:
            line = json.loads(text)
            if line["incarnation"] >= incarnation:
                return float(line["time"])
        time.sleep(0.02)
    raise SystemExit("the launch ended early")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    starts, recoveries = [], []
    for _ in range(options.runs):
        with tempfile.TemporaryDirectory() as folder:
            phases, recovery = measure(Path(folder))
        starts.append(phases)
        recoveries.append(recovery)
    for name in starts[0]:
        values = [phases[name] for phases in starts if name in phases]
        print(f"{name:24s} median {statistics.median(values):6.2f} s  min {min(values):6.2f}  max {max(values):6.2f}")
    print(
        f"{'kill to next step':24s} median {statistics.median(recoveries):6.2f} s  min {min(recoveries):6.2f}  "
        f"max {max(recoveries):6.2f}"
    )


if __name__ == "__main__":
    main()
