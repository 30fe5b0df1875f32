"""A mixture whose experts are spread over ranks: what one call of it does, whoever's experts they are.

Legend: N rows, D width, E experts, W ranks of ep.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from trainrt.events import ring
from trainrt.parallel.collectives import CopyToGroup, ReduceFromGroup
from trainrt.parallel.mesh import ExpertGroups
from trainrt.parallel.moe.exchange import Counts, Exchange, gather_counts
from trainrt.parallel.moe.flex import Beside, GatherSlices, Piece, Way
from trainrt.parallel.moe.hot import Lend, hottest
from trainrt.parallel.moe.layout import ExpertLayout, Sliced, Slices
from trainrt.parallel.moe.strategy import Chooser, Strategy


@dataclass(frozen=True, slots=True)
class Held:
    """The experts of a module as this rank holds them: what they compute, their weights, and the names of these.

    besides: what is computed while rows are on their way.
    """

    pieces: Sequence[Piece]
    weights: Sequence[Tensor]
    names: Sequence[str]
    besides: Sequence[Beside] = ()


@dataclass(frozen=True, slots=True)
class Spread:
    """Over which ranks experts are spread, and who says how rows or weights travel.

    slices: how weights are cut. tp: the ranks that call with the same rows. recomputed: what experts compute is not kept for
    backward but computed again, as where layers are.
    """

    layout: ExpertLayout
    slices: Slices
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
        mine_N = torch.arange(len(expert_N), device=count_E.device)[tp.rank() :: tp.size()]
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

        return compute(x_ND) if choice.times is None else choice.times.take(compute, x_ND, held.weights)

    def _mixed(self, strategy: Strategy, x_ND: Tensor, count_WE: Counts, held: Held) -> Tensor:
        parts = list(zip(held.names, held.weights, strict=True))
        if strategy.r == 0:
            for beside in held.besides:
                beside.result = beside.compute(*beside.tensors)
            gather = self._all_slices if self.layout.slices > 1 else self._all_experts
            whole = [gather(name, weight) for name, weight in parts]
            return through(held.pieces, x_ND, count_WE[self.groups.ep.rank()].tolist(), whole)
        if self.layout.slices > 1:
            held = replace(held, weights=[self._some_slices(name, weight, strategy.r) for name, weight in parts])
        if strategy.hot:
            return self._with_hot(strategy, x_ND, count_WE, held)
        return self._travelled(strategy, x_ND, count_WE, held)

    def _with_hot(self, strategy: Strategy, x_ND: Tensor, count_WE: Counts, held: Held) -> Tensor:
        """Rows of the hottest experts stay here, and are computed while the others travel."""
        ep, hot = self.groups.ep, hottest(count_WE, strategy.hot)
        mine_E, rest_WE = count_WE[ep.rank()], count_WE.copy()
        rest_WE[:, hot] = 0
        seats = [self.layout.seat(position) for position in hot]
        lent = Lend.apply(seats, self.layout.here(ep.rank()), ep, *held.weights)
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

    def _some_slices(self, name: str, held: Tensor, r: int) -> Tensor:
        """The part of a weight with which one of the r groups of an expert's ranks computes."""
        layout, sliced = self.layout, self.slices.get(name)
        if sliced is None:
            # What the groups compute is added up, and this is to be in the sum once.
            return self._shared(held) / r
        width = layout.slices // r
        group = self.groups.neighbours[width]
        if group is None:
            return held
        first = self.groups.ep.rank() % layout.slices // width * width
        return _in_order(GatherSlices.apply(held, sliced.dim, group), sliced, sliced.dim, range(first, first + width))

    def _all_slices(self, name: str, held: Tensor) -> Tensor:
        """A weight of all experts, from the slices of every rank."""
        by_slice, sliced = (self.layout.experts, self.layout.slices), self.slices.get(name)
        if sliced is None:
            shared = GatherSlices.apply(self._shared(held), 0, self.groups.ep)
            return shared.unflatten(0, (*by_slice, -1))[:, 0].flatten(0, 1)
        flattened = sliced.dim == 0
        dim = 1 if flattened else sliced.dim
        slices = GatherSlices.apply(held.unsqueeze(0) if flattened else held, 0, self.groups.ep).unflatten(0, by_slice)
        whole = _in_order(slices.movedim(1, dim).flatten(dim, dim + 1), sliced, dim, range(self.layout.slices))
        return whole.flatten(0, 1) if flattened else whole

    def _shared(self, held: Tensor) -> Tensor:
        """A weight that all ranks of an expert hold, whose gradients from them are to stay the same."""
        return CopyToGroup.apply(held, self.groups.neighbours[self.layout.slices])

    def _all_experts(self, _: str, held: Tensor) -> Tensor:
        """A weight of all experts, stacked, from those that each rank holds."""
        layout, ep = self.layout, self.groups.ep
        rows = len(held) // layout.here(ep.rank())
        most = max(layout.here(rank) for rank in range(layout.ranks)) * rows
        short = most - len(held)
        stacked = GatherSlices.apply(
            torch.cat((held, held.new_zeros(short, *held.shape[1:]))) if short else held, 0, ep
        )
        if layout.experts * rows == most * layout.ranks:
            return stacked
        there = [rank * most + i for rank in range(layout.ranks) for i in range(layout.here(rank) * rows)]
        return stacked[torch.tensor(there, device=held.device)]


def through(pieces: Sequence[Piece], x_ND: Tensor, counts: list[int], weights: Sequence[Tensor]) -> Tensor:
    """Rows sorted by expert through all pieces of their experts."""
    ring.computed(len(x_ND))
    for piece in pieces:
        x_ND = piece.compute(x_ND, counts, [weights[i] for i in piece.weights])
    return x_ND


def _through(pieces: Sequence[Piece], counts: list[int], x_ND: Tensor, *weights: Tensor) -> Tensor:
    return through(pieces, x_ND, counts, weights)


def _in_order(joined: Tensor, sliced: Sliced, dim: int, slices: Iterable[int]) -> Tensor:
    """Slices one after the other along `dim`, with their indices in the order that they have in a whole weight."""
    runs = [run for number in slices for run in sliced.runs[number]]
    order = sorted(range(len(runs)), key=runs.__getitem__)
    if order == list(range(len(runs))):
        return joined
    parts = joined.split([number for _, number in runs], dim)
    return torch.cat([parts[position] for position in order], dim)
