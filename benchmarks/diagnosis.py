"""The diagnosis judged in simulated jobs, where the truth is known, beside two rules of others.

    python -m benchmarks.diagnosis [--ranks 1024 4096 16384] [--seed-set dev|held-out] [--short] [--json FILE]

Every scenario runs at several seeds and sizes; every method answers 3, 5, 10, 20 and 40 steps after the fault began. The held-out
seeds are a third of all and are for nothing but the last word. Then: false alarms over clean steps, summaries read a second, and
seconds of a verdict.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.diagnosis_scores import (
    Answer,
    Detect,
    Score,
    above_twice_the_median,
    below_three_quarters,
    between,
    score,
    strength,
    told,
)  # fmt: skip
from benchmarks.pairs import print_table, shown
from benchmarks.simulated_faults import SCENARIOS, Instance, instance, meshes
from benchmarks.simulated_jobs import Noise, simulate
from trainrt.diagnostics.table import PARTS, SUMMARY, WORK, StepTable

SEEDS = {"dev": tuple(range(8)), "held-out": (1000, 1001, 1006, 1007)}
OURS = "trainrt"
RIVALS: Mapping[str, Callable[[StepTable], Answer]] = {
    "2 x median": above_twice_the_median, "least / own < 0.75": below_three_quarters,
}  # fmt: skip
COSTLESS = 0.002
"""Of a step: where a fault costs less, silence is no mistake."""
WINDOW = 40

Row = dict[str, Any]


def seeds_of(name: str, ranks: int, seed_set: str) -> Sequence[int]:
    """All seeds of a set at 1,024 ranks; fewer of larger jobs, other ones for other scenarios."""
    seeds = SEEDS[seed_set]
    first = list(SCENARIOS).index(name)
    return [seeds[(first + turn) % len(seeds)] for turn in range(max(1, min(len(seeds), len(seeds) * 1024 // ranks)))]


def judge(case: Instance, detect: Detect) -> Iterator[Row]:
    """A row for each method and window. The other rules get the steps since the fault alone, which is to their good."""
    table = simulate(case.job, case.steps, case.conditions, seed=case.seed)
    twin = simulate(case.twin, case.steps, seed=case.seed)
    signal, cost = strength(table, twin, case.since)
    about = {"scenario": case.name, "mesh": case.mesh, "ranks": case.job.ranks, "seed": case.seed, "signal": signal}
    about |= {"cost": cost, "faulty": bool(case.truths), "truth": case.truths[0].causes[0] if case.truths else "none"}
    about |= {"severity": max((truth.severity or 0.0 for truth in case.truths), default=0.0)}
    for window in case.windows:
        seen = between(table, 0, case.since + window)
        begun = time.perf_counter()
        answers = {OURS: told(detect(seen), seen)}
        seconds = time.perf_counter() - begun
        answers |= {name: rule(between(table, case.since, case.since + window)) for name, rule in RIVALS.items()}
        for method, answer in answers.items():
            last = window == max(case.windows)
            timed = {"seconds": seconds if method == OURS else None}
            yield {
                **about,
                "method": method,
                "window": window,
                "last": last,
                **timed,
                **_flat(score(answer, case.truths)),
            }


def _flat(given: Score) -> Row:
    names = ("alarm", "where", "why", "action", "cause", "all_found", "wrong_claims", "named", "right")
    return {name: getattr(given, name) for name in names}


# Tables.


def share(rows: Sequence[Row], name: str) -> float | None:
    said = [row[name] for row in rows if row[name] is not None]
    return sum(said) / len(said) if said else None


def counted(row: Row) -> bool:
    """Whether silence about it is a mistake."""
    return bool(row["faulty"] and row["cost"] >= COSTLESS)


def totals(rows: Sequence[Row]) -> Iterator[Row]:
    """By method, of its last answers. named: alarms that name whom they should; right: that give the cause too, where the method
    says one. The rates of the first claim are over alarms where something is wrong.
    """
    for method in (OURS, *RIVALS):
        last = [row for row in rows if row["method"] == method and row["last"]]
        alarms = [row for row in last if row["alarm"]]
        faulty = [row for row in last if counted(row)]
        severe = [row for row in faulty if row["severity"] >= 0.1]
        aimed = [row for row in alarms if row["faulty"]]
        healthy = [row for row in last if not row["faulty"]]
        yield {
            "method": method, "instances": len(last), "precision, named": share(alarms, "named"),
            "recall, named": share(faulty, "named"), "the same at 10 % slow and more": share(severe, "named"),
            "precision, right": share(alarms, "right"), "recall, right": share(faulty, "right"),
            "top-1 place": share(aimed, "where"), "cause": share(aimed, "why"), "action": share(aimed, "action"),
            "all found": share(faulty, "all_found"), "wrong claims": sum(row["wrong_claims"] for row in last),
            "healthy, alarmed": f"{sum(row['alarm'] for row in healthy)} of {len(healthy)}",
        }  # fmt: skip


def first_right(rows: Sequence[Row]) -> float:
    """Steps from the fault to the first window whose answer is right; endless where none is."""
    return min((row["window"] for row in rows if row["right"]), default=float("inf"))


def cases(rows: Sequence[Row], method: str) -> dict[tuple[Any, ...], list[Row]]:
    """Windows of each instance."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["method"] == method:
            found.setdefault((row["scenario"], row["mesh"], row["ranks"], row["seed"]), []).append(row)
    return found


def by_scenario(rows: Sequence[Row]) -> Iterator[Row]:
    for name in dict.fromkeys(row["scenario"] for row in rows):
        of = [row for row in rows if row["scenario"] == name]
        ours = [row for row in of if row["method"] == OURS and row["last"]]
        steps = [first_right(windows) for windows in cases(of, OURS).values()]
        faulty = ours[0]["faulty"]
        rivals = {
            rival: share([row for row in of if row["method"] == rival and row["last"]], "right" if faulty else "alarm")
            for rival in RIVALS
        }
        yield {
            "scenario": name, "n": len(ours), "signal / noise": float(np.median([row["signal"] for row in ours])),
            "cost of a step": f"{np.median([row['cost'] for row in ours]):.1%}", "alarmed": share(ours, "alarm"),
            "right": share(ours, "right") if faulty else None, "place": share(ours, "where"),
            "cause": share(ours, "why"), "action": share(ours, "action"),
            "steps to verdict": float(np.median(steps)) if faulty else None, **rivals,
        }  # fmt: skip


def by_severity(rows: Sequence[Row]) -> Iterator[Row]:
    """Steps to the right verdict about slow ranks and hosts."""
    found = cases(rows, OURS)
    for severity in sorted({row["severity"] for row in rows if row["severity"]}):
        of = [windows for windows in found.values() if windows[0]["severity"] == severity]
        steps = sorted(map(first_right, of))
        middle, most = steps[len(steps) // 2], steps[int(np.ceil(0.9 * len(steps))) - 1]
        costly = sum(counted(windows[0]) for windows in of)
        yield {
            "slower by": f"{severity:.0%}",
            "n": len(of),
            "n that cost": costly,
            "median": middle,
            "nine in ten": most,
        }


def confusion(rows: Sequence[Row]) -> str:
    """Markdown: by the truth (of two, the first), the cause of the first claim."""
    last = [row for row in rows if row["method"] == OURS and row["last"]]
    counts = Counter((row["truth"], row["cause"]) for row in last)
    causes = sorted({cause for pair in counts for cause in pair})
    lines = ["| truth \\ said | " + " | ".join(causes) + " |", "|---" * (len(causes) + 1) + "|"]
    for truth in causes:
        if any(truth == pair[0] for pair in counts):
            cells = [f"**{counts[truth, c]}**" if c == truth else str(counts[truth, c] or "") for c in causes]
            lines.append(f"| {truth} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def markdown(rows: Sequence[Row]) -> str:
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(map(_cell, row.values())) + " |" for row in rows)])


def _cell(value: Any) -> str:
    return "" if value is None else shown(value)


# Costs.


def false_alarms(detect: Detect, *, ranks: int, steps: int, seed: int, noise: Noise | None = None) -> Row:
    """Alarms in clean steps, window after window; jobs of each kind of mesh take turns. Memory is that of one window."""
    wrong = {OURS: 0, **dict.fromkeys(RIVALS, 0)}
    jobs = list(meshes(ranks).values())
    causes: Counter[str] = Counter()
    for number, first in enumerate(range(0, steps, WINDOW)):
        job = jobs[number % len(jobs)]
        job = replace(job, noise=noise or job.noise)
        table = simulate(job, min(WINDOW, steps - first), seed=seed, first=first)
        answers = {OURS: told(detect(table), table)} | {name: rule(table) for name, rule in RIVALS.items()}
        causes.update(str(claim.cause) for claim in answers[OURS])
        for method, answer in answers.items():
            wrong[method] += bool(answer)
    return {"ranks": ranks, "clean steps": steps, "windows": -(-steps // WINDOW), **wrong, "of": dict(causes)}


def summaries_a_second(*, ranks: int, steps: int) -> float:
    """From bytes as they lie in `events/summaries.bin` to a table, on one core."""
    case = instance("clean", ranks, 0)
    table = simulate(case.job, steps, seed=0)
    records = np.zeros((steps, ranks), dtype=SUMMARY)
    records["step"], records["rank"] = table.steps[:, None], np.arange(ranks)
    records["start"], records["seconds"] = table.start, table.seconds
    for kind, names in ((table.parts, PARTS), (table.communication, table.communication), (table.work, WORK)):
        for name in names:
            records[name] = kind[name]
    data = np.random.default_rng(0).permutation(records.reshape(-1)).tobytes()
    begun = time.perf_counter()
    StepTable.of(np.frombuffer(data, dtype=SUMMARY), table.roles)
    return steps * ranks / (time.perf_counter() - begun)


def verdict_seconds(detect: Detect, *, ranks: int) -> float:
    """Median of five verdicts over WINDOW steps with a slow rank."""
    case = instance("slow rank 10%", ranks, 0)
    table = between(simulate(case.job, case.steps, case.conditions, seed=0), case.steps - WINDOW, case.steps)
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        detect(table)
        seconds.append(time.perf_counter() - begun)
    return float(np.median(seconds))


def campaign(
    detect: Detect, sizes: Sequence[int], seed_set: str, *, names: Sequence[str] = (), noise: Noise | None = None
) -> list[Row]:
    """All rows of a seed set."""
    rows: list[Row] = []
    for ranks in sizes:
        for name in names or SCENARIOS:
            for seed in seeds_of(name, ranks, seed_set):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", RuntimeWarning)  # ranks that are never heard have no median
                    rows += judge(instance(name, ranks, seed, noise=noise), detect)
    return rows


def show(rows: Sequence[Row]) -> None:
    for title, table in (("All", totals(rows)), ("Scenarios", by_scenario(rows)), ("Severity", by_severity(rows))):
        print(f"\n### {title}\n\n" + markdown(list(table)))
    print(f"\n### Causes\n\n{confusion(rows)}")


def main() -> None:
    from trainrt.diagnostics.detect import detect

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--seed-set", choices=list(SEEDS), default="dev")
    parser.add_argument("--scenarios", nargs="+", choices=list(SCENARIOS), default=[], metavar="NAME")
    parser.add_argument("--clean-ranks", type=int, default=10240)
    parser.add_argument("--clean-steps", type=int, default=10000)
    parser.add_argument("--residuals", type=Path, help="log-residuals of real runs, one a line or .npy")
    parser.add_argument("--noise", type=float, default=1.0, help="times the residuals as they were measured")
    parser.add_argument("--short", action="store_true", help="one size, few clean steps")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sizes, clean_ranks, clean_steps = options.ranks, options.clean_ranks, options.clean_steps
    if options.short:
        sizes, clean_ranks, clean_steps = [256], 1024, 400
    noise = Noise(scale=options.noise, file=options.residuals)
    begun = time.perf_counter()
    rows = campaign(detect, sizes, options.seed_set, names=options.scenarios, noise=noise)
    show(rows)
    seed = SEEDS[options.seed_set][0]
    clean = false_alarms(detect, ranks=clean_ranks, steps=clean_steps, seed=seed, noise=noise) if clean_steps else {}
    costs = {
        "summaries a second": summaries_a_second(ranks=max(sizes), steps=20),
        f"seconds of a verdict at {max(sizes)} ranks": verdict_seconds(detect, ranks=max(sizes)),
    }
    if clean:
        print_table("\nFalse alarms", [clean])
    print_table("\nCosts", [costs])
    print(f"\n{time.perf_counter() - begun:.0f} s, seeds {options.seed_set}, sizes {sizes}")
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "clean": clean, "costs": costs}, indent=1))


if __name__ == "__main__":
    main()
