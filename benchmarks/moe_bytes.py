"""Bytes that cross the link between two hosts in a step of the layer, beside what follows from the counts; see `benchmarks.moe`.

Measured is what TCP has sent to the other host, retransmissions taken off: the kernel counts it for each connection (`ss`).
The interface's own counter, which has headers, acknowledgements and retransmissions on top, is given too.

Legend: W ranks, E experts, N rows of a rank, D width, F inner width, S slices of an expert, b bytes of a number.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch.distributed as dist

from benchmarks.moe_hosts import INTERFACE, limit, run_ranks
from benchmarks.moe_layer import SKEWS, Layer, Load, Shape, experts_of, loads, strategies
from benchmarks.pairs import print_table
from tests.launch.hosts import Hosts
from trainrt.parallel.moe.layout import ExpertLayout
from trainrt.parallel.moe.strategy import Fixed, Strategy

NUMBER, COUNT = 4, 8
"""Bytes of a float32, and of a count of rows."""
CAPACITY, DEGREES, STEPS = 1024, (1, 8), 2
MEGABITS = 1000.0
"""A link on which bytes are counted, not seconds."""


@dataclass(frozen=True, slots=True)
class Sent:
    """By one host to the other. payload: inside TCP; wire: by the interface, with all headers."""

    payload: float
    wire: float


def formula(shape: Shape, load: Load, strategy: Strategy, *, ranks: int, host: int) -> int:
    """Bytes that a host sends to the other in forward and backward; neighbours are on one host.

    Rows: p sends n_pq copies of rows to q, and they and their gradients travel there and back:
        2 D b (n_pq + n_qp) from p to q, whether straight or through the ranks of a host.
    Counts of rows, and what ranks agree on, in a ring before: 8 (W - 1) (E + A) from each to the next.
    Weights: in a ring of w ranks, w = W for r = 0 and S / r else, each passes w - 1 parts on to the next, a part being what
    a rank holds, 3 D F b times its experts or over S. In backward each sends one part to every other:
        (w - 1) part from each to the next, and a part from each to each.
    The number of chunks changes nothing.
    """
    layout = ExpertLayout(shape.experts, ranks)
    of_host = [rank * 2 // ranks for rank in range(ranks)]
    there = [(p, q) for p in range(ranks) for q in range(ranks) if of_host[p] == host != of_host[q]]
    width = ranks if strategy.r == 0 else layout.slices // strategy.r
    most = max(layout.here(rank) for rank in range(ranks))
    part = 3 * shape.width * shape.inner * NUMBER * most // layout.slices
    passed = sum((width - 1) * part for p, q in there if q == p // width * width + (p + 1) % width)
    passed += sum(part for p, q in there if q // width == p // width)
    agreed = layout.experts + len(Fixed(strategy).agreed)
    passed += sum((ranks - 1) * agreed * COUNT for p, q in there if q == (p + 1) % ranks)
    if strategy.r == 0:
        return passed
    row = 2 * shape.width * NUMBER
    both = [(p, q) for pair in there for p, q in (pair, pair[::-1])]
    return passed + row * sum(copies(layout, load.counts[p], q, strategy.r) for p, q in both)


def copies(layout: ExpertLayout, count_E: tuple[int, ...], rank: int, r: int) -> int:
    """Rows that one who has so many for each expert sends to a rank: of a sliced expert's, each group gets all in turn."""
    first, width = layout.first(rank), layout.slices // r
    place = rank % layout.slices % width
    return sum((count_E[first + i] + width - 1 - place) // width for i in range(layout.here(rank)))


def counters() -> Sent:
    """Of this host until now, to other hosts."""
    connections = subprocess.run(["ss", "-tinHO"], check=True, capture_output=True, text=True).stdout
    payload = 0
    for line in connections.splitlines():
        own, other = re.findall(r"(\d+\.\d+\.\d+\.\d+):\d+", line)
        if own != other:
            payload += _field(line, "bytes_sent") - _field(line, "bytes_retrans")
    return Sent(payload, int(Path(f"/sys/class/net/{INTERFACE}/statistics/tx_bytes").read_text()))


def _field(line: str, name: str) -> int:
    found = re.search(rf"\b{name}:(\d+)", line)
    return int(found[1]) if found else 0


def count(rank: int, shape: Shape, given: list[Load]) -> list[Sent]:
    """What this rank's host sends in a step of every load under every strategy."""
    layer = Layer(experts_of(shape))
    found = []
    for load in given:
        x_ND, count_E = layer.rows(load)
        for strategy in strategies(layer.layout, DEGREES, hosts=layer.hosts):
            before = _settled()
            for _ in range(STEPS):
                layer.step(Fixed(strategy), x_ND, count_E)
            after = _settled()
            found.append(Sent((after.payload - before.payload) / STEPS, (after.wire - before.wire) / STEPS))
    return found


def _settled() -> Sent:
    """What was sent before has been counted when all have come here, and nobody sends before all have counted."""
    dist.barrier()
    sent = counters()
    dist.barrier()
    return sent


def compare(hosts: Hosts, shape: Shape, *, ranks: int, kinds: int) -> list[dict[str, Any]]:
    given = loads(shape, ranks=ranks, steps=kinds, capacities=(CAPACITY,), seed=0)
    found = run_ranks(hosts, count, shape, given, ranks=ranks)
    cases = list(product(given, strategies(ExpertLayout(shape.experts, ranks), DEGREES, hosts=ranks > 2)))
    rows = []
    for host, (position, (load, strategy)) in product((0, 1), enumerate(cases)):
        wanted, sent = formula(shape, load, strategy, ranks=ranks, host=host), found[host * ranks // 2][position]
        rows.append({
            "ranks": ranks, "experts": shape.experts, "load": load.kind, "r": strategy.r, "degree": strategy.degree,
            "host": host, "formula": wanted, "payload": sent.payload, "wire": sent.wire,
            "error": sent.payload / wanted - 1, "overhead": sent.wire / wanted - 1,
        })  # fmt: skip
    return rows


def bytes_sent(hosts: Hosts, *, short: bool) -> list[dict[str, Any]]:
    """Every r on two ranks and on four, with rows spread evenly and not."""
    limit(hosts, MEGABITS)
    rows = []
    for ranks, experts in product((2, 4), (1,) if short else (4, 2, 1)):
        rows += compare(hosts, Shape(experts), ranks=ranks, kinds=2 if short else len(SKEWS))
    print_table(f"bytes that a host sends in a step, {CAPACITY} rows a rank; furthest off the formula", furthest(rows))
    return rows


def furthest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each layout and r, the mean of the formula and the largest errors."""
    lines = []
    for case in sorted({(row["ranks"], row["experts"], row["r"]) for row in rows}):
        of = [row for row in rows if (row["ranks"], row["experts"], row["r"]) == case]
        worst = {key: max((row[key] for row in of), key=abs) for key in ("error", "overhead")}
        lines.append(
            dict(zip(("ranks", "experts", "r"), case, strict=True))
            | {"bytes": round(sum(row["formula"] for row in of) / len(of))}
            | {"in TCP": f"{worst['error']:.2%}", "with headers": f"{worst['overhead']:.2%}"}
        )
    return lines
