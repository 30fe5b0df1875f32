"""Who holds which index along a split dimension."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

ALL = -1
"""The owner of an index that every rank holds."""


class Owners:
    """The owner (a rank, or ALL) of each index along one dimension. Equal ones are one object: compare with `is`."""

    __slots__ = ("_held", "array", "ranks")
    _known: dict[tuple[int, bytes], Owners] = {}  # noqa: RUF012

    array: NDArray[np.int32]
    ranks: int
    _held: dict[int, NDArray[np.int64]]

    def __new__(cls, array: NDArray[np.int32] | Sequence[int], ranks: int) -> Owners:
        array = np.ascontiguousarray(array, np.int32)
        key = (ranks, array.tobytes())
        known = cls._known.get(key)
        if known is None:
            known = cls._known[key] = super().__new__(cls)
            known.array, known.ranks = array, ranks
            known._held = {}
        return known

    def __len__(self) -> int:
        return len(self.array)

    def __reduce__(self) -> tuple[type[Owners], tuple[NDArray[np.int32], int]]:
        return Owners, (self.array, self.ranks)

    def held(self, rank: int) -> NDArray[np.int64]:
        """The indices that a rank holds, in order."""
        if rank not in self._held:
            self._held[rank] = np.flatnonzero((self.array == rank) | (self.array == ALL))
        return self._held[rank]

    def count(self, rank: int) -> int:
        return len(self.held(rank))

    @property
    def shared(self) -> bool:
        """Whether every rank holds every index."""
        return bool((self.array == ALL).all())

    @property
    def disjoint(self) -> bool:
        """Whether no index is held twice."""
        return not bool((self.array == ALL).any())

    def runs(self, rank: int) -> tuple[tuple[int, int], ...]:
        """What a rank holds as runs (start, length) of neighbouring indices."""
        held = self.held(rank)
        if not len(held):
            return ()
        breaks = np.flatnonzero(np.diff(held) != 1) + 1
        return tuple((int(run[0]), len(run)) for run in np.split(held, breaks))


@dataclass(frozen=True, slots=True)
class Split:
    """One dimension of a parameter and the owner of each index of it."""

    dim: int
    owners: Owners


Runs = tuple[tuple[tuple[int, int], ...], ...]
"""For each rank, runs (first index, length)."""


def owners_of(runs: Runs) -> Owners:
    """The owners that runs of indices by rank say; an index in several is everybody's."""
    size = max(first + n for rank in runs for first, n in rank)
    array = np.full(size, ALL - 1, np.int32)
    for rank, held in enumerate(runs):
        for first, n in held:
            part = array[first : first + n]
            part[:] = np.where(part == ALL - 1, rank, ALL)
    return Owners(array, len(runs))


@lru_cache(maxsize=4096)
def agree(a: Owners, b: Owners) -> Owners | None:
    """Owners under which both can be read where they are held, or None."""
    if a is b:
        return a
    if len(a) != len(b) or bool(((a.array != b.array) & (a.array != ALL) & (b.array != ALL)).any()):
        return None
    return Owners(np.where(a.array == ALL, b.array, a.array), a.ranks)


@lru_cache(maxsize=4096)
def reshaped(owners: Owners, dim: int, before: tuple[int, ...], after: tuple[int, ...]) -> tuple[int, Owners] | None:
    """The split of a tensor seen in another shape: (dimension, owners), or None where two dimensions would be split."""
    start, stop, first, last = _common_factor(dim, before, after)
    inner = [1] * (stop - start)
    inner[dim - start] = len(owners)
    spread = np.broadcast_to(owners.array.reshape(inner), before[start:stop]).reshape(after[first:last])
    for axis in range(last - first):
        line = np.moveaxis(spread, axis, 0).reshape(spread.shape[axis], -1)
        if bool((line == line[:, :1]).all()) and (spread.shape[axis] > 1 or last - first == 1):
            return first + axis, Owners(line[:, 0], owners.ranks)
    return None


def _common_factor(dim: int, before: tuple[int, ...], after: tuple[int, ...]) -> tuple[int, int, int, int]:
    """The smallest runs of dimensions around `dim`, before and after, that hold the same elements."""
    i = j = 0
    while True:
        start, first = i, j
        a, b = before[i], after[j] if j < len(after) else 1
        i, j = i + 1, j + 1
        while a != b:
            if a < b:
                a, i = a * before[i], i + 1
            else:
                b, j = b * after[j], j + 1
        # Dimensions of length one at the end of a run belong to it where the split one is among them.
        if start <= dim < i:
            return start, i, first, min(j, len(after))
