"""Arms of `benchmarks.moe` in a race: every strategy under loads that change from step to step."""

from __future__ import annotations

import random
import statistics
import time
import timeit
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.moe_hosts import limit, run_ranks
from benchmarks.moe_layer import RANKS, Layer, Load, Shape, experts_of, loads, strategies
from benchmarks.pairs import Times, print_table, ratios, shown, slowest
from tests.launch.hosts import Hosts
from trainrt.config import MoeConfig
from trainrt.parallel.collectives import all_gather
from trainrt.parallel.moe.cost import Rates, Sizes
from trainrt.parallel.moe.layout import ExpertLayout
from trainrt.parallel.moe.strategy import Chooser, Fixed, Lattice, Strategy
from trainrt.parallel.moe.tuner import Tuner
from trainrt.parallel.profile import device_of

ADAPTIVE = "adaptive"
NUMBER = 4
"""Bytes of a float32."""
PRACTICE = 4
"""Steps before the race for each step of it."""
PLAIN = "r 1, degree 1"
CAPACITIES, SHORT_CAPACITIES = (32, 512, 4096), (32, 256)


def statics(layout: ExpertLayout) -> dict[str, Strategy]:
    return {name_of(strategy): strategy for strategy in strategies(layout)}


def name_of(strategy: Strategy) -> str:
    return f"r {strategy.r}, degree {strategy.degree}" if strategy.r else "r 0"


def sizes_of(shape: Shape, layout: ExpertLayout) -> Sizes:
    """As the cost model sees the layer."""
    elements = 3 * shape.width * shape.inner
    return Sizes(layout, 1, NUMBER * shape.width, NUMBER * elements, 2.0 * elements)


def adaptive(layer: Layer, shape: Shape) -> Tuner:
    """The arm that learns, knowing nothing of these links. It may choose 16 chunks and hot experts, too."""
    group = dist.group.WORLD
    assert group is not None
    ways = list(Lattice(layer.layout, 1, MoeConfig()))
    return Tuner(ways, sizes_of(shape, layer.layout), Rates.of(device_of("cpu")), group, recomputed=False)


def learn(tuner: Tuner) -> float:
    """What an engine does once a step for all its layers. Returns its seconds."""
    start = time.perf_counter()
    tuner.learn(all_gather(tuner.observed(torch.device("cpu")), tuner.group))
    return time.perf_counter() - start


def race(
    rank: int, shape: Shape, practice: list[Load], given: list[Load], seed: int
) -> tuple[Times, dict[str, Any]]:  # fmt: skip
    """Each arm takes a step before any takes the next, in an order that changes; before, the one that learns has practice."""
    layer = Layer(experts_of(shape))
    tuner = adaptive(layer, shape)
    field: dict[str, Chooser] = {name: Fixed(strategy) for name, strategy in statics(layer.layout).items()}
    field[ADAPTIVE] = tuner
    draw, times = random.Random(seed), {name: [] for name in field}
    for arm in field.values():
        layer.step(arm, *layer.rows(max(given, key=lambda load: load.capacity)))
    learn(tuner)
    for load in practice:
        layer.step(tuner, *layer.rows(load))
        learn(tuner)
    learning = []
    for load in given:
        x_ND, count_E = layer.rows(load)
        for name in draw.sample(list(field), len(field)):
            times[name].append(layer.step(field[name], x_ND, count_E))
        learning.append(learn(tuner))
    count_WE = np.array(given[0].counts)
    lookup = timeit.timeit(lambda: tuner.choose(count_WE), number=1000) / 1000
    tried, exhaustive = tuner.trials
    return times, {
        "practice steps": len(practice), "tried": tried, "Tutel would have tried": exhaustive, "lookup us": 1e6 * lookup,
        "learning ms a step": 1e3 * statistics.median(learning),
        "chosen": {f"{key}": str(entry.current) for key, entry in sorted(tuner.entries.items())},
    }  # fmt: skip


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
            practice = loads(shape, ranks=RANKS, steps=PRACTICE * pairs, capacities=capacities, seed=experts + 2)
            found_by_rank = run_ranks(hosts, race, shape, practice, given, experts)
            times = slowest([of_rank for of_rank, _ in found_by_rank])
            notes = found_by_rank[0][1]
            result = summary(times, given, list(statics(layout)))
            title = f"speed, {regime} ({megabits:.0f} Mbit/s), experts: {experts}; time over that of the"
            print_table(title, [{"arm": name, **row} for name, row in result.items()])
            print(
                "  adaptive: " + ", ".join(f"{key} {shown(value)}" for key, value in notes.items() if key != "chosen")
            )
            found.append({
                "regime": regime, "megabits": megabits, "experts": experts, "loads": [load.kind for load in given],
                "seconds": times, "ratios": result, "adaptive": notes,
            })  # fmt: skip
    return found
