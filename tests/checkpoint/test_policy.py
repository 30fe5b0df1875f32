"""Intervals and parity from costs and failures: against brute force, and at the ends."""

from __future__ import annotations

import random

import pytest

from trainrt.checkpoint.policy import best_every, best_interval, best_parity, effective_time, loss_rate

YEAR = 365 * 86400.0


def simulated(every: int, *, step: float, snapshot: float, recovery: float, mtbf: float, steps: int) -> float:
    """The effective share of a run with failures at random moments."""
    generator = random.Random(every)
    done = kept = 0
    at, fails = 0.0, generator.expovariate(1 / mtbf)
    while done < steps:
        cost = step + (snapshot if (done + 1) % every == 0 else 0.0)
        if at + cost > fails:
            at, done = fails + recovery, kept
            fails = at + generator.expovariate(1 / mtbf)
            continue
        at, done = at + cost, done + 1
        kept = done if done % every == 0 else kept
    return steps * step / at


def test_the_chosen_interval_is_near_the_best_of_a_simulation() -> None:
    costs = {"step": 1.0, "snapshot": 0.5, "recovery": 5.0, "mtbf": 600.0}
    chosen = best_every(step_seconds=1.0, snapshot_seconds=0.5, mtbf_seconds=600.0)
    shares = {every: simulated(every, **costs, steps=60000) for every in (1, 2, 5, 10, chosen, 50, 100, 300)}
    assert 15 < chosen < 40
    assert shares[chosen] > max(shares.values()) - 0.005
    assert shares[1] < shares[chosen] - 0.1 and shares[300] < shares[chosen] - 0.1, "control: the interval matters"
    expected = effective_time(
        step_seconds=1.0, snapshot_seconds=0.5, every=chosen, recovery_seconds=5.0, mtbf_seconds=600.0
    )
    assert shares[chosen] == pytest.approx(expected, abs=0.01)


def test_snapshots_that_cost_nothing_are_taken_always_and_dear_ones_seldom() -> None:
    assert best_every(step_seconds=1.0, snapshot_seconds=0.0, mtbf_seconds=600.0) == 1
    assert best_interval(snapshot_seconds=5000.0, mtbf_seconds=600.0) == 600.0


def test_a_group_is_lost_less_often_with_more_parity_and_a_shorter_window() -> None:
    rates = [loss_rate(8, m, node_mtbf_seconds=3600.0, window_seconds=60.0) for m in (0, 1, 2, 3)]
    assert rates == sorted(rates, reverse=True) and rates[0] == pytest.approx(8 / 3600)
    assert loss_rate(8, 1, node_mtbf_seconds=3600.0, window_seconds=6.0) == pytest.approx(rates[1] / 10)


def test_parity_follows_failures_and_what_memory_and_nodes_allow() -> None:
    hosts = {f"n{index}": f"h{index}" for index in range(8)}
    asked = {
        "data_shards": None,
        "node_bytes": 1e9,
        "memory_bytes": 1e12,
        "window_seconds": 30.0,
        "loss_seconds": 3600.0,
    }
    assert best_parity(hosts, node_mtbf_seconds=YEAR, **asked) == 1
    assert best_parity(hosts, node_mtbf_seconds=3600.0, **asked) > 1
    assert best_parity(hosts, node_mtbf_seconds=60.0, **asked) == 3
    assert best_parity({"n0": "a", "n1": "b"}, node_mtbf_seconds=60.0, **asked) == 1, "two nodes carry no more"
    assert best_parity({"n0": "a"}, node_mtbf_seconds=60.0, **asked) == 0
    asked["memory_bytes"] = 2e9 * (1 + 1 / 7) + 1
    assert best_parity(hosts, node_mtbf_seconds=60.0, **asked) == 1, "there is room for no more"
    asked["memory_bytes"] = 2e9
    assert best_parity(hosts, node_mtbf_seconds=60.0, **asked) == 0
