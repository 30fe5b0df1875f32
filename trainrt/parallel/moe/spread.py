"""A mixture whose experts are spread over ranks: what one call of it does, whoever's experts they are.

Legend: N rows, D width, E experts, W ranks of ep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from trainrt.parallel.collectives import CopyToGroup, ReduceFromGroup
from trainrt.parallel.mesh import ExpertGroups
from trainrt.parallel.moe.exchange import Counts, Exchange, gather_counts
from trainrt.parallel.moe.flex import Beside, GatherSlices, Piece, Way
from trainrt.parallel.moe.hot import Lend, hottest, places_of
from trainrt.parallel.moe.layout import ExpertLayout
from trainrt.parallel.moe.strategy import Chooser, Strategy


@dataclass(frozen=True, slots=True)
class Held:
    """The experts of a module as this rank holds them: what they compute, their weights, along which dimension slices cut these.

    besides: what is computed while rows are on their way.
    """

    pieces: Sequence[Piece]
    weights: Sequence[Tensor]
    inner: Sequence[int]
    besides: Sequence[Beside] = ()


@dataclass(frozen=True, slots=True)
class Spread:
    """Over which ranks experts are spread, and who says how rows or weights travel.

    tp: the ranks that call with the same rows. recomputed: what experts compute is not kept for backward but computed again,
    as where layers are.
    """

    layout: ExpertLayout
    groups: ExpertGroups
    tp: dist.ProcessGroup | None
    chooser: Chooser
    recomputed: bool

    def mix(self, x_ND: Tensor, count_E: Tensor, held: Held) -> Tensor:
        """Rows sorted by expert through their experts."""
        if self.tp is None:
            return self._by_position(x_ND, count_E, held)
        # Each of the ranks with the same rows sends its share of them.
        tp = self.tp
        expert_N = torch.arange(len(count_E), device=count_E.device).repeat_interleave(count_E)
        mine_N = torch.arange(tp.rank(), len(expert_N), tp.size(), device=count_E.device)
        count_E = torch.bincount(expert_N[mine_N], minlength=len(count_E))
        x_ND = CopyToGroup.apply(x_ND, tp)
        y_ND = self._by_position(x_ND[mine_N], count_E, held)
        whole_ND = y_ND.new_zeros(len(x_ND), *y_ND.shape[1:])
        return ReduceFromGroup.apply(whole_ND.index_copy(0, mine_N, y_ND), tp)

    def _by_position(self, x_ND: Tensor, count_E: Tensor, held: Held) -> Tensor:
        """Rows sorted by expert become rows sorted by position, and come back as they were."""
        if self.layout.order is None:
            return self._timed(x_ND, count_E, held)
        expert_Q = torch.tensor(self.layout.order, device=count_E.device)
        row_N = expert_Q.argsort().repeat_interleave(count_E).argsort(stable=True)
        y_ND = self._timed(x_ND[row_N], count_E[expert_Q], held)
        return torch.empty_like(y_ND).index_copy(0, row_N, y_ND)

    def _timed(self, x_ND: Tensor, count_E: Tensor, held: Held) -> Tensor:
        count_WE = gather_counts(count_E, self.groups.ep, agreed=self.chooser.agreed)
        choice = self.chooser.choose(count_WE)

        def compute(x_ND: Tensor) -> Tensor:
            return self._mixed(choice.strategy, x_ND, count_WE, held)

        return compute(x_ND) if choice.times is None else choice.times.take(compute, x_ND)

    def _mixed(self, strategy: Strategy, x_ND: Tensor, count_WE: Counts, held: Held) -> Tensor:
        layout, groups = self.layout, self.groups
        if strategy.r == 0:
            for beside in held.besides:
                beside.result = beside.compute(*beside.tensors)
            parts = zip(held.weights, held.inner, strict=True)
            whole = [_gathered(weight, dim, layout, groups.ep) for weight, dim in parts]
            return through(held.pieces, x_ND, count_WE[groups.ep.rank()].tolist(), whole)
        slices = groups.neighbours[layout.slices // strategy.r]
        if slices is not None:
            parts = zip(held.weights, held.inner, strict=True)
            held = replace(held, weights=[GatherSlices.apply(weight, dim, slices) for weight, dim in parts])
        if strategy.hot:
            return self._with_hot(strategy, x_ND, count_WE, held)
        return self._travelled(strategy, x_ND, count_WE, held)

    def _with_hot(self, strategy: Strategy, x_ND: Tensor, count_WE: Counts, held: Held) -> Tensor:
        """Rows of the hottest experts stay here, and are computed while the others travel."""
        ep, hot = self.groups.ep, hottest(count_WE, strategy.hot)
        mine_E, rest_WE = count_WE[ep.rank()], count_WE.copy()
        rest_WE[:, hot] = 0
        lent = Lend.apply(places_of(hot, self.layout), self.layout.here(ep.rank()), ep, *held.weights)
        stays = np.isin(np.arange(len(mine_E)), hot).repeat(mine_E)
        stay_N, go_N = (torch.from_numpy(np.flatnonzero(rows)).to(x_ND.device) for rows in (stays, ~stays))
        here = Beside(partial(_through, held.pieces, mine_E[hot].tolist()), x_ND[stay_N], *lent)
        gone_ND = self._travelled(strategy, x_ND[go_N], rest_WE, replace(held, besides=[*held.besides, here]))
        assert here.result is not None
        return torch.zeros_like(x_ND).index_copy(0, go_N, gone_ND).index_copy(0, stay_N, here.result)

    def _travelled(self, strategy: Strategy, x_ND: Tensor, count_WE: Counts, held: Held) -> Tensor:
        exchange = Exchange.plan(
            count_WE, self.layout, self.groups, device=x_ND.device, r=strategy.r, hierarchical=strategy.hierarchical
        )
        degrees = strategy.degree, strategy.backward_degree
        way = Way(exchange, held.pieces, degrees, self.recomputed)
        if exchange.source is None:
            return way(x_ND, held.weights, held.besides)
        y_ND = way(x_ND[exchange.source], held.weights, held.besides)
        return torch.zeros_like(x_ND).index_add(0, exchange.source, y_ND)


def through(pieces: Sequence[Piece], x_ND: Tensor, counts: list[int], weights: Sequence[Tensor]) -> Tensor:
    """Rows sorted by expert through all pieces of their experts."""
    for piece in pieces:
        x_ND = piece.compute(x_ND, counts, [weights[i] for i in piece.weights])
    return x_ND


def _through(pieces: Sequence[Piece], counts: list[int], x_ND: Tensor, *weights: Tensor) -> Tensor:
    return through(pieces, x_ND, counts, weights)


def _gathered(held: Tensor, inner: int, layout: ExpertLayout, ep: dist.ProcessGroup) -> Tensor:
    """The weights of all experts, stacked, from what each rank holds; `inner` is the dimension that slices cut."""
    if layout.slices > 1:
        slices = GatherSlices.apply(held, 0, ep).unflatten(0, (layout.experts, layout.slices))
        return slices.movedim(1, inner).flatten(inner, inner + 1)
    rows = len(held) // layout.here(ep.rank())
    most = max(layout.here(rank) for rank in range(layout.ranks)) * rows
    short = most - len(held)
    stacked = GatherSlices.apply(torch.cat((held, held.new_zeros(short, *held.shape[1:]))) if short else held, 0, ep)
    if layout.experts * rows == most * layout.ranks:
        return stacked
    there = [rank * most + i for rank in range(layout.ranks) for i in range(layout.here(rank) * rows)]
    return stacked[torch.tensor(there, device=held.device)]
