"""What it costs to record a collective call: processor time of an all-reduce with and without it, in one process.

    python -m benchmarks.calls [--pairs 15] [--calls 4000]

A group of one rank, whose call is as short as calls get; both arms in turn. Prints the median of the pairwise differences in
microseconds a call and their spread, how long a full log takes to be read, and its bytes as an agent sends it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist

from trainrt.parallel.calls import Log, make_memory, read
from trainrt.parallel.recording import METHODS, record_calls


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--calls", type=int, default=4000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    plain, fd = methods(), make_memory()
    record_calls(Log(fd)).begin(1)
    recorded = methods()
    differences, times = [], []
    for _ in range(options.pairs):
        install(plain)
        without = microseconds(options.calls)
        install(recorded)
        differences.append(microseconds(options.calls) - without)
        times.append(without)
    low, high, more = min(differences), max(differences), statistics.median(differences)
    print(f"all_reduce {statistics.median(times):.1f} us, recording {more:.1f} us more ({low:.1f} - {high:.1f})")
    before = time.perf_counter()
    found = read(fd)
    assert found is not None
    seconds, sent = time.perf_counter() - before, len(json.dumps(found.to_json()))
    print(f"read in {seconds * 1e3:.1f} ms: {len(found.calls)} calls, {sent} bytes")
    os._exit(0)


def microseconds(calls: int) -> float:
    """Processor time of this thread for one call."""
    x = torch.ones(64, 3)
    started = time.thread_time()
    for _ in range(calls):
        dist.all_reduce(x)
    return (time.thread_time() - started) / calls * 1e6


def methods() -> dict[tuple[type, str], Any]:
    """What stands behind calls now."""
    found: dict[tuple[type, str], Any] = {(dist.Work, "wait"): dist.Work.__dict__["wait"]}
    for name in METHODS:
        if name in dist.ProcessGroup.__dict__:
            found[dist.ProcessGroup, name] = dist.ProcessGroup.__dict__[name]
    return found


def install(wanted: dict[tuple[type, str], Any]) -> None:
    for (owner, name), method in wanted.items():
        setattr(owner, name, method)


if __name__ == "__main__":
    main()
