"""Groups of channels dealt to ranks: runs of equal length, in the order of channels, for each tensor by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from trainrt.parallel.planner.labels import Conflict
from trainrt.parallel.planner.weights import Indices
from trainrt.parallel.sharded.owners import ALL


def deal(
    groups: Mapping[str, Indices], side_by_side: Sequence[Indices], ranks: int, *, count: int
) -> NDArray[np.int32]:
    """The rank of each group; ALL for group 0.

    groups: of each cut parameter, the group of each index. side_by_side: groups that lie in one activation; they are cut
    together, whatever else shares their parameter (flattened experts). Raises Conflict where there are too few of them, or
    heads that do not divide.
    """
    family = _families([found for found in side_by_side if len(found)], count)
    seen = np.zeros(count, bool)
    for found in side_by_side:
        seen[found] = True
    alone = [np.unique(group[(group != 0) & ~seen[group]]) for group in groups.values()]
    family = _families([*side_by_side, *alone], count) if any(len(found) for found in alone) else family
    rank = np.full(count, ALL, np.int32)
    names: dict[int, tuple[str, Indices]] = {}
    for name, group in groups.items():
        for one in np.unique(family[group[group != 0]]):
            names.setdefault(int(one), (name, group))
    members = np.unique(np.concatenate([group[group != 0] for group in groups.values()] or [np.zeros(0, np.int64)]))
    for one, (name, group) in names.items():
        inside = members[family[members] == one]
        if len(inside) < ranks:
            raise Conflict(
                f"{len(inside)} groups of channels that must stay together are fewer than {ranks} ranks ({name})"
            )
        if len(inside) % ranks and _blocks(group):
            divisors = [n for n in range(1, len(inside) + 1) if len(inside) % n == 0]
            raise Indivisible(f"the {len(inside)} heads of {name}; allowed: {', '.join(map(str, divisors))}")
        rank[inside] = np.arange(len(inside)) * ranks // len(inside)
    rank[0] = ALL
    return rank


class Indivisible(Exception):
    """Heads that a number of ranks does not divide; the text says which, and the numbers that do."""


def _families(together: Sequence[Indices], count: int) -> Indices:
    """A number for each group, the same for those that stand in one row."""
    edges = np.concatenate(
        [np.stack((found[:-1], found[1:]), 1) for found in together if len(found)] or [np.zeros((0, 2), np.int64)]
    )
    graph = coo_array((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), shape=(count, count))
    return connected_components(graph, directed=False)[1].astype(np.int64)


def _blocks(group: Indices) -> bool:
    """Whether neighbouring channels stay together: heads, where single channels may be dealt unevenly."""
    return bool(((group[1:] == group[:-1]) & (group[1:] != 0)).any())
