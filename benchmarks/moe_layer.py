"""The layer that `benchmarks.moe` measures, and the loads it is given; what runs on a rank.

Legend: W ranks, E experts, N rows of a rank, D width.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from trainrt.config import MeshSize
from trainrt.parallel.mesh import make_expert_groups
from trainrt.parallel.moe.experts import Experts
from trainrt.parallel.moe.layout import ExpertLayout
from trainrt.parallel.moe.parallel import spread_experts
from trainrt.parallel.moe.strategy import Chooser, Strategy

RANKS = 2
"""One on each host, where seconds count."""
PLACES = 2
"""Ranks on a host, where bytes count."""
DEGREES = (1, 2, 4, 8)
SKEWS = ("uniform", "zipf", "hot", "burst")
Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Shape:
    """E SwiGLU experts, float32."""

    experts: int
    width: int = 256
    inner: int = 512


@dataclass(frozen=True, slots=True)
class Load:
    """What one step brings. capacity: rows of a rank on average; counts: rows that each rank has for each expert (W, E)."""

    step: int
    capacity: int
    skew: str
    counts: tuple[tuple[int, ...], ...]

    @property
    def kind(self) -> str:
        return f"{self.capacity} {self.skew}"


def loads(shape: Shape, *, ranks: int, steps: int, capacities: tuple[int, ...], seed: int) -> list[Load]:
    """Every capacity under every skew in an order of its own, again and again; a function of the arguments alone."""
    draw = random.Random(seed)
    kinds = [(capacity, skew) for capacity in capacities for skew in SKEWS]
    order: list[tuple[int, str]] = []
    while len(order) < steps:
        order += draw.sample(kinds, len(kinds))
    return [
        Load(step, capacity, skew, _counts(shape.experts, ranks, capacity, skew, draw))
        for step, (capacity, skew) in enumerate(order[:steps])
    ]


def _counts(experts: int, ranks: int, capacity: int, skew: str, draw: random.Random) -> tuple[tuple[int, ...], ...]:
    """uniform; Zipf over experts; one expert of all takes nine rows of ten; one rank of all has four times the rows."""
    order = draw.sample(range(experts), experts)
    weights = [1.0] * experts
    if skew == "zipf":
        weights = [1 / (1 + place) for place in order]
    if skew == "hot" and experts > 1:
        weights = [9.0 * (experts - 1) if place == 0 else 1.0 for place in order]
    rows = [capacity] * ranks
    if skew == "burst":
        full = draw.randrange(ranks)
        rows = [capacity * ranks * (4 if rank == full else 1) // (ranks + 3) for rank in range(ranks)]
    return tuple(tuple(_shared(number, weights)) for number in rows)


def _shared(number: int, weights: list[float]) -> Iterator[int]:
    """Whole numbers in proportion to the weights; their sum is `number`."""
    before = 0
    for last in range(1, len(weights) + 1):
        until = round(number * sum(weights[:last]) / sum(weights))
        yield until - before
        before = until


def experts_of(shape: Shape) -> Experts:
    torch.manual_seed(0)
    experts = Experts(experts=shape.experts, hidden_size=shape.width, intermediate_size=shape.inner)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.02)
    return experts


def strategies(layout: ExpertLayout, degrees: tuple[int, ...] = DEGREES, *, hosts: bool = False) -> list[Strategy]:
    """All that are possible without hot experts. Without rows that travel there is nothing to cut into chunks."""
    ways = (False, True) if hosts else (False,)
    rs = [r for r in layout.choices if r]
    return [Strategy(0), *(Strategy(r, degree, degree, way) for r, degree, way in product(rs, degrees, ways))]


class Layer:
    """Experts that it spreads over all ranks: one set of weights under every strategy that their layout allows."""

    def __init__(self, experts: Experts) -> None:
        ranks, width = dist.get_world_size(), experts.gate_proj.shape[-1]
        self.experts, self.width, self.rank = experts, width, dist.get_rank()
        self.layout = ExpertLayout(experts.number, ranks)
        size, mesh = MeshSize(fsdp=ranks, ep=ranks), init_device_mesh("cpu", (ranks,))
        self.hosts = 1 < PLACES < ranks
        widths = sorted({self.layout.slices // r for r in self.layout.choices if r})
        groups = make_expert_groups(size, mesh, widths=widths, places=PLACES)
        spread_experts(nn.ModuleDict({"experts": experts}), {"experts": None}, mesh, groups)

    def use(self, chooser: Chooser) -> None:
        spread: Any = self.experts.spread
        self.experts.spread = replace(spread, chooser=chooser)

    def rows(self, load: Load) -> tuple[Tensor, Tensor]:
        """This rank's rows, sorted by expert, and how many each expert gets."""
        count_E = torch.tensor(load.counts[self.rank])
        draw = torch.Generator().manual_seed(load.step)
        return torch.randn(int(count_E.sum()), self.width, generator=draw), count_E

    def step(self, chooser: Chooser, x_ND: Tensor, count_E: Tensor) -> float:
        """Seconds of forward and backward."""
        self.use(chooser)
        self.experts.zero_grad(set_to_none=True)
        return timed(lambda x_ND: self.experts(x_ND, count_E), x_ND)[1]


def timed(run: Run, x_ND: Tensor) -> tuple[float, float]:
    """Seconds of forward, and of forward and backward, which all ranks begin together."""
    x_ND = x_ND.clone().requires_grad_()
    dist.barrier()
    start = time.perf_counter()
    y_ND = run(x_ND)
    forward = time.perf_counter()
    y_ND.backward(torch.ones_like(y_ND))
    return forward - start, time.perf_counter() - start
