"""Tensor parallelism derived for every causal language model type of transformers, compared with a single process.

    python -m benchmarks.causal_models [TYPE ...] [--ranks 2] [--json FILE] [--markdown]

Each type is a tiny model with random weights on gloo ranks, in fresh processes. It is right where the loss and every gradient
are those of one process: in fp64, to 1e-12; where its code does not run in fp64, in fp32 to 1e-6 and 5e-6.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.parallel import causal_models
from tests.parallel.sharding_check import IMPORTED, Outcome, check
from tests.ranks import preload, run_ranks

LIMIT = 120.0
"""Seconds for one type."""

RESULTS = ("right", "refused", "not buildable", "wrong")


def outcome_of(kind: str, ranks: int) -> Outcome:
    """In fp64; in fp32 where a single process cannot run the type in fp64."""
    for exact in (True, False):
        try:
            found: list[Outcome] = run_ranks(ranks, check, kind, exact, timeout=LIMIT)
        except AssertionError as error:
            return Outcome("wrong", f"processes: {str(error).strip().splitlines()[-1][:300]}")
        worst = max(found, key=lambda one: RESULTS.index(one.result))
        if not worst.reason.startswith("a single process in fp64"):
            return worst
    return worst


def line(kind: str, outcome: Outcome) -> str:
    if outcome.result != "right":
        return f"{kind:26} {outcome.result:14} {outcome.reason}"
    gathered = " ".join(f"{name}:{n}" for name, n in sorted(outcome.gathered.items()))
    return (
        f"{kind:26} {outcome.result:14} {outcome.precision} held {outcome.held:.3f} "
        f"loss {outcome.loss:.0e} gradients {outcome.gradient:.0e} gathered {sum(outcome.gathered.values())} {gathered}"
    )


def markdown(found: dict[str, Outcome]) -> str:
    """A table of the results."""
    rows = ["| type | result | held fraction at tp 2 | gathered operators | reason |", "|---|---|---|---|---|"]
    for kind, outcome in found.items():
        ran = outcome.result == "right"
        gathered = ", ".join(f"{name} x {n}" for name, n in sorted(outcome.gathered.items())) or "none"
        reason = outcome.reason.replace("|", "\\|")
        held = f"{outcome.held:.3f}" if ran else ""
        rows.append(f"| `{kind}` | {outcome.result} | {held} | {gathered if ran else ''} | {reason} |")
    return "\n".join(rows)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", metavar="TYPE")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args(arguments)
    preload(*IMPORTED)
    found: dict[str, Outcome] = {}
    for kind in options.types or causal_models.types():
        began = time.monotonic()
        found[kind] = outcome_of(kind, options.ranks)
        print(f"{line(kind, found[kind])} ({time.monotonic() - began:.1f} s)", file=sys.stderr, flush=True)
        if options.json is not None:
            document: dict[str, Any] = {name: asdict(outcome) for name, outcome in found.items()}
            options.json.write_text(json.dumps(document, indent=1))
    if options.markdown:
        print(markdown(found))
    counts = Counter(outcome.result for outcome in found.values())
    print(", ".join(f"{counts[result]} {result}" for result in RESULTS))
    return 1 if counts["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
