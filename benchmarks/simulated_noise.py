"""How much the same work varies: log-residuals over peers, lengths of documents, stalls, to draw from for simulated ranks.

Residuals have three sources: the public straggler trace of the OSDI'25 study (TRAINRT_TRACES names its directory, pyarrow
reads it), a file of residuals of real runs, or else quantiles of the trace's residuals, which stand below as figures.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

TRACES = "TRAINRT_TRACES"
POOL = 1 << 16

PERCENTS = (0, 0.1, 1, 2.5, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 97.5, 99, 99.9, 100)
PERCENTILES = (
    -0.0698, -0.0557, -0.0385, -0.0337, -0.0283, -0.0234, -0.0146, -0.0075, -0.0029, 0.0, 0.0023, 0.0051, 0.0083, 0.0131,
    0.0183, 0.0230, 0.0291, 0.0666, 0.1629,
)  # fmt: skip
"""Of 2,048 computations of a microbatch (forward and backward) on 8 GPUs: log of the seconds over the median of the peers of a
step, less what is the rank's and the microbatch's own. Standard deviation 0.0149; microbatches of a step are independent."""


def residuals(file: Path | None = None) -> NDArray[np.float32]:
    """Log-residuals of a computation of a microbatch, to draw from: (POOL,), of mean 0, in no order.

    file: text or .npy, one residual a line, of a step's computation of a microbatch.
    """
    if file is not None:
        return _pool(np.load(file) if file.suffix == ".npy" else np.loadtxt(file))
    return _of_traces(os.environ.get(TRACES, ""))


@cache
def _of_traces(directory: str) -> NDArray[np.float32]:
    table = _trace(Path(directory)) if directory else None
    if table is None:
        even = (np.arange(POOL) + 0.5) / POOL * 100
        return _pool(np.interp(even, PERCENTS, PERCENTILES))
    return _pool(np.concatenate([over_peers(table, kind) for kind in ("forward-compute", "backward-compute")]))


def _pool(found: NDArray[Any]) -> NDArray[np.float32]:
    drawn = np.random.default_rng(0).permutation(np.resize(found, POOL))
    return (drawn - drawn.mean()).astype(np.float32)


def _trace(directory: Path) -> dict[str, NDArray[Any]] | None:
    """Columns of the first trace there; None where there is none, or nothing that reads parquet."""
    try:
        from pyarrow import parquet
    except ImportError:
        return None
    files = sorted(directory.glob("*.parquet"))
    if not files:
        return None
    names = ("step", "stage", "dp_rank", "mb_id", "optype", "duration")
    table = parquet.read_table(files[0], columns=list(names))
    return {name: np.array(table[name].to_pylist()) for name in names}


def over_peers(table: dict[str, NDArray[Any]], kind: str) -> NDArray[np.float64]:
    """Log-residuals of an operation, less the medians of the peers of a step and stage, of the rank, and of the microbatch."""
    rows = table["optype"] == kind
    axes = [np.unique(table[name][rows], return_inverse=True) for name in ("step", "stage", "dp_rank", "mb_id")]
    logs = np.full([len(values) for values, _ in axes], np.nan)
    logs[tuple(where for _, where in axes)] = np.log(table["duration"][rows])
    for beside in ((2, 3), (0, 3), (0, 2)):
        logs = logs - np.nanmedian(logs, axis=beside, keepdims=True)
    return logs[~np.isnan(logs)]


def packed_squares(tokens: int, random: np.random.Generator, *, packs: int = 4096) -> NDArray[np.float64]:
    """Sums of squared lengths of documents of heavy-tailed (log-normal) lengths that fill packs of so many tokens, (packs,)."""
    lengths = np.minimum(np.exp(random.normal(np.log(tokens / 16), 1.4, packs * 64)), tokens)
    ends = np.cumsum(lengths)
    cuts = np.arange(1, packs + 1) * float(tokens)
    edges = np.unique(np.concatenate([ends[ends < cuts[-1]], cuts]))
    pieces = np.diff(edges, prepend=0.0)
    pack = np.minimum(((edges - 1e-6) // tokens).astype(np.int64), packs - 1)
    return np.bincount(pack, weights=pieces**2, minlength=packs)


def one_off(random: np.random.Generator, shape: tuple[int, ...], rate: float) -> NDArray[np.float64]:
    """Stalls of 10 ms to 1 s, evenly in their logarithm, at a rate for each entry."""
    long = np.exp(random.uniform(np.log(0.01), np.log(1.0), shape))
    return np.where(random.random(shape) < rate, long, 0.0)
