"""Which experts, or which slice of one, a rank of ep holds: one layout for every strategy, so that a switch moves nothing.

Flex (Tutel, MLSys'23, section 3.1): W ranks, E experts. With E >= W a rank holds a run of experts, in numbers as even as can
be. With E < W an expert is cut along its inner width into S = W / E slices, and rank p holds slice p mod S of expert p div S.
A weight that has no inner width, such as the bias of the last product, is held by all S ranks of its expert.

Runs are of *positions*. Whole experts may have an order: position q is that of expert `order[q]` (placement.py); without one
it is that of expert q. Rows travel by position, weights are known by expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainrt.errors import PlanError

Orders = Mapping[str, tuple[int, ...]]
"""Module of experts -> its order."""

NO_ORDERS: Orders = {}


@dataclass(frozen=True, slots=True)
class Sliced:
    """How a weight of stacked experts is cut: of those along `dim` of an expert, slice s has the indices in `runs[s]`.

    runs: (first, number), as many indices in every slice, none in two. Where `dim` is 0, experts are flattened with their rows.
    """

    dim: int
    runs: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def width(self) -> int:
        """How many indices a slice has."""
        return sum(number for _, number in self.runs[0])


Slices = Mapping[str, Sliced]
"""Weight by its name in a module of experts -> how it is cut. One that is not named is in every slice of its expert."""

WHOLE: Slices = {}


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """E experts over W ranks. Raises PlanError where W > E is no multiple of E, or the order is none of whole experts."""

    experts: int
    ranks: int
    order: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.ranks > self.experts and self.ranks % self.experts:
            allowed = [n for n in range(1, self.ranks + 1) if n <= self.experts or n % self.experts == 0]
            raise PlanError(
                f"parallel.ep = {self.ranks} is more than the {self.experts} experts and no multiple of them; "
                f"allowed: {', '.join(map(str, allowed))}"
            )
        if self.order is not None and (self.slices > 1 or sorted(self.order) != list(range(self.experts))):
            raise PlanError(
                f"{list(self.order)} is no order of {self.experts} experts over parallel.ep = {self.ranks}; allowed: each "
                f"expert once, where a rank holds whole experts"
            )

    @property
    def slices(self) -> int:
        """S: into how many slices an expert is cut."""
        return max(1, self.ranks // self.experts)

    def first(self, rank: int) -> int:
        """The first position that a rank holds, whole or a slice of it."""
        return rank // self.slices if self.slices > 1 else rank * self.experts // self.ranks

    @property
    def firsts(self) -> NDArray[np.int64]:
        """The first position of each rank, where no expert is cut."""
        return np.arange(self.ranks) * self.experts // self.ranks

    def seat(self, position: int) -> tuple[int, int]:
        """The rank that holds a position, and its index there, where no expert is cut."""
        rank = ((position + 1) * self.ranks - 1) // self.experts
        return rank, position - self.first(rank)

    def here(self, rank: int) -> int:
        """How many experts a rank holds."""
        return 1 if self.slices > 1 else self.first(rank + 1) - self.first(rank)

    def held(self, rank: int) -> tuple[int, ...]:
        """The experts at a rank's positions."""
        positions = range(self.first(rank), self.first(rank) + self.here(rank))
        return tuple(positions if self.order is None else (self.order[position] for position in positions))

    def runs(self, rank: int, rows: int = 1) -> tuple[tuple[int, int], ...]:
        """(first, number) of the indices that a rank holds along experts, each of which has so many rows; as it holds them."""
        runs: list[tuple[int, int]] = []
        for expert in self.held(rank):
            if runs and sum(runs[-1]) == expert:
                runs[-1] = runs[-1][0], runs[-1][1] + 1
            else:
                runs.append((expert, 1))
        return tuple((first * rows, number * rows) for first, number in runs)

    def inner_run(self, rank: int, width: int) -> tuple[int, int]:
        """(first, number) of the indices that a rank holds along an inner width."""
        piece = width // self.slices
        return rank % self.slices * piece, piece

    def owner(self, expert: int) -> int:
        """The rank that holds an expert, where none is cut."""
        return self.seat(expert if self.order is None else self.order.index(expert))[0]

    @property
    def widths(self) -> list[int]:
        """Of how many ranks the groups are that gather slices, or share what is not cut."""
        return [self.slices // r for r in self.choices if r]

    @property
    def choices(self) -> list[int]:
        """The r that are possible: 0 gathers experts, r >= 1 sends each row to r groups of S / r ranks."""
        return [0, *(r for r in range(1, self.slices + 1) if self.slices % r == 0)]
