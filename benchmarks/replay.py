"""Seconds that a diagnosis takes of a trace of many ranks, and how close it comes to what was made slow.

    python -m benchmarks.replay [--dp 640] [--pp 16] [--microbatches 16] [--steps 5] [--factor 1.5]

A made-up 1F1B job (10,240 ranks, compute varies by 1 %), one worker of which computes `factor` times as long. Printed are wall
and processor seconds of each part, the memory at its highest, and the verdicts.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from tests.diagnostics.traces import Job, Seconds
from trainrt.diagnostics.replay.replay import Replay, what_if
from trainrt.diagnostics.replay.trace import OPTYPES, read_trace
from trainrt.diagnostics.replay.whatif import diagnose


@contextmanager
def timed(part: str) -> Iterator[None]:
    wall, processor = time.perf_counter(), time.process_time()
    yield
    print(f"{part:<28} {time.perf_counter() - wall:7.2f} s   processor {time.process_time() - processor:7.2f} s")


def write(path: Path, job: Job) -> None:
    columns = job.columns()
    codes = pa.array(columns["optype"].astype("int32"))
    parquet.write_table(pa.table({**columns, "optype": pa.DictionaryArray.from_arrays(codes, pa.array(OPTYPES))}), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("dp", 640), ("pp", 16), ("microbatches", 16), ("steps", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--factor", type=float, default=1.5)
    options = parser.parse_args()
    slow = options.pp // 2, options.dp // 3

    def seconds(job: Job, name: str, stage: int, chunk: int, microbatch: int, usual: Seconds) -> Seconds:
        if stage == slow[0] and name.endswith("compute"):
            usual = usual.copy()
            usual[:, slow[1]] *= options.factor
        return usual

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.parquet"
        job = Job(options.dp, options.pp, options.microbatches, options.steps, noise=0.01, seconds=seconds)
        write(path, job)
        with timed("read"):
            trace = read_trace(path)
    print(f"{len(trace)} operations of {options.dp * options.pp} ranks in {options.steps} steps")
    with timed("graph"):
        replay = Replay.of(trace)
    with timed("what-if figures"):
        figures = what_if(replay)
    with timed("diagnosis, graph included"):
        found = diagnose(trace)
    print(
        f"discrepancy {figures.discrepancy:+.1e}, S {figures.slowdown:.3f}, M_W {figures.M_W:.3f}, M_S {figures.M_S:.3f}"
    )
    print(f"slow: rank {slow[0] * options.dp + slow[1]}")
    for verdict in found.verdicts:
        print(verdict.sentence)
    print(f"memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
