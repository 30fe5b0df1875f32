"""Placement of experts: a planted optimum comes back, what is balanced is balanced, and nothing is made worse."""

from __future__ import annotations

from itertools import combinations, pairwise, product
from typing import Any

import numpy as np
import pytest

from trainrt.errors import PlanError
from trainrt.parallel.moe.layout import ExpertLayout
from trainrt.parallel.moe.placement import (
    cost_of_traffic,
    cost_of_transitions,
    place_by_traffic,
    place_by_transitions,
    rank_of,
)
from trainrt.parallel.moe.programs import GAP

SHAPES = [(8, 4, (0, 0, 1, 1)), (6, 4, (0, 1, 0, 1)), (7, 3, (0, 0, 1)), (5, 5, (0, 0, 1, 1, 1)), (8, 2, (0, 0))]
"""Experts, ranks, hosts: even and uneven numbers, hosts of unequal size, hosts that are not neighbours, one host."""
LAYERS, SECONDS = 3, 20.0


def own_order(layout: ExpertLayout) -> tuple[int, ...]:
    return tuple(range(layout.experts))


def planted(layout: ExpertLayout, seed: int) -> tuple[Any, list[tuple[int, ...]]]:
    """A hidden order for each layer."""
    random = np.random.default_rng(seed)
    return random, [tuple(map(int, random.permutation(layout.experts))) for _ in range(LAYERS)]


def planted_traffic(layout: ExpertLayout, hosts: tuple[int, ...], seed: int) -> tuple[list[Any], list[tuple[int, ...]]]:
    """Rows that go mostly to experts of their home, seldom to those of their host, more seldom to others."""
    random, hidden = planted(layout, seed)
    tables, host_R = [], np.array(hosts)
    for order in hidden:
        rank_E = rank_of(order, layout)
        table = random.integers(0, 5, (layout.ranks, layout.experts)).astype(float)
        table += 20.0 * (host_R[:, None] == host_R[rank_E][None, :])
        # As many rows for every rank, so that balance pulls nowhere else.
        share_E = 600 // np.array([layout.here(rank) for rank in range(layout.ranks)])[rank_E]
        table += share_E * (np.arange(layout.ranks)[:, None] == rank_E[None, :])
        tables.append(table)
    return tables, hidden


def planted_transitions(layout: ExpertLayout, hosts: tuple[int, ...], seed: int) -> tuple[list[Any], Any]:
    """Tokens that mostly stay on their rank, seldom on their host."""
    random, hidden = planted(layout, seed)
    tables, host_R = [], np.array(hosts)
    ranks = [rank_of(order, layout) for order in hidden]
    for here, there in pairwise(ranks):
        table = random.integers(0, 3, (layout.experts, layout.experts)).astype(float)
        table += 40.0 * (host_R[here][:, None] == host_R[there][None, :])
        table += 400.0 * (here[:, None] == there[None, :])
        tables.append(table)
    return tables, hidden


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("experts", "ranks", "hosts"), SHAPES)
def test_planted_traffic_is_found(experts: int, ranks: int, hosts: tuple[int, ...], seed: int) -> None:
    layout = ExpertLayout(experts, ranks)
    tables, hidden = planted_traffic(layout, hosts, seed)
    found = place_by_traffic(tables, layout, hosts, seconds=SECONDS)
    assert found.exact
    for order, wanted in zip(found.orders, hidden, strict=True):
        assert (rank_of(order, layout) == rank_of(wanted, layout)).all()
    best = cost_of_traffic(tables, found.orders, layout, hosts)
    identity = cost_of_traffic(tables, [own_order(layout)] * LAYERS, layout, hosts)
    assert best.across_ranks < identity.across_ranks, "negative control: the hidden order is another one"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("experts", "ranks", "hosts"), SHAPES)
def test_planted_transitions_are_found(experts: int, ranks: int, hosts: tuple[int, ...], seed: int) -> None:
    """Ranks alike may be exchanged for each other, so what comes back is the cost, and it is that of the hidden order."""
    layout = ExpertLayout(experts, ranks)
    tables, hidden = planted_transitions(layout, hosts, seed)
    found = place_by_transitions(tables, layout, hosts, seconds=SECONDS)
    reached = cost_of_transitions(tables, found.orders, layout, hosts)
    assert reached == cost_of_transitions(tables, hidden, layout, hosts)
    assert reached < cost_of_transitions(tables, [own_order(layout)] * LAYERS, layout, hosts), "negative control"


def value(tables: list[Any], orders: Any, layout: ExpertLayout, hosts: tuple[int, ...]) -> float:
    """What `place_by_traffic` minimises where all ranks are on one host, or each is on its own."""
    cost = cost_of_traffic(tables, orders, layout, hosts)
    return cost.across_ranks / layout.ranks + cost.busiest


@pytest.mark.parametrize("seed", range(3))
def test_no_placement_of_all_is_better(seed: int) -> None:
    """Random counts, nothing planted: against every placement there is."""
    random = np.random.default_rng(seed)
    layout, hosts = ExpertLayout(5, 2), (0, 0)
    every = [(*some, *(e for e in range(5) if e not in some)) for some in combinations(range(5), layout.here(0))]
    traffic = [random.integers(0, 100, (2, 5)).astype(float)]
    found = place_by_traffic(traffic, layout, hosts, seconds=SECONDS)
    least = min(value(traffic, [order], layout, hosts) for order in every)
    assert value(traffic, found.orders, layout, hosts) <= least * (1 + GAP)
    transitions = [random.integers(0, 100, (5, 5)).astype(float) for _ in range(2)]
    reached = cost_of_transitions(
        transitions, place_by_transitions(transitions, layout, hosts, seconds=SECONDS).orders, layout, hosts
    )
    least = min(cost_of_transitions(transitions, orders, layout, hosts)[1] for orders in product(every, repeat=3))
    assert reached[1] <= least + GAP * sum(map(np.sum, transitions))


@pytest.mark.parametrize("seconds", [20.0, 0.0])
@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_made_worse_with_time_or_without(seed: int, seconds: float) -> None:
    """With no time at all the result is the greedy one, and says so."""
    random, layout, hosts = np.random.default_rng(seed), ExpertLayout(10, 4), (0, 0, 1, 1)
    traffic = [random.zipf(1.5, (4, 10)).clip(max=1000).astype(float) for _ in range(2)]
    orders = [own_order(layout)] * 2
    before = cost_of_traffic(traffic, orders, layout, hosts)
    found = place_by_traffic(traffic, layout, hosts, balance=0.0, seconds=seconds)
    after = cost_of_traffic(traffic, found.orders, layout, hosts)
    assert (after.across_hosts, after.across_ranks) <= (before.across_hosts, before.across_ranks)
    assert found.exact == (seconds > 0)
    transitions = [random.zipf(1.5, (10, 10)).clip(max=1000).astype(float)]
    found = place_by_transitions(transitions, layout, hosts, seconds=seconds / 10)
    after_tokens = cost_of_transitions(transitions, found.orders, layout, hosts)
    assert after_tokens <= cost_of_transitions(transitions, orders, layout, hosts)
    assert not found.exact or seconds


@pytest.mark.parametrize("seed", range(3))
def test_what_is_planted_is_found_greedily_too(seed: int) -> None:
    layout, hosts = ExpertLayout(16, 4), (0, 0, 1, 1)
    tables, hidden = planted_transitions(layout, hosts, seed)
    found = place_by_transitions(tables, layout, hosts, seconds=0.0)
    wanted = cost_of_transitions(tables, hidden, layout, hosts)
    assert not found.exact and cost_of_transitions(tables, found.orders, layout, hosts) == wanted


def test_hot_experts_are_dealt_to_different_ranks() -> None:
    """Homes alike, so that every placement sends as much: what is left is the busiest rank."""
    layout, hosts = ExpertLayout(8, 4), (0, 0, 1, 1)
    load_E = np.array([90, 80, 70, 60, 10, 20, 30, 40], float)
    traffic = [np.tile(load_E, (4, 1))]
    found = place_by_traffic(traffic, layout, hosts, seconds=SECONDS)
    assert cost_of_traffic(traffic, [own_order(layout)], layout, hosts).busiest == 4 * 170
    assert cost_of_traffic(traffic, found.orders, layout, hosts).busiest == 4 * 100
    careless = place_by_traffic(traffic, layout, hosts, balance=0.0, seconds=SECONDS)
    assert careless.orders == (own_order(layout),), "negative control: without a price for it nothing moves"


def test_without_a_gain_nothing_moves() -> None:
    for experts, ranks, hosts in SHAPES:
        layout = ExpertLayout(experts, ranks)
        for found in (
            place_by_traffic([np.zeros((ranks, experts))] * 2, layout, hosts, seconds=SECONDS),
            place_by_transitions([np.zeros((experts, experts))], layout, hosts, seconds=SECONDS),
            place_by_transitions([np.ones((experts, experts))], ExpertLayout(experts, 1), (0,), seconds=SECONDS),
        ):
            assert found.exact and found.orders == (own_order(layout),) * 2


def test_a_layer_without_a_gain_stays_beside_one_that_moves() -> None:
    layout, hosts = ExpertLayout(4, 4), (0, 0, 1, 1)
    crossed = np.eye(4)[[2, 3, 0, 1]] * 50
    found = place_by_traffic([crossed, np.ones((4, 4))], layout, hosts, seconds=SECONDS)
    assert found.orders == ((2, 3, 0, 1), own_order(layout))


def test_counts_that_do_not_fit_are_refused() -> None:
    layout, hosts = ExpertLayout(4, 2), (0, 1)
    for wrong in (np.zeros((2, 3)), np.full((2, 4), -1.0), np.full((2, 4), np.nan)):
        with pytest.raises(PlanError, match=r"traffic: a table of .*allowed: counts from 0, \(2, 4\)"):
            place_by_traffic([wrong], layout, hosts, seconds=SECONDS)
    with pytest.raises(PlanError, match="two mixtures"):
        place_by_transitions([], layout, hosts, seconds=SECONDS)
    with pytest.raises(PlanError, match="slices"):
        place_by_traffic([np.zeros((4, 2))], ExpertLayout(2, 4), (0, 0, 1, 1), seconds=SECONDS)
    with pytest.raises(PlanError, match="hosts of 3 ranks"):
        place_by_traffic([np.zeros((2, 4))], layout, (0, 0, 1), seconds=SECONDS)
