"""The dictionary of strategies: what it learns of a device whose times follow known rates, and that ranks agree."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.ranks import run_ranks
from trainrt.config import MoeConfig
from trainrt.parallel.moe.cost import Observation, Rates, Sizes, fit, predict, rows_of
from trainrt.parallel.moe.layout import ExpertLayout
from trainrt.parallel.moe.strategy import Lattice, Strategy

LAYOUT = ExpertLayout(2, 2)
SIZES = Sizes(LAYOUT, places=1, row_bytes=1024, expert_bytes=3 << 20, row_flops=1.5e6)
TRUE = Rates(message=2e-4, byte=2e-8, inside_byte=2e-8, flop=5e-11, expert=3e-4, call=2e-4)
ASSUMED = Rates(message=2e-5, byte=5e-10, inside_byte=5e-10, flop=4e-11, expert=2e-5, call=2e-5)
STRATEGIES = list(Lattice(LAYOUT, 1, MoeConfig()))


@dataclass
class Watch:
    taken: float

    def seconds(self) -> float:
        return self.taken


def loads(seed: int, number: int) -> list[np.ndarray]:
    """Rows of two ranks for two experts: of many sizes, even and not."""
    rng = random.Random(seed)
    found = []
    for _ in range(number):
        rows, share = 2 ** rng.uniform(5, 12), rng.choice([0.5, 0.5, 0.9])
        found.append(np.array([[round(rows * share), round(rows * (1 - share))]] * 2))
    return found


def steps(tuner: Any, counts: list[np.ndarray], rates: Rates, seed: int) -> list[tuple[tuple[int, int], Strategy]]:
    """A step for each load, which takes what the rates say, and noise. Returns what was chosen."""
    import torch.distributed as dist

    from trainrt.parallel.collectives import all_gather

    rng, chosen = random.Random(seed), []
    for count_WE in counts:
        choice = tuner.choose(count_WE)
        key = tuner.sizes.key(count_WE)
        forward, backward = predict(key, choice.strategy, tuner.sizes, rates, recomputed=False)
        if choice.times is not None:
            choice.times.forward.append(Watch(forward * rng.lognormvariate(0, 0.05)))
            choice.times.backward.append(Watch(backward * rng.lognormvariate(0, 0.05)))
        chosen.append((key, choice.strategy))
        tuner.learn(all_gather(tuner.observed(torch.device("cpu")), dist.group.WORLD))
    return chosen


def made() -> Any:
    import torch.distributed as dist

    from trainrt.parallel.moe.tuner import Tuner

    return Tuner(STRATEGIES, SIZES, ASSUMED, dist.group.WORLD, recomputed=False)


def learned(rank: int) -> dict[str, Any]:
    """Train, drift, restore; each rank with noise of its own."""
    import torch.distributed as dist

    from trainrt.parallel.moe.tuner import Tuner
    from trainrt.training.engines.mixtures import recall

    tuner = made()
    first = steps(tuner, loads(1, 600), TRUE, seed=rank)
    trials = tuner.trials
    ratios = []
    for key, strategy in first[-100:]:
        seconds = {s: sum(predict(key, s, SIZES, TRUE, recomputed=False)) for s in STRATEGIES}
        ratios.append(seconds[strategy] / min(seconds.values()))
    again = made()
    other = Tuner(STRATEGIES, replace(SIZES, row_bytes=8), ASSUMED, dist.group.WORLD, recomputed=False)
    recall([again, other], json.loads(json.dumps([tuner.to_json()])))
    known = {key: entry.chosen for key, entry in tuner.entries.items() if entry.chosen is not None}
    restored = {key: entry.chosen for key, entry in again.entries.items()}
    # The link becomes ten times as fast.
    before = dict(first[-100:])
    after = dict(steps(tuner, loads(1, 4000), replace(TRUE, byte=TRUE.byte / 10), seed=rank)[-100:])
    same = known == restored and not other.entries
    return {"chosen": first, "trials": trials, "ratios": ratios, "same": same, "before": before, "after": after}


def test_the_fastest_is_found_with_few_trials_and_all_ranks_agree() -> None:
    one, other = run_ranks(2, learned)
    assert one["chosen"] == other["chosen"] and one["after"] == other["after"]
    tried, exhaustive = one["trials"]
    assert 0 < tried <= 0.25 * exhaustive, one["trials"]
    assert float(np.median(one["ratios"])) <= 1.02 and float(np.mean(one["ratios"])) <= 1.10, one["ratios"]
    assert one["same"]
    # Negative control: always one piece is far from it.
    plain = [
        sum(predict(key, Strategy(), SIZES, TRUE, recomputed=False))
        / min(sum(predict(key, s, SIZES, TRUE, recomputed=False)) for s in STRATEGIES)
        for key, _ in one["chosen"][-100:]
    ]
    assert float(np.mean(plain)) > 1.1


def test_what_became_slower_or_faster_is_tried_again() -> None:
    """After the links became ten times as fast, what is chosen is good there, and what was chosen before is not."""
    one, _ = run_ranks(2, learned)
    faster = replace(TRUE, byte=TRUE.byte / 10)

    def ratio(chosen: dict[tuple[int, int], Strategy]) -> float:
        return float(np.mean([
            sum(predict(key, strategy, SIZES, faster, recomputed=False))
            / min(sum(predict(key, s, SIZES, faster, recomputed=False)) for s in STRATEGIES)
            for key, strategy in chosen.items()
        ]))  # fmt: skip

    assert ratio(one["after"]) < 1.05 < 1.08 < ratio(one["before"])


def steady(rank: int, config: MoeConfig) -> tuple[float, tuple[int, int]]:
    """One bucket for ever, and rates that mislead: how much longer than the fastest what is chosen in the end takes."""
    import torch.distributed as dist

    from trainrt.parallel.moe.tuner import Tuner

    strategies = list(Lattice(LAYOUT, 1, config))
    tuner = Tuner(
        strategies, SIZES, replace(ASSUMED, message=1e-7, byte=5e-8, expert=1e-7), dist.group.WORLD, recomputed=False
    )
    slow = replace(TRUE, message=2e-3, expert=2e-3, byte=1e-9)
    chosen = steps(tuner, [np.full((2, 2), 100)] * 80, slow, seed=rank)
    seconds = {s: sum(predict(chosen[-1][0], s, SIZES, slow, recomputed=False)) for s in strategies}
    return seconds[chosen[-1][1]] / min(seconds.values()), tuner.trials


@pytest.mark.parametrize("config", [MoeConfig(), MoeConfig(r=1, hot_experts=0)])
def test_steady_loads_do_not_stay_with_what_was_guessed(config: MoeConfig) -> None:
    for ratio, (tried, exhaustive) in run_ranks(2, steady, config):
        assert ratio < 1.1 and 2 <= tried <= 0.25 * exhaustive, (ratio, tried)


def disagree(rank: int) -> str:
    import torch.distributed as dist

    from trainrt.parallel.moe.exchange import gather_counts

    count_E = torch.tensor([rank, 2])
    assert gather_counts(count_E, dist.group.WORLD, agreed=(7,)).tolist() == [[0, 2], [1, 2]]
    try:
        gather_counts(count_E, dist.group.WORLD, agreed=(rank,))
    except RuntimeError as error:
        return str(error)
    return ""


def test_ranks_that_do_not_agree_say_so() -> None:
    assert all("do not agree" in said for said in run_ranks(2, disagree))


def test_rates_are_fitted_to_what_was_observed() -> None:
    rng, seen, held = random.Random(3), [], []
    for number in range(48):
        key = (rng.randint(8, 24), rng.randint(8, 24))
        strategy = rng.choice(STRATEGIES)
        forward, backward = predict(key, strategy, SIZES, TRUE, recomputed=False)
        made = Observation(key, strategy, forward * rng.lognormvariate(0, 0.05), backward * rng.lognormvariate(0, 0.05))
        (seen if number % 3 else held).append(made)
    rates = fit(seen, SIZES, ASSUMED, recomputed=False)

    def error(of: Rates) -> float:
        return float(np.median([
            abs(sum(predict(o.key, o.strategy, SIZES, of, recomputed=False)) / (o.forward + o.backward) - 1) for o in held
        ]))  # fmt: skip

    assert error(rates) < 0.10 < error(ASSUMED)


def test_buckets_follow_from_the_busiest_and_hold_similar_loads() -> None:
    assert SIZES.key(np.array([[100, 100], [0, 0]])) == SIZES.even(200)[:1] + SIZES.even(100)[1:]
    assert SIZES.key(np.zeros((2, 2), dtype=np.int64)) == (0, 0)
    for rows in (1, 7, 100, 5000):
        assert 0.8 < rows_of(SIZES.even(rows)[0]) / rows < 1.25
    sliced = replace(SIZES, layout=ExpertLayout(1, 2))
    assert sliced.key(np.array([[100], [100]])) == SIZES.even(100)


@pytest.mark.parametrize(("hosts", "config", "number"), [
    (False, MoeConfig(), 11), (True, MoeConfig(), 21), (False, MoeConfig(r=1), 10), (False, MoeConfig(r=1, degree=2), 2),
    (True, MoeConfig(all_to_all="hierarchical"), 11), (False, MoeConfig(r=0), 1), (False, MoeConfig(hot_experts=0), 6),
])  # fmt: skip
def test_strategies_are_those_the_config_leaves_open(hosts: bool, config: MoeConfig, number: int) -> None:
    assert len(list(Lattice(ExpertLayout(4, 4), 2 if hosts else 1, config))) == number


def test_degrees_are_open_apart_where_experts_are_computed_again_anyway() -> None:
    open_ways = list(Lattice(ExpertLayout(4, 4), 1, MoeConfig(r=1, hot_experts=0), apart=True))
    assert len(open_ways) == 25 and Strategy(1, 8, 2) in open_ways
    assert all(
        way.backward_degree == 2
        for way in Lattice(ExpertLayout(4, 4), 1, MoeConfig(backward_degree=2), apart=True)
        if way.r
    )
