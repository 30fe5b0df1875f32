"""Sequence parallelism: between two split regions each rank holds some positions of the activations (arXiv 2205.05198).

What the first region would sum for all is summed for each rank's positions only (reduce-scatter), norms, dropout and
residuals run on those, and the next region gathers all positions: the same bytes as one all-reduce, less memory.

Positions are known from the lookups of token numbers, (samples, positions), that a model begins with.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from torch import Tensor

from trainrt.parallel.sharded.collectives import GatherRows, ReduceFromGroup, ScatterSum
from trainrt.parallel.sharded.operands import is_split, wrapped
from trainrt.parallel.sharded.owners import Owners
from trainrt.parallel.sharded.tensor import Axis, Sharded


def looked_up(axis: Axis, index: Tensor) -> None:
    """Take notice of a lookup: activations of these samples and positions may be scattered from here on."""
    if axis.sequence and index.ndim == 2 and index.shape[1] % axis.ranks == 0:
        axis.positions.add((index.shape[0], index.shape[1]))


def total(axis: Axis, partial: Tensor) -> Tensor:
    """The sum over ranks of (samples, positions, width) or (rows, width): scattered where positions are known, else whole."""
    found = _rows(axis, partial)
    if found is None:
        return ReduceFromGroup.apply(partial, axis.group)
    dim, owners = found
    axis.scattered += 1
    scattered: Tensor = wrapped(axis, ScatterSum.apply(partial, dim, owners, axis.group), dim, owners)
    return scattered


def _rows(axis: Axis, x: Tensor) -> tuple[int, Owners] | None:
    """The dimension along which activations are scattered, and by whom."""
    for samples, positions in axis.positions:
        if x.ndim == 3 and tuple(x.shape[:2]) == (samples, positions):
            return 1, _in_runs(axis.ranks, positions, 1)
        if x.ndim == 2 and x.shape[0] == samples * positions:
            return 0, _in_runs(axis.ranks, positions, samples)
    return None


@lru_cache(maxsize=64)
def _in_runs(ranks: int, positions: int, samples: int) -> Owners:
    """Of every sample each rank has one run of positions."""
    return Owners(np.tile(np.arange(ranks, dtype=np.int32).repeat(positions // ranks), samples), ranks)


def split_by_rows(x: Any, *, last: int = 1) -> bool:
    """Whether each rank holds some rows: it is split along another dimension than the `last` ones."""
    return is_split(x) and x.along < x.ndim - last and len({x.owners.count(rank) for rank in range(x.axis.ranks)}) == 1


def whole_rows(axis: Axis, x: Sharded) -> Sharded:
    """All rows of a tensor split by rows, for use by split computation; the same one often feeds q, k and v."""

    def gather() -> Tensor:
        made: Tensor = GatherRows.apply(x.local, x.along, x.owners, axis.group)
        return made

    return Sharded(axis.remembered(x, gather), axis, partial=True)
