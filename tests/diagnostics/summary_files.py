"""Summaries and seats as a driver writes them, of made-up numbers."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainrt.config import MeshSize
from trainrt.diagnostics.table import SUMMARY
from trainrt.parallel.mesh import coordinates
from trainrt.run_dir import RunDir, append_line

AXES = ("pp", "dp", "fsdp", "cp", "tp", "ep", "efsdp")


def records_of(steps: Iterable[int], *, ranks: int, incarnation: int = 1, **parts: Any) -> NDArray[Any]:
    """Summaries of every rank of every step, by step and rank. parts: seconds, a number or one by rank; they make up the step."""
    numbers = list(steps)
    records = np.zeros((len(numbers), ranks), dtype=SUMMARY)
    records["step"] = np.array(numbers, dtype=np.uint32)[:, None]
    records["rank"] = np.arange(ranks)
    records["incarnation"] = incarnation
    seconds = {"forward": 0.02, "backward": 0.04, "optimizer": 0.005, "data": 0.002, "other": 0.001, **parts}
    for name, value in seconds.items():
        records[name] = value
    records["seconds"] = sum(np.asarray(value, dtype=float) for value in seconds.values())
    records["start"] = time.time() + 0.1 * records["step"]
    records["tokens"], records["bytes"], records["memory"] = 1024, 4096, 1e9 + 1e7 * np.arange(ranks)
    return records.reshape(-1)


def append_records(run_dir: RunDir, records: NDArray[Any]) -> None:
    with run_dir.summaries.open("ab") as file:
        file.write(records.tobytes())


def append_seats(
    run_dir: RunDir, size: MeshSize, *, incarnation: int, host_ranks: int = 2, first_step: int = 1
) -> None:
    """A line of events/seats.jsonl: `host_ranks` ranks a host."""
    places = [coordinates(size, rank) for rank in range(size.world_size)]
    append_line(run_dir.seats, {
        "incarnation": incarnation, "mesh": {axis: getattr(size, axis) for axis in ("pp", "dp", "fsdp", "cp", "tp", "ep")},
        "hosts": [f"n{rank // host_ranks}" for rank in range(size.world_size)],
        "coordinates": {axis: [place[axis] for place in places] for axis in AXES},
        "first_step": first_step, "time": time.time(),
    })  # fmt: skip
