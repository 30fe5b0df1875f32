"""Who is slow: self time (a step less the time spent blocked on others) by host and rank.

A rank that waits looks as slow as the one it waits for; its self time does not.
"""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median
from typing import Any

from trainrt.diagnostics.reader import RunReader

WINDOW_STEPS = 20


def heatmap(reader: RunReader, *, window: int = WINDOW_STEPS) -> dict[str, Any]:
    """Median self, waiting and step seconds of each rank over its last steps, and the ratio to the median rank."""
    cells = []
    last = _last_incarnation(reader)
    for rank, lines in sorted(reader.events.items()):
        recent = [line for line in lines if line["incarnation"] == last][-window:]
        if recent:
            cells.append(
                {
                    "rank": rank,
                    "host": recent[-1]["node"],
                    "self_seconds": median(line["self_seconds"] for line in recent),
                    "waiting_seconds": median(line["waiting_seconds"] for line in recent),
                    "seconds": median(line["seconds"] for line in recent),
                    "steps": len(recent),
                }
            )
    typical = median([cell["self_seconds"] for cell in cells]) if cells else 0.0
    for cell in cells:
        cell["ratio"] = cell["self_seconds"] / typical if typical else 1.0
    return {"window_steps": window, "median_self_seconds": typical, "cells": cells, "hosts": _hosts(cells)}


def _last_incarnation(reader: RunReader) -> int:
    return max((line["incarnation"] for lines in reader.events.values() for line in lines), default=0)


def _hosts(cells: Iterable[dict[str, Any]]) -> list[str]:
    return sorted({cell["host"] for cell in cells})


def timeline(reader: RunReader, step: int | None = None) -> dict[str, Any]:
    """The events of all ranks of one step (the last one that all have, if none is named), on one clock."""
    steps = reader.steps()
    if step is None and steps:
        by_rank = [{line["step"] for line in lines} for lines in reader.events.values() if lines]
        common = set.intersection(*by_rank) if by_rank else set()
        step = max(common, default=steps[-1])
    ranks = []
    for rank, lines in sorted(reader.events.items()):
        found = [line for line in lines if line["step"] == step]
        if found:
            ranks.append({"rank": rank, "host": found[-1]["node"], **found[-1]})
    start = min((line["time"] for line in ranks), default=0.0)
    for line in ranks:
        line["offset_seconds"] = line["time"] - start
    return {
        "step": step,
        "first_step": steps[0] if steps else None,
        "last_step": steps[-1] if steps else None,
        "ranks": ranks,
    }
