"""Tensor parallelism on two gloo processes, beside its peers: which model families come out right, and what a step takes.

    python -m benchmarks.tensor_parallel --part coverage [--families llama,t5] [--frameworks ours,hf,deepspeed] [--markdown]
    python -m benchmarks.tensor_parallel --part speed [--sizes large,small] [--arms ours,tutorial,hf] [--rounds 5]

coverage: small models of the families in tests/parallel/architectures.py, float32, at tp = 2 under trainrt's derived plans,
transformers' own `tp_plan` (a saved checkpoint, loaded with it) and DeepSpeed's AutoTP for training (automatic; where that
does not come out right and DeepSpeed has a preset for the family, with that). Every cell has fresh processes and a time limit.
One process's loss and gradients are the measure: the loss to 1e-6, each gradient to 5e-6 of its own norm (where that norm is
below 1e-6 of all gradients' it is rounding, a key's bias has nothing else, and has to stay below). Gradients of shards are
made whole by what each framework has for it: DTensor.full_tensor, DeepSpeed's gather_params; ours are compared where they
lie. Where gradients cannot be put side by side, the loss after three steps of SGD decides, to 1e-5 ("by steps"). What runs but
is off is measured once more in float64 to the same bounds: what remains is not rounding ("in float64" where nothing remains).
DeepSpeed's backward and torch's grouped product of experts take no float64: there the float32 result stands.
  right F        both ranks agree with one process; a rank holds the fraction F of all parameters, embeddings included
  replicated F   right, but F is above 0.95: nearly nothing is split
  wrong: what    the first thing that differs, or that fails while it runs
  refused: why   an error while the model is split

transformers asks for accelerate before it loads with a plan; where that is not installed, only this check is skipped.

speed: forward and backward of a Llama (sdpa, cross entropy over the logits), two ranks of one thread each, against torch's
`parallelize_module` with the plan of its tensor parallelism tutorial and against the `tp_plan`. The arms share the processes and
take turns, in another order each round; the losses have to agree first. In brackets: what a step sends.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.tensor_parallel_coverage import FRAMEWORKS, coverage
from benchmarks.tensor_parallel_speed import ARMS, SIZES, speed
from tests.parallel import architectures


def names(known: dict[str, object]) -> dict[str, object]:
    """An option that takes some of the known names, all of them by default."""

    def parse(text: str) -> list[str]:
        given = text.split(",")
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]} is none of {', '.join(known)}")
        return given

    return {"type": parse, "default": list(known)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("coverage", "speed"), required=True)
    parser.add_argument("--families", **names(architectures.FAMILIES))
    parser.add_argument("--frameworks", **names(FRAMEWORKS))
    parser.add_argument("--markdown", action="store_true", help="coverage: print the table of the documentation")
    parser.add_argument("--limit", type=float, default=120.0, help="coverage: seconds that a cell may take")
    parser.add_argument("--logs", type=Path, help="coverage: a folder for what the ranks print")
    parser.add_argument("--sizes", **names(SIZES))
    parser.add_argument("--arms", **names(ARMS))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.part == "speed":
        speed(options.sizes, options.arms, options.rounds)
    else:
        coverage(
            options.families, options.frameworks, markdown=options.markdown, seconds=options.limit, logs=options.logs
        )


if __name__ == "__main__":
    main()
