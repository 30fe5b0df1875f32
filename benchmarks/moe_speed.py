"""Arms of `benchmarks.moe` in a race: every strategy under loads that change from step to step."""

from __future__ import annotations

import random
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.moe_hosts import limit, run_ranks
from benchmarks.moe_layer import RANKS, Layer, Load, Shape, experts_of, loads, strategies
from benchmarks.pairs import Times, print_table, ratios, slowest
from tests.launch.hosts import Hosts
from trainrt.parallel.moe.layout import ExpertLayout
from trainrt.parallel.moe.strategy import Strategy

PLAIN = "r 1, degree 1"
CAPACITIES, SHORT_CAPACITIES = (32, 512, 4096), (32, 256)

Arm = Callable[[Load], Strategy]
"""How a step is to be computed. The same on all ranks."""


def statics(layout: ExpertLayout) -> dict[str, Strategy]:
    return {name_of(strategy): strategy for strategy in strategies(layout)}


def name_of(strategy: Strategy) -> str:
    return f"r {strategy.r}, degree {strategy.degree}" if strategy.r else "r 0"


def arms(layout: ExpertLayout) -> dict[str, Arm]:
    """Those that choose the same whatever comes. An arm that learns stands beside them, and is told in `race`."""
    return {name: lambda load, fixed=strategy: fixed for name, strategy in statics(layout).items()}


def race(rank: int, shape: Shape, given: list[Load], seed: int) -> Times:
    """Each arm takes a step before any takes the next, in an order that changes."""
    layer = Layer(experts_of(shape))
    field = arms(layer.layout)
    draw, times = random.Random(seed), {name: [] for name in field}
    largest = max(given, key=lambda load: load.capacity)
    for arm in field.values():
        layer.step(arm(largest), *layer.rows(largest))
    for load in given:
        x_ND, count_E = layer.rows(load)
        for name in draw.sample(list(field), len(field)):
            seconds = layer.step(field[name](load), x_ND, count_E)
            # The place to tell an arm what its choice took.
            times[name].append(seconds)
    return times


def references(times: Times, given: list[Load], names: Sequence[str]) -> Times:
    """What arms are held against, made of the static ones.

    "best of step": the least of a step, which is below what any rule can reach, since it picks from noise. "best of load":
    the arm whose median is the least for that load. Single ones: by the sum over all steps.
    """
    kinds = defaultdict(list)
    for load in given:
        kinds[load.kind].append(load.step)

    def median(name: str, kind: str) -> float:
        return statistics.median(times[name][step] for step in kinds[kind])

    best = {kind: min(names, key=lambda name: median(name, kind)) for kind in kinds}
    order = sorted(names, key=lambda name: sum(times[name]))
    return {
        "best of step": [min(times[name][load.step] for name in names) for load in given],
        "best of load": [times[best[load.kind]][load.step] for load in given],
        "best single": times[order[0]], "degree 1": times[PLAIN], "worst": times[order[-1]],
    }  # fmt: skip


def summary(times: Times, given: list[Load], names: Sequence[str]) -> dict[str, Any]:
    held = references(times, given, names)
    return {
        name: {"seconds": sum(steps)} | {against: ratios(steps, other) for against, other in held.items()}
        for name, steps in times.items()
    }


def speed(hosts: Hosts, rates: Mapping[str, float], *, pairs: int, short: bool) -> list[dict[str, Any]]:
    """Two layouts under two regimes: an expert a rank, and one expert cut in two."""
    found = []
    for regime, megabits in rates.items():
        limit(hosts, megabits)
        for experts in (2, 1):
            shape, layout = Shape(experts), ExpertLayout(experts, RANKS)
            capacities = SHORT_CAPACITIES if short else CAPACITIES
            given = loads(shape, ranks=RANKS, steps=pairs, capacities=capacities, seed=experts)
            times = slowest(run_ranks(hosts, race, shape, given, experts))
            result = summary(times, given, list(statics(layout)))
            title = f"speed, {regime} ({megabits:.0f} Mbit/s), experts: {experts}; time over that of the"
            print_table(title, [{"arm": name, **row} for name, row in result.items()])
            found.append({
                "regime": regime, "megabits": megabits, "experts": experts, "loads": [load.kind for load in given],
                "seconds": times, "ratios": result,
            })  # fmt: skip
    return found
