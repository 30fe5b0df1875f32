"""What ranks tell is on the driver's clock, whatever the clocks of their hosts say."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainrt.launch.clocks import epoch_of

RANK = """
import sys, time
real_wall, real = time.time, time.monotonic
time.time, time.monotonic = lambda: real_wall() + 3600, lambda: real() + 12345
import numpy, torch
from trainrt.diagnostics.table import SUMMARY
from trainrt.events import ring
from trainrt.run_dir import RunDir
from trainrt.training.recorder import Recorder

run_dir = RunDir(sys.argv[1])
run_dir.create()
recorder = Recorder(run_dir, rank=0, node="n0", incarnation=1, device=torch.device("cpu"))
print("ready", flush=True)
for line in sys.stdin:
    if line == "clock\\n":
        print(time.monotonic(), flush=True)
    else:
        with ring.span("step", kind="step"):
            time.sleep(0.01)
        print(numpy.frombuffer(recorder.step(1, epoch=float(line)), SUMMARY)["start"][0], flush=True)
"""


def test_a_rank_whose_clock_is_an_hour_off_tells_the_drivers_time(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RANK, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "ready\n"

        def ask(line: str = "clock") -> float:
            assert process.stdin is not None and process.stdout is not None
            print(line, file=process.stdin, flush=True)
            return float(process.stdout.readline())

        epoch = epoch_of(ask)
        before = time.time()
        start = ask(repr(epoch))
        assert before - 0.005 < start < time.time(), "and with its own clock it would be an hour late"
        process.stdin.close()


def test_the_quickest_round_trip_counts() -> None:
    """Others are as wrong as half of the time they take."""
    delays = iter([0.0, 0.03, 0.0, 0.001, 0.02, 0.0, 0.0, 0.02, 0.03, 0.03])

    def ask() -> float:
        time.sleep(next(delays))
        there = time.monotonic() + 77
        time.sleep(next(delays))
        return there

    truth = time.time() - time.monotonic() - 77
    assert epoch_of(ask) == pytest.approx(truth, abs=0.002)
