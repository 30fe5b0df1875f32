"""How fast the page's API answers over a run of 16,384 ranks.

    python -m benchmarks.page [--ranks 16384] [--steps 40] [--requests 100]

The run is made up: its summaries, seats, and events of some ranks are written, as a driver and workers write them, to a scratch
directory. The server is a process of its own; each document is asked for over a real socket while steps are appended, a step for
every tenth request. `first` is the first answer of all, which reads the whole directory. Meanwhile a page is open: its stream of
changes has the server look for new steps twice a second.
"""

from __future__ import annotations

import argparse
import http.client
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import numpy as np

from tests.diagnostics.run_directories import WrittenRun
from trainrt.config import MeshSize

PATHS = (
    "/api/heatmap", "/api/accounting", "/api/diagnosis", "/api/plan", "/api/health", "/api/incidents", "/api/run",
    "/api/timeline", "/api/timeline?step=2&rank=5", "/metrics", "/",
)  # fmt: skip
GROWING = 10
"""Requests to a step."""


def large_run(folder: Path, *, ranks: int, steps: int) -> WrittenRun:
    """pp 8, tp 8, and dp for the rest, 8 ranks a host. All ranks write events of the second step, 64 of the last."""
    size = MeshSize(pp=8, tp=8, dp=ranks // 64)
    run = WrittenRun(folder, size=size, host_ranks=8)
    run.step()
    run.step(events=range(ranks))
    run.steps(max(0, steps - 3))
    run.step(events=range(64))
    run.incident()
    run.diagnose()
    return run


def ask(address: str) -> tuple[float, int]:
    """(seconds, bytes) of one answer."""
    began = time.perf_counter()
    with urllib.request.urlopen(address, timeout=60) as answer:
        size = len(answer.read())
    return time.perf_counter() - began, size


def watch(address: str) -> None:
    """Read the stream of changes until the server is gone."""
    with suppress(OSError, http.client.HTTPException), urllib.request.urlopen(f"{address}/api/stream") as stream:
        while stream.readline():
            pass


def measure(run: WrittenRun, address: str, requests: int) -> None:
    first, _ = ask(f"{address}/api/heatmap")
    print(f"first: {first:.2f} s")
    threading.Thread(target=watch, args=(address,), daemon=True).start()
    print(f"{'document':32} {'median ms':>10} {'p95 ms':>8} {'max ms':>8} {'KB':>8}")
    for path in PATHS:
        found = []
        for number in range(requests):
            if number % GROWING == 0:
                run.step()
            found.append(ask(address + path))
        seconds = 1000 * np.array([time for time, _ in found])
        middle, late = np.percentile(seconds, (50, 95))
        print(f"{path:32} {middle:10.1f} {late:8.1f} {seconds.max():8.1f} {found[-1][1] / 1000:8.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=16384)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--requests", type=int, default=100)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = large_run(Path(folder) / "run", ranks=given.ranks, steps=given.steps)
        command = [sys.executable, "-m", "trainrt.cli", "dashboard", str(run.run_dir.path), "--port", "0"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            found = re.search(r"http://[^/]+", process.stdout.readline())
            assert found
            measure(run, found.group(), given.requests)
        finally:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
