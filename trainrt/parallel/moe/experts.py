"""Expert feed-forward networks: stacked SwiGLU weights, applied to rows sorted by expert.

Under expert parallelism each rank holds some experts, or a slice of one, and rows travel to them and back, or the weights to
the rows, inside `forward`: FSDP gathers these weights around the whole exchange.

Legend: N rows, D width, F inner width, E experts of the layer, L experts here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from trainrt.parallel.collectives import CopyToGroup, ReduceFromGroup
from trainrt.parallel.moe.exchange import Exchange
from trainrt.parallel.moe.flex import GatherSlices, Travel
from trainrt.parallel.moe.form import Form
from trainrt.parallel.moe.layout import ExpertLayout
from trainrt.parallel.moe.strategy import Strategy


@dataclass(frozen=True, slots=True)
class Spread:
    """Over which ranks experts are spread, and how rows or weights travel. `slices`: the S / r ranks that gather slices."""

    layout: ExpertLayout
    strategy: Strategy
    ep: dist.ProcessGroup
    slices: dist.ProcessGroup | None
    tp: dist.ProcessGroup | None


class Experts(nn.Module):
    """E SwiGLU networks. `forward(rows, counts)` takes rows sorted by expert, counts of length E."""

    INNER = {"gate_proj": 1, "up_proj": 1, "down_proj": 2}  # noqa: RUF012
    """The dimension of each weight along which an expert is cut into slices."""

    def __init__(self, *, experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Parameter(torch.empty(experts, intermediate_size, hidden_size))
        self.up_proj = nn.Parameter(torch.empty(experts, intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden_size, intermediate_size))
        self.number = experts
        self.spread: Spread | None = None

    def forward(self, x_ND: Tensor, count_E: Tensor) -> Tensor:
        weights = [local(getattr(self, name)) for name in self.INNER]
        if self.spread is None:
            return feed_forward(x_ND, count_E.tolist(), weights)
        if self.spread.tp is None:
            return self._spread(self.spread, x_ND, count_E, weights)
        # Tensor-parallel ranks hold the same rows: each sends its share of them.
        tp = self.spread.tp
        expert_N = torch.arange(len(count_E), device=count_E.device).repeat_interleave(count_E)
        mine_N = torch.arange(tp.rank(), len(expert_N), tp.size(), device=count_E.device)
        count_E = torch.bincount(expert_N[mine_N], minlength=len(count_E))
        x_ND = CopyToGroup.apply(x_ND, tp)
        y_ND = self._spread(self.spread, x_ND[mine_N], count_E, weights)
        return ReduceFromGroup.apply(torch.zeros_like(x_ND).index_copy(0, mine_N, y_ND), tp)

    def _spread(self, spread: Spread, x_ND: Tensor, count_E: Tensor, weights: list[Tensor]) -> Tensor:
        layout, strategy = spread.layout, spread.strategy
        if strategy.r == 0:
            whole = [_gathered(w, dim, layout, spread.ep) for w, dim in zip(weights, self.INNER.values(), strict=True)]
            return feed_forward(x_ND, count_E.tolist(), whole)
        if spread.slices is not None:
            inner = zip(weights, self.INNER.values(), strict=True)
            weights = [GatherSlices.apply(weight, dim, spread.slices) for weight, dim in inner]
        exchange = Exchange.plan(count_E, layout, spread.ep, r=strategy.r)
        if exchange.source is None:
            return Travel.apply(exchange, feed_forward, strategy, x_ND, *weights)
        y_ND = Travel.apply(exchange, feed_forward, strategy, x_ND[exchange.source], *weights)
        return torch.zeros_like(x_ND).index_add(0, exchange.source, y_ND)


def feed_forward(x_ND: Tensor, counts: list[int], weights: Sequence[Tensor]) -> Tensor:
    """SwiGLU (arXiv 2002.05202) of rows sorted by expert, with stacked weights of as many experts."""
    gate_LFD, up_LFD, down_LDF = weights
    outputs = []
    for expert, rows_ND in enumerate(x_ND.split(counts)):
        inner = F.silu(F.linear(rows_ND, gate_LFD[expert])) * F.linear(rows_ND, up_LFD[expert])
        outputs.append(F.linear(inner, down_LDF[expert]))
    return torch.cat(outputs)


def _gathered(held: Tensor, inner: int, layout: ExpertLayout, ep: dist.ProcessGroup) -> Tensor:
    """The weights of all experts, stacked, from what each rank holds; `inner` is the dimension that slices cut."""
    if layout.slices > 1:
        slices = GatherSlices.apply(held, 0, ep).unflatten(0, (layout.experts, layout.slices))
        return slices.movedim(1, inner).flatten(inner, inner + 1)
    most = max(layout.here(rank) for rank in range(layout.ranks))
    short = most - len(held)
    stacked = GatherSlices.apply(torch.cat((held, held.new_zeros(short, *held.shape[1:]))) if short else held, 0, ep)
    if layout.experts == most * layout.ranks:
        return stacked
    there = [rank * most + i for rank in range(layout.ranks) for i in range(layout.here(rank))]
    return stacked[torch.tensor(there, device=held.device)]


def layout_of(module: nn.Module, form: Form | None, ranks: int) -> ExpertLayout:
    """How a module of experts lies over ranks; without a form it is one of ours. Raises PlanError."""
    if form is not None:
        return ExpertLayout(form.experts, ranks)
    assert isinstance(module, Experts)
    return ExpertLayout(module.number, ranks)


def local(parameter: Tensor) -> Tensor:
    """The part of a parameter that this rank computes with."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
