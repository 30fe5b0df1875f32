"""How much of the exchange runs under the experts, or they under it: both alone and together; see `benchmarks.moe`."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.moe_hosts import limit, run_ranks
from benchmarks.moe_layer import DEGREES, RANKS, Layer, Load, Run, Shape, experts_of, loads, timed
from benchmarks.pairs import Estimate, Times, estimate, print_table, ratios, slowest
from tests.launch.hosts import Hosts
from trainrt.parallel.moe.exchange import Exchange, gather_counts
from trainrt.parallel.moe.experts import SWIGLU, local
from trainrt.parallel.moe.feed_forward import feed_forward
from trainrt.parallel.moe.flex import Piece, Way

SHAPE = Shape(2)
CAPACITIES, SHORT_CAPACITIES = (512, 2048), (256,)
WARM = 5


class Sleep(torch.autograd.Function):
    """Rows as they are, after the time that experts take for so many: the processor is free meanwhile, as beside a GPU."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, forward: float, backward: float) -> Tensor:
        ctx.seconds = backward * len(x_ND)
        time.sleep(forward * len(x_ND))
        return x_ND.view_as(x_ND)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.seconds)
        return grads[0], None, None


def parts(layer: Layer, load: Load) -> tuple[dict[str, Run], Tensor]:
    """The parts alone and together, by name, for the rows of a load. Each chunk's counts are agreed on before."""
    x_ND, count_E = layer.rows(load)
    spread = layer.experts.spread
    assert spread is not None
    count_WE = gather_counts(count_E, spread.groups.ep)
    exchange = Exchange.plan(count_WE, layer.layout, spread.groups, device=x_ND.device)
    weights = [local(parameter).detach().requires_grad_() for parameter in layer.experts.parameters()]
    rows = exchange.received

    def experts(x_ND: Tensor) -> Tensor:
        return feed_forward(x_ND, [len(x_ND)], weights)

    alone = [timed(experts, x_ND[:rows]) for _ in range(WARM)]
    forward = statistics.median(first for first, _ in alone) / rows
    backward = statistics.median(both - first for first, both in alone) / rows

    def sleep(x_ND: Tensor, *_: object) -> Tensor:
        return Sleep.apply(x_ND, forward, backward)

    def nothing(x_ND: Tensor, *_: object) -> Tensor:
        return x_ND.view_as(x_ND)

    runs: dict[str, Run] = {"experts": experts, "sleep": sleep}
    for degree in DEGREES:
        computes = {"exchange": (Piece(nothing, ()),), "sleep": (Piece(sleep, ()),), "experts": SWIGLU}
        for name, pieces in computes.items():
            way = Way(exchange, pieces, (degree, degree), False)
            given = weights if pieces is SWIGLU else []
            runs[f"{name} {degree}"] = lambda x_ND, way=way, given=given: way(x_ND, given)
    return runs, x_ND


def measure(rank: int, load: Load, pairs: int) -> Times:
    """Seconds of every part alone and together, in an order that changes."""
    runs, x_ND = parts(Layer(experts_of(SHAPE)), load)
    draw, times = random.Random(0), {name: [] for name in runs}
    for run in runs.values():
        timed(run, x_ND)
    for _ in range(pairs):
        for name in draw.sample(list(runs), len(runs)):
            times[name].append(timed(runs[name], x_ND)[1])
    return times


def even(capacity: int) -> Load:
    """Rows spread evenly: as many arrive as are sent."""
    given = loads(SHAPE, ranks=RANKS, steps=4, capacities=(capacity,), seed=0)
    return next(load for load in given if load.skew == "uniform")


def hidden(exchange: Sequence[float], compute: Sequence[float], both: Sequence[float]) -> Estimate:
    """Of what could be hidden, the shorter of the two, the share that was. With the exchange in one piece it contains what chunks
    gain by keeping the link busy."""
    triples = zip(exchange, compute, both, strict=True)
    return estimate([(x + c - b) / min(x, c) for x, c, b in triples])


def summary(times: Times) -> list[dict[str, Any]]:
    rows = []
    for compute in ("experts", "sleep"):
        for degree in DEGREES:
            together, chunked = times[f"{compute} {degree}"], times[f"exchange {degree}"]
            ms = {"compute ms": times[compute], "exchange ms": chunked, "both ms": together}
            rows.append({
                "compute": compute, "degree": degree,
                **{key: 1e3 * statistics.median(seconds) for key, seconds in ms.items()},
                "hidden": hidden(chunked, times[compute], together),
                "with link use": hidden(times["exchange 1"], times[compute], together),
                "exchange / degree 1": ratios(chunked, times["exchange 1"]),
                "both / degree 1": ratios(together, times[f"{compute} 1"]),
            })  # fmt: skip
    return rows


def overlap(hosts: Hosts, rates: Mapping[str, float], *, pairs: int, short: bool) -> list[dict[str, Any]]:
    found = []
    for regime, megabits in rates.items():
        limit(hosts, megabits)
        for capacity in SHORT_CAPACITIES if short else CAPACITIES:
            times = slowest(run_ranks(hosts, measure, even(capacity), pairs))
            rows = summary(times)
            print_table(f"overlap, {regime} ({megabits:.0f} Mbit/s), {capacity} rows a rank", rows)
            found.append({"regime": regime, "megabits": megabits, "capacity": capacity, "seconds": times, "rows": rows})
    return found


def compute_seconds(rank: int, load: Load) -> float:
    """Of the experts alone."""
    runs, x_ND = parts(Layer(experts_of(SHAPE)), load)
    return statistics.median(timed(runs["experts"], x_ND)[1] for _ in range(2 * WARM))
