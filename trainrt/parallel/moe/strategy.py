"""How a mixture is computed: which way rows or experts travel, in how many chunks, and over which hops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Protocol

from trainrt.config import JobConfig, MeshSize, MoeConfig
from trainrt.errors import PlanError
from trainrt.parallel.mesh import places_on_host
from trainrt.parallel.moe.exchange import Counts
from trainrt.parallel.moe.layout import ExpertLayout
from trainrt.parallel.moe.timing import Times

DEGREES = (1, 2, 4, 8, 16)
"""The numbers of chunks that are looked at where the config leaves them open."""


@dataclass(frozen=True, slots=True, order=True)
class Strategy:
    """r: 0 gathers experts, r >= 1 sends each row to r groups of ranks. degree, backward_degree: chunks on the way.

    hierarchical: rows go through the ranks of their own host first. hot: so many of the experts with most rows are lent to all
    ranks, and rows of these stay where they are.
    """

    r: int = 1
    degree: int = 1
    backward_degree: int = 1
    hierarchical: bool = False
    hot: int = 0

    def __str__(self) -> str:
        way = (", hierarchical" if self.hierarchical else "") + (f", {self.hot} hot" if self.hot else "")
        return f"r {self.r}, degree {self.degree}, backward degree {self.backward_degree}{way}"


PLAIN = Strategy()
"""One exchange in one piece."""


@dataclass(frozen=True, slots=True)
class Lattice:
    """The strategies that a job allows: those of a layout, and of hosts with `places` of its ranks each, less what the config
    fixes.

    apart: both degrees are looked at by themselves. Where they differ, experts are computed again for backward, so it is worth
    it where they are anyway.
    """

    layout: ExpertLayout
    places: int
    config: MoeConfig
    apart: bool = False

    @classmethod
    def of(cls, config: JobConfig, layout: ExpertLayout, size: MeshSize) -> Lattice:
        places = places_on_host(size.ep, config.cluster.workers_per_node)
        return cls(layout, places, config.moe, apart=config.model.activation_checkpointing)

    @property
    def hosts(self) -> bool:
        """Whether there are several of them, with several ranks each."""
        return 1 < self.places < self.layout.ranks

    def __iter__(self) -> Iterator[Strategy]:
        config = self.config
        rs = self.layout.choices if config.r == "auto" else [config.r]
        degrees: Sequence[int] = DEGREES if config.degree == "auto" else [config.degree]
        ways = {"auto": [False, True] if self.hosts else [False], "linear": [False], "hierarchical": [True]}
        if 0 in rs:
            # What is gathered has no chunks and no way.
            yield Strategy(0)
        hots = [0, 1] if config.hot_experts == "auto" else [config.hot_experts]
        # Slices of an expert are many ranks' already.
        hots = hots if self.layout.slices == 1 and self.layout.experts > 1 else [0]
        for r, degree, way, hot in product([r for r in rs if r], degrees, ways[config.all_to_all], hots):
            for backward in self._backward_degrees(degree):
                yield Strategy(r, degree, backward, way, hot)

    def _backward_degrees(self, degree: int) -> Sequence[int]:
        if self.config.backward_degree != "auto":
            return [self.config.backward_degree]
        return DEGREES if self.apart else [degree]

    def check(self) -> None:
        """Raises PlanError where the config asks for what the layout or the hosts do not allow."""
        r, layout = self.config.r, self.layout
        if r != "auto" and r not in layout.choices:
            raise PlanError(
                f"moe.r = {r} with {layout.experts} experts over parallel.ep = {layout.ranks}; "
                f'allowed: "auto", {", ".join(map(str, layout.choices))}'
            )
        if self.config.hot_experts not in ("auto", *range(layout.experts)):
            raise PlanError(f'moe.hot_experts = {self.config.hot_experts}; allowed: "auto", 0 to {layout.experts - 1}')
        if self.config.hot_experts not in ("auto", 0) and layout.slices > 1:
            raise PlanError(
                f"moe.hot_experts = {self.config.hot_experts} with {layout.experts} experts cut into slices over "
                f'parallel.ep = {layout.ranks}; allowed: "auto", 0'
            )
        if self.config.all_to_all == "hierarchical" and not self.hosts:
            raise PlanError(
                f'moe.all_to_all = "hierarchical" with parallel.ep = {layout.ranks}: it takes several hosts with several '
                f'ranks of ep on each (cluster.workers_per_node); allowed: "auto", "linear"'
            )


def check_listed(config: MoeConfig, name: str) -> None:
    """Raises PlanError where the config asks for what a list of experts, which is always gathered, does not have."""
    for key, allowed in (("r", ("auto", 0, 1)), ("degree", ("auto", 1)), ("backward_degree", ("auto", 1)),
                         ("all_to_all", ("auto", "linear")), ("hot_experts", ("auto", 0))):  # fmt: skip
        value = getattr(config, key)
        if value not in allowed:
            raise PlanError(
                f"moe.{key} = {value}: {name} is a list of modules, which all ranks gather; "
                f"allowed: {', '.join(map(str, allowed))}"
            )


@dataclass(frozen=True, slots=True)
class Choice:
    """A strategy for one call of a mixture, and where its times go; None: they are not taken."""

    strategy: Strategy
    times: Times | None = None


class Chooser(Protocol):
    """Says how a mixture is computed, the same on all ranks of ep: from the rows of all ranks for all experts.

    agreed: numbers on which what it says depends, the same on all ranks.
    """

    @property
    def agreed(self) -> Sequence[int]: ...

    def choose(self, count_WE: Counts) -> Choice: ...


@dataclass(frozen=True, slots=True)
class Fixed:
    """Always the same strategy."""

    strategy: Strategy = PLAIN

    @property
    def agreed(self) -> tuple[int, ...]:
        s = self.strategy
        return s.r, s.degree, s.backward_degree, int(s.hierarchical), s.hot

    def choose(self, count_WE: Counts) -> Choice:
        return Choice(self.strategy)
