"""Mixtures with zero, copy and constant experts (MoE++, arXiv 2410.07348) beside plain ones: rows exchanged, and losses.

    python -m benchmarks.moe_plus [--steps 300] [--seeds 5] [--short] [--json FILE] [--plot FILE.svg]

A moe_lm of 8 experts, top 2, on the standard library's sources as bytes, without and with 1 zero, 1 copy and 2 constant experts
beside these (tau 0.75, no capacity limit); all else is equal: seed, samples, steps, and the first values of what both have.

rows: over ep 2 on two gloo ranks, rows handed to all-to-alls, forward and backward, by the events' bytes, against what the
routers chose; ends with 1 where they are not equal, rank by rank and step by step.
losses: on one process of one thread, both arms in turn step by step; means over the steps of each tenth, in brackets the least
and the most of all seeds; "difference" is MoE++ less plain of the same seed. Seconds: the median of the ratios of steps next
to each other, in brackets the bootstrap's 95 % interval.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.moe_plus_runs import ARMS, EXPERTS, PLAIN, PLUS, Curve, Shape, curves, exchanged
from benchmarks.pairs import ratios
from benchmarks.svg import Line, Panel, chart
from tests.ranks import run_ranks

RANKS = 2
EXCHANGE_STEPS = 20
WARM_UP = 2
"""Steps that are not timed."""
PARTS, POINTS = 10, 50
"""Parts of a run in the table, and in the plot."""
SHORT = Shape(layers=2, hidden_size=32, intermediate_size=32, length=32)
SHORT_STEPS = 4

Runs = list[dict[str, Curve]]
"""Of each seed, both arms."""


def rows_exchanged(shape: Shape, steps: int) -> list[dict[str, Any]]:
    """One row an arm: the choices of all ranks, and rows exchanged as counted and as the routing says."""
    of_ranks = run_ranks(RANKS, exchanged, shape, steps, RANKS, timeout=600)
    found = []
    for arm in ARMS:
        counted_WS = np.array([of_rank[arm]["rows"] for of_rank in of_ranks])
        chosen_WSA = np.array([of_rank[arm]["chosen"] for of_rank in of_ranks])
        said_WS = by_the_routing(chosen_WSA[..., :EXPERTS])
        choices, free = int(chosen_WSA.sum()), int(chosen_WSA[..., EXPERTS:].sum())
        found.append({
            "arm": arm, "choices": choices, "of zero-computation experts": free, "share": free / choices,
            "rows exchanged": int(counted_WS.sum()), "by the routing": int(said_WS.sum()),
            "equal": bool((counted_WS == said_WS).all()),
        })  # fmt: skip
    return [{**row, "over plain": row["rows exchanged"] / found[0]["rows exchanged"]} for row in found]


def by_the_routing(chosen_WSE: NDArray[np.int64]) -> NDArray[np.int64]:
    """A rank's all-to-alls of a step hold its rows and those for its experts, forward and backward."""
    ranks, steps, _ = chosen_WSE.shape
    to_WSW = chosen_WSE.reshape(ranks, steps, ranks, -1).sum(-1)
    return 2 * (to_WSW.sum(2) + to_WSW.sum(0).T)


def shrinks_by_the_share(rows: Sequence[Mapping[str, Any]]) -> bool:
    """All is as the routing says, and what MoE++ spares are four rows for each that chose a zero-computation expert."""
    plain, plus = rows
    spared = plain["rows exchanged"] - plus["rows exchanged"]
    return plain["equal"] and plus["equal"] and spared == 4 * plus["of zero-computation experts"]


def in_parts(values: Sequence[float], parts: int) -> list[float]:
    """The mean of each part of a run."""
    return [float(part.mean()) for part in np.array_split(np.array(values), min(parts, len(values)))]


def last_steps(steps: int, parts: int) -> list[int]:
    """The last step of each part."""
    return [int(part[-1]) for part in np.array_split(np.arange(1, steps + 1), min(parts, steps))]


def over_seeds(runs: Runs, value: Callable[[dict[str, Curve]], Sequence[float]]) -> list[tuple[float, float, float]]:
    """At each place of a sequence its mean, least and most over all seeds."""
    return [(statistics.mean(of), min(of), max(of)) for of in zip(*map(value, runs), strict=True)]


def losses(parts: int) -> dict[str, Callable[[dict[str, Curve]], list[float]]]:
    """What a run's losses are, part by part: of each arm, and how they differ."""
    return {
        PLAIN: lambda run: in_parts(run[PLAIN].loss, parts),
        PLUS: lambda run: in_parts(run[PLUS].loss, parts),
        "difference": lambda run: in_parts(np.subtract(run[PLUS].loss, run[PLAIN].loss).tolist(), parts),
    }


def held_out(run: dict[str, Curve]) -> list[float]:
    """Losses on the validation split in the order of `losses`."""
    plain, plus = run[PLAIN].validation, run[PLUS].validation
    return [plain, plus, plus - plain]


def loss_table(runs: Runs) -> list[dict[str, str]]:
    steps = len(runs[0][PLAIN].loss)
    columns = {name: over_seeds(runs, value) for name, value in losses(PARTS).items()}
    shares = over_seeds(runs, lambda run: in_parts(run[PLUS].share, PARTS))
    rows = [
        {"up to step": str(last)} | {name: _spread(column[i]) for name, column in columns.items()}
        | {"share of zero-computation experts": _spread(shares[i])}
        for i, last in enumerate(last_steps(steps, PARTS))
    ]  # fmt: skip
    of_validation = zip(columns, map(_spread, over_seeds(runs, held_out)), strict=True)
    return [*rows, {"up to step": "validation"} | dict(of_validation) | {"share of zero-computation experts": ""}]


def seconds(runs: Runs, arm: str) -> list[float]:
    """Of each timed step of all seeds."""
    return [value for run in runs for value in run[arm].seconds[WARM_UP:]]


def drawn(runs: Runs) -> str:
    """Both curves, and their difference, as SVG."""
    lines = {name: Line(name, *zip(*over_seeds(runs, value), strict=True)) for name, value in losses(POINTS).items()}
    panels = [
        Panel(f"training loss, nats a byte; mean and range of {len(runs)} seeds", [lines[PLAIN], lines[PLUS]]),
        Panel("MoE++ less plain, of the same seed", [lines["difference"]]),
    ]
    return chart(panels, last_steps(len(runs[0][PLAIN].loss), POINTS), "step")


def print_markdown(rows: Sequence[Mapping[str, Any]]) -> None:
    for line in (rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows)):
        print(f"| {' | '.join(_shown(line))} |", flush=True)


def _shown(line: Iterable[Any]) -> Iterable[str]:
    return (f"{value:.3f}" if type(value) is float else str(value) for value in line)


def _spread(of: tuple[float, float, float]) -> str:
    mean, least, most = of
    return f"{mean:.3f} ({least:.3f} - {most:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--short", action="store_true", help=f"a smaller model, {SHORT_STEPS} steps, one seed: does it run"
    )
    parser.add_argument("--json", type=Path, help="a file for all that was measured")
    parser.add_argument("--plot", type=Path, help="a file for the curves, SVG")
    options = parser.parse_args()
    shape, steps, seeds = (SHORT, SHORT_STEPS, 1) if options.short else (Shape(), options.steps, options.seeds)
    rows = rows_exchanged(shape, min(steps, EXCHANGE_STEPS))
    print_markdown(rows)
    runs = [run_ranks(1, curves, shape, steps, seed, timeout=3600)[0] for seed in range(seeds)]
    print_markdown(loss_table(runs))
    ratio = ratios(seconds(runs, PLUS), seconds(runs, PLAIN))
    typical = {arm: f"{statistics.median(seconds(runs, arm)):.3f} s" for arm in ARMS}
    print(f"seconds of a step, MoE++ over plain: {ratio}; medians {typical}")
    if options.json:
        curves_of = [{arm: asdict(curve) for arm, curve in run.items()} for run in runs]
        found = {"rows": rows, "curves": curves_of, "seconds": ratio._asdict()}
        options.json.write_text(json.dumps(found, indent=1))
    if options.plot:
        options.plot.write_text(drawn(runs))
    if not shrinks_by_the_share(rows):
        raise SystemExit("rows exchanged are not those that the routing says")


if __name__ == "__main__":
    main()
