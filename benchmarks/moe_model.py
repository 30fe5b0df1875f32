"""The cost model of mixtures against what is measured, and what it says of larger clusters; a part of `benchmarks.moe`.

Every strategy is timed under every kind of load. Rates are fitted to half of the loads and held against the other half: the
error of a prediction, and how often the strategy that it names takes at most 5 % longer than the fastest. With fitted rates, and
with those of a cluster of GPUs, the same model gives the seconds of 8 to 2,048 ranks, straight and through hosts.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch.distributed as dist

from benchmarks.moe_hosts import limit, run_ranks
from benchmarks.moe_layer import RANKS, Layer, Load, Shape, experts_of, loads, strategies
from benchmarks.moe_speed import SHORT_CAPACITIES, sizes_of
from benchmarks.pairs import print_table
from tests.launch.hosts import Hosts
from trainrt.parallel.moe.cost import Observation, Rates, Sizes, fit, predict
from trainrt.parallel.moe.exchange import Counts
from trainrt.parallel.moe.layout import ExpertLayout
from trainrt.parallel.moe.strategy import Choice, Strategy
from trainrt.parallel.moe.timing import Times
from trainrt.parallel.profile import device_of

CAPACITIES = (32, 128, 512, 2048)
REPEATS, SHORT_REPEATS = 6, 2
"""Of small loads; large ones, which vary less, are timed half as often."""
LARGE = 1024
CLOSE = 1.05
GPUS, TOKENS, WIDTH, INNER, TOP_K = 8, 4096, 4096, 1408, 2
"""Of a host; and of a mixture on a large cluster: tokens of a rank, bfloat16, an expert for each rank."""


class Watched:
    """Always one strategy, timed."""

    agreed = ()

    def __init__(self, strategy: Strategy) -> None:
        group = dist.group.WORLD
        assert group is not None
        self.strategy, self.times = strategy, Times(group)

    def choose(self, count_WE: Counts) -> Choice:
        return Choice(self.strategy, self.times)


def observe(rank: int, shape: Shape, kinds: list[Load], repeats: int) -> list[tuple[int, Strategy, float, float]]:
    """For each kind of load and strategy the medians of seconds forward and backward."""
    layer, found = Layer(experts_of(shape)), []
    ways = strategies(layer.layout)
    watched = [[Watched(way) for way in ways] for _ in kinds]
    for repeat in range(repeats + 1):
        for load, arms in zip(kinds, watched, strict=True):
            if load.capacity > LARGE and repeat > repeats // 2:
                continue
            x_ND, count_E = layer.rows(load)
            for arm in arms:
                layer.step(arm, x_ND, count_E)
                if not repeat:
                    arm.times.forward.clear()
                    arm.times.backward.clear()
    for number, arms in enumerate(watched):
        for arm in arms:
            forward, backward = (
                statistics.median(watch.seconds() for watch in watches)
                for watches in (arm.times.forward, arm.times.backward)
            )
            found.append((number, arm.strategy, forward, backward))
    return found


def held_out(observations: Sequence[tuple[int, Observation]], sizes: Sizes) -> dict[str, Any]:
    """Fitted to the kinds of even number, held against the others."""
    rates = fit(
        [o for number, o in observations if number % 2 == 0], sizes, Rates.of(device_of("cpu")), recomputed=False
    )
    errors, close, others = [], 0, {number for number, _ in observations if number % 2}
    for number in others:
        of_kind = [o for other, o in observations if other == number]
        seconds = {o.strategy: o.forward + o.backward for o in of_kind}
        said = {o.strategy: sum(predict(o.key, o.strategy, sizes, rates, recomputed=False)) for o in of_kind}
        errors += [abs(said[way] / seconds[way] - 1) for way in seconds]
        close += seconds[min(said, key=lambda way: said[way])] <= CLOSE * min(seconds.values())
    return {"median error": statistics.median(errors), "worst": max(errors), "named within 5 %": f"{close} of {len(others)}",
            "rates": rates}  # fmt: skip


def at_scale(rates: Rates, *, row_bytes: int, expert_bytes: int, row_flops: float) -> list[dict[str, Any]]:
    """Milliseconds of a mixture forward and backward over many ranks, as predicted: an expert for each rank."""
    rows = []
    for ranks in (8, 16, 64, 256, 1024, 2048):
        sizes = Sizes(ExpertLayout(ranks, ranks), min(GPUS, ranks), row_bytes, expert_bytes, row_flops)
        row: dict[str, Any] = {"ranks": ranks}
        for rows_a_rank in (TOKENS * TOP_K // 8, TOKENS * TOP_K):
            for way in (False, True):
                name = f"{rows_a_rank} rows, {'hierarchical' if way else 'linear'}"
                ways = [Strategy(1, degree, degree, way) for degree in (1, 2, 4, 8)]
                key = sizes.even(rows_a_rank)
                times = {s: sum(predict(key, s, sizes, rates, recomputed=False)) for s in ways}
                best = min(times, key=lambda s: times[s])
                row[name] = f"{1e3 * times[best]:.2f} ({best.degree})" if ranks > GPUS or not way else "-"
        rows.append(row)
    return rows


def gpus() -> list[dict[str, Any]]:
    """A large mixture on hosts of eight H100s, by their data sheet."""
    rates = replace(Rates.of(device_of("h100")), inside_byte=1.0 / 4e11)
    return at_scale(rates, row_bytes=2 * WIDTH, expert_bytes=6 * WIDTH * INNER, row_flops=6.0 * WIDTH * INNER)


def as_fitted(sizes: Sizes, rates: Rates) -> list[dict[str, Any]]:
    """The measured mixture on hosts of eight such ranks. A byte inside a host is taken to be a tenth of one between."""
    rates = replace(rates, inside_byte=rates.byte / 10)
    return at_scale(rates, row_bytes=sizes.row_bytes, expert_bytes=sizes.expert_bytes, row_flops=sizes.row_flops)


def model(hosts: Hosts, rates: Mapping[str, float], *, pairs: int, short: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"measured": [], "by H100s' data sheet": gpus()}
    for regime, megabits in rates.items():
        limit(hosts, megabits)
        for experts in (2, 1):
            shape, layout = Shape(experts), ExpertLayout(experts, RANKS)
            capacities = SHORT_CAPACITIES if short else CAPACITIES
            kinds = loads(shape, ranks=RANKS, steps=4 * len(capacities), capacities=capacities, seed=experts)
            of_ranks = run_ranks(hosts, observe, shape, kinds, SHORT_REPEATS if short else REPEATS)
            sizes = sizes_of(shape, layout)
            observations = []
            for (number, way, *first), (_, _, *second) in zip(*of_ranks, strict=True):
                key = sizes.key(np.array(kinds[number].counts))
                observations.append((number, Observation(key, way, *map(max, zip(first, second, strict=True)))))
            row = {"regime": regime, "experts": experts, **held_out(observations, sizes)}
            print_table(f"cost model, {regime} ({megabits:.0f} Mbit/s), experts: {experts}", [row])
            scale = as_fitted(sizes, row["rates"])
            print_table("predicted with these rates, ms of a mixture (best degree)", scale)
            seen = [(number, *o.key, asdict(o.strategy), o.forward, o.backward) for number, o in observations]
            found["measured"].append({**row, "rates": asdict(row["rates"]), "at scale": scale, "observations": seen})
    print_table("predicted for H100s, ms of a mixture (best degree)", found["by H100s' data sheet"])
    return found
