"""Where along each dimension of each parameter the elements of a weight tensor lie, without an array of their size.

A weight tensor is a parameter, a view of one, or what pointwise operators made of one. The index along a parameter's
dimension is a sum of contributions, one for each dimension of the tensor: enough for views, slices, transposes and
flattened experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from trainrt.parallel.planner.tape import Ref

Dim = tuple[str, int]
"""A parameter's name and one of its dimensions."""

Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Coordinate:
    """Index along a parameter's dimension: `base + sum(steps[i][k_i])` at position k."""

    base: int
    steps: tuple[Indices, ...]

    def varies(self, axis: int) -> bool:
        return bool(self.steps[axis].any())

    def grid(self) -> Indices:
        """The indices as an array that broadcasts to the tensor's shape (length 1 where they do not vary)."""
        total = np.full((1,) * len(self.steps), self.base, np.int64)
        for axis, step in enumerate(self.steps):
            if step.any():
                shape = [1] * len(self.steps)
                shape[axis] = -1
                total = total + step.reshape(shape)
        return total


@dataclass(frozen=True, slots=True)
class Weight:
    """What is known of a storage that holds weights. `lookup`: rows that were looked up by token or position."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    coordinates: dict[Dim, Coordinate]
    lookup: bool = False

    @classmethod
    def of_parameter(cls, name: str, ref: Ref) -> Weight:
        zeros = [np.zeros(n, np.int64) for n in ref.size]
        coordinates = {}
        for dim, n in enumerate(ref.size):
            steps = list(zeros)
            steps[dim] = np.arange(n)
            coordinates[name, dim] = Coordinate(0, tuple(steps))
        return cls(ref.size, ref.stride, coordinates)

    @property
    def parameters(self) -> set[str]:
        return {name for name, _ in self.coordinates}

    def seen_by(self, ref: Ref) -> dict[Dim, Coordinate]:
        """The coordinates along the dimensions of a view of the storage."""
        axes = [ref.offset + np.arange(n) * step for n, step in zip(ref.size, ref.stride, strict=True)]
        found = {}
        for key, coordinate in self.coordinates.items():
            base = int(self._at(coordinate, np.array([ref.offset]))[0])
            steps = tuple(self._at(coordinate, places) - base for places in axes)
            found[key] = Coordinate(base, steps)
        return found

    def _at(self, coordinate: Coordinate, places: Indices) -> Indices:
        """The index at positions of the storage."""
        total = np.full(len(places), coordinate.base, np.int64)
        for n, stride, steps in zip(self.size, self.stride, coordinate.steps, strict=True):
            if n > 1 and stride:
                total += steps[(places // stride) % n]
        return total

    def broadcast(self, ref: Ref, out: Ref) -> Weight:
        """The same weight in a new storage of the shape of `out`, which `ref` broadcasts to."""
        ahead = len(out.size) - len(ref.size)
        coordinates = {}
        for key, seen in self.seen_by(ref).items():
            steps = [np.zeros(n, np.int64) for n in out.size]
            for axis, step in enumerate(seen.steps):
                if ref.size[axis] == out.size[axis + ahead]:
                    steps[axis + ahead] = step
            coordinates[key] = Coordinate(seen.base, tuple(steps))
        return Weight(out.size, out.stride, coordinates, self.lookup)

    def picked(self, ref: Ref, out: Ref, axis: int, index: Indices) -> Weight:
        """Rows along `axis` chosen by a list of indices."""
        coordinates = {
            key: replace(seen, steps=(*seen.steps[:axis], seen.steps[axis][index], *seen.steps[axis + 1 :]))
            for key, seen in self.seen_by(ref).items()
        }
        return Weight(out.size, out.stride, coordinates, self.lookup)

    def looked_up(self, ref: Ref, out: Ref) -> Weight:
        """What an embedding gives: (..., width), of which only the width is known."""
        coordinates = {}
        for key, seen in self.seen_by(ref).items():
            if seen.varies(1):
                steps = [np.zeros(n, np.int64) for n in out.size]
                steps[-1] = seen.steps[1]
                coordinates[key] = Coordinate(seen.base, tuple(steps))
        return Weight(out.size, out.stride, coordinates, lookup=True)
