"""Which rank of ep holds which expert, from what was counted in training: pure arithmetic.

ExFlow (arXiv 2401.08383) places the experts of a trained model for inference: with its context-coherent parallelism a token
stays where its last expert is, so what costs is a step from an expert of one layer to one of the next that lies elsewhere.
Its integer program minimises those, weighed by the affinity P(E_p of layer j + 1 | E_i of layer j), with as many experts a
rank in each layer; over hosts, then over the ranks of each. `place_by_transitions` is that, with counts for probabilities:
a pair that is seldom met should weigh little.

In training a token has to be at home between two mixtures: its residual, its attention and its loss are there, and its
gradient takes the same way back. A row travels home -> expert -> home in every mixture, whatever the last mixture was, so
transitions cost nothing. `place_by_traffic` minimises what does: rows whose expert is not at their home, over hosts first,
and the rows of the busiest rank, for which all others wait. Layers are then independent, and the program is linear.

Legend: L mixtures, R ranks of ep, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from trainrt.errors import PlanError
from trainrt.parallel.moe.layout import ExpertLayout
from trainrt.parallel.moe.programs import Budget, Floats, Ints, assign, chain, kept

Order = tuple[int, ...]
"""Position -> expert; rank r holds those of `ExpertLayout.held(r)`, its experts by number."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Rows a placement sends, over all layers. busiest: rows of the busiest rank, summed over layers."""

    across_hosts: float
    across_ranks: float
    busiest: float


@dataclass(frozen=True, slots=True)
class Placement:
    """An order for each layer. exact: every program was solved to its optimum; else some were ended, or done greedily."""

    orders: tuple[Order, ...]
    exact: bool


def place_by_traffic(
    traffic: Sequence[Floats], layout: ExpertLayout, hosts: Sequence[int], *, seconds: float, balance: float = 1.0
) -> Placement:  # fmt: skip
    """The placement for training. `traffic[l][h, e]`: rows from home rank h to expert e; `hosts[r]`: the host of a rank.

    The value of a layer is in rows a rank: those that travel, divided by R, and `balance` times those of the busiest rank
    (how much longer a row takes to compute than to send). Never worse than the experts in their own order, over hosts and,
    where those are the same, over ranks. `seconds`: for all programs; 0: greedily. Raises PlanError where counts do not fit
    the layout.
    """
    tables = [_checked(table, (layout.ranks, layout.experts), "traffic") for table in traffic]
    budget = Budget(seconds, len(tables) * (1 + len(set(hosts))))

    def solve(held: list[Ints], bins: list[Ints], before: list[Ints | None]) -> list[Ints]:
        inside, found = np.concatenate(bins), []
        room, ranks = _room(layout, bins), np.array([len(own) for own in bins])
        for table, mine, start in zip(tables, held, before, strict=True):
            # What comes from elsewhere travels wherever in these bins an expert is.
            from_inside = table[np.ix_(inside, mine)].sum(0)
            cost_EP = np.stack([from_inside - table[np.ix_(own, mine)].sum(0) for own in bins], 1) / layout.ranks
            found.append(assign(cost_EP, table[:, mine].sum(0), room, ranks, balance, budget, before=start))
        return found

    return Placement(_staged(len(tables), layout, hosts, solve), budget.exact)


def place_by_transitions(
    transitions: Sequence[Floats], layout: ExpertLayout, hosts: Sequence[int], *, seconds: float
) -> Placement:
    """ExFlow's placement, for tokens that stay where their last expert is. `transitions[l][i, j]`: tokens (or choices of
    tokens) that go from expert i of layer l to expert j of layer l + 1.

    Never worse than the experts in their own order, in the same sense. Raises PlanError where counts do not fit the layout.
    """
    if not transitions:
        raise PlanError("transitions need two mixtures; allowed: counts between each mixture and the next")
    tables = [_checked(table, (layout.experts, layout.experts), "transitions") for table in transitions]
    budget = Budget(seconds, 1 + len(set(hosts)))

    def solve(held: list[Ints], bins: list[Ints], before: list[Ints | None]) -> list[Ints]:
        counts = [table[np.ix_(*pair)] for table, *pair in zip(tables, held[:-1], held[1:], strict=True)]
        known = [start for start in before if start is not None]
        return chain(counts, _room(layout, bins), budget, before=known if len(known) == len(before) else None)

    return Placement(_staged(len(tables) + 1, layout, hosts, solve), budget.exact)


Solve = Callable[[list[Ints], list[Ints], list[Ints | None]], list[Ints]]
"""Of each layer the experts in question, the ranks of each bin, and of each layer the bins as they are, if those say anything:
to the bin of each of the experts."""


def _staged(layers: int, layout: ExpertLayout, hosts: Sequence[int], solve: Solve) -> tuple[Order, ...]:
    """Hosts first, then the ranks of each host. What would gain nothing by a move stays."""
    if layout.slices > 1:
        raise PlanError(f"{layout.experts} experts over {layout.ranks} ranks are slices: they have no other placement")
    if len(hosts) != layout.ranks:
        raise PlanError(f"the hosts of {len(hosts)} ranks are given; allowed: those of {layout.ranks}")
    own = np.repeat(np.arange(layout.ranks), [layout.here(rank) for rank in range(layout.ranks)])
    everywhere = [np.flatnonzero(np.equal(hosts, host)) for host in dict.fromkeys(hosts)]
    host_of_rank = np.empty(layout.ranks, np.int64)
    for number, ranks in enumerate(everywhere):
        host_of_rank[ranks] = number
    before = host_of_rank[own]
    host_LE = solve([np.arange(layout.experts)] * layers, everywhere, [before] * layers)
    rank_LE = [own.copy() for _ in range(layers)]
    for number, ranks in enumerate(everywhere):
        held = [np.flatnonzero(found == number) for found in host_LE]
        # The ranks that experts are on now say something only where their hosts are the same.
        start: list[Ints | None] = [
            np.searchsorted(ranks, own[mine]) if (found == before).all() else None
            for mine, found in zip(held, host_LE, strict=True)
        ]
        for rank_E, mine, bins in zip(
            rank_LE, held, solve(held, [ranks[i : i + 1] for i in range(len(ranks))], start), strict=True
        ):
            rank_E[mine] = ranks[bins]
    return tuple(tuple(map(int, np.argsort(rank_E, kind="stable"))) for rank_E in rank_LE)


def _room(layout: ExpertLayout, bins: list[Ints]) -> Ints:
    return np.array([sum(layout.here(int(rank)) for rank in own) for own in bins])


def _checked(table: Floats, shape: tuple[int, int], what: str) -> Floats:
    table = np.asarray(table, float)
    if table.shape != shape or not np.isfinite(table).all() or (table < 0).any():
        raise PlanError(f"{what}: a table of {table.shape}; allowed: counts from 0, {shape}")
    return table


def rank_of(order: Order, layout: ExpertLayout) -> Ints:
    """The rank that holds each expert."""
    rank_E = np.empty(layout.experts, np.int64)
    rank_E[list(order)] = np.repeat(np.arange(layout.ranks), [layout.here(rank) for rank in range(layout.ranks)])
    return rank_E


def cost_of_traffic(
    traffic: Sequence[Floats], orders: Sequence[Order], layout: ExpertLayout, hosts: Sequence[int]
) -> Cost:  # fmt: skip
    """The rows that leave their home, and their host, one way; and those of the busiest rank of each layer."""
    host_R, across_hosts, across_ranks, busiest = np.asarray(hosts), 0.0, 0.0, 0.0
    for table, order in zip(traffic, orders, strict=True):
        rank_E = rank_of(order, layout)
        across_hosts += float(table[host_R[:, None] != host_R[rank_E][None, :]].sum())
        across_ranks += float(table[np.arange(layout.ranks)[:, None] != rank_E[None, :]].sum())
        busiest += float(np.bincount(rank_E, table.sum(0), layout.ranks).max())
    return Cost(across_hosts, across_ranks, busiest)


def cost_of_transitions(
    transitions: Sequence[Floats], orders: Sequence[Order], layout: ExpertLayout, hosts: Sequence[int]
) -> tuple[float, float]:  # fmt: skip
    """The tokens that change host, and rank, between a mixture and the next (ExFlow's objective)."""
    host_R, rank_LE = np.asarray(hosts), [rank_of(order, layout) for order in orders]
    total = sum(float(table.sum()) for table in transitions)
    return total - kept(transitions, [host_R[rank_E] for rank_E in rank_LE]), total - kept(transitions, rank_LE)
