"""Who is slow: self time (a step less the time spent blocked on others) by host and rank.

A rank that waits looks as slow as the one it waits for; its self time does not.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from trainrt.diagnostics.reader import RunReader
from trainrt.diagnostics.table import StepTable

WINDOW_STEPS = 20


def heatmap(reader: RunReader, *, window: int = WINDOW_STEPS) -> dict[str, Any]:
    """Median self, waiting and step seconds of each rank over its last steps, and the ratio to the median rank."""
    table = reader.table()
    cells = [] if table is None else _cells(table.last(window))
    typical = float(np.median([cell["self_seconds"] for cell in cells])) if cells else 0.0
    for cell in cells:
        cell["ratio"] = cell["self_seconds"] / typical if typical else 1.0
    hosts = sorted({cell["host"] for cell in cells})
    return {"window_steps": window, "median_self_seconds": typical, "cells": cells, "hosts": hosts}


def _cells(table: StepTable) -> list[dict[str, Any]]:
    """One of each rank that was heard."""
    waiting = sum(table.communication.values(), np.zeros_like(table.seconds))
    heard = ~np.isnan(table.seconds)
    columns = {"self_seconds": table.seconds - waiting, "waiting_seconds": waiting, "seconds": table.seconds}
    return [
        {
            "rank": rank, "host": table.roles.hosts[table.roles.host[rank]],
            **{name: float(np.nanmedian(values[:, rank])) for name, values in columns.items()},
            "steps": int(heard[:, rank].sum()),
        }
        for rank in range(table.roles.ranks) if heard[:, rank].any()
    ]  # fmt: skip


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
