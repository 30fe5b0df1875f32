"""Tokens per second of `trainrt launch` against a hand-written torchrun script: same model, mesh and data.

    python -m benchmarks.overhead [--pairs 5] [--steps 24]

Three arms in turn (script, launch without snapshots, launch with one every step), for steps of some 0.15 s and of about a
second, two ranks. Prints the median of the pairwise ratios of tokens per second and their spread; above 1 ours is faster.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SIZES = {
    "short": {"hidden_size": 64, "intermediate_size": 128, "batch": 16, "length": 128},
    "one second": {"hidden_size": 160, "intermediate_size": 320, "batch": 24, "length": 256},
}
WARM_UP = 6
ROOT = Path(__file__).parents[1]


def job(folder: Path, size: dict[str, int], *, steps: int, every: int) -> Path:
    path = folder / f"job-{every}.toml"
    path.write_text(f"""
[run]
steps = {steps}
[model.config]
layers = 2
heads = 4
kv_heads = 2
hidden_size = {size["hidden_size"]}
intermediate_size = {size["intermediate_size"]}
[data]
sequence_length = {size["length"]}
global_batch = {size["batch"]}
microbatch = 4
[parallel]
mode = "explicit"
fsdp = 2
[cluster]
nodes = 1
workers_per_node = 2
device = "cpu"
[snapshot]
every = {every}
[checkpoint]
every = 0
[evaluation]
samples = 0
[diagnostics]
dashboard = false
""")
    return path


def peer(path: Path) -> list[float]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    result = subprocess.run(
        [*command, str(ROOT / "benchmarks" / "torchrun_peer.py"), str(path)],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    return json.loads(result.stdout.strip().splitlines()[-1])


def ours(path: Path) -> list[float]:
    run_dir = path.parent / "run"
    shutil.rmtree(run_dir, ignore_errors=True)
    command = [sys.executable, "-m", "trainrt.cli", "launch", str(path), "--run-dir", str(run_dir)]
    subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return [json.loads(line)["step_seconds"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def typical(seconds: list[float]) -> float:
    return statistics.median(seconds[WARM_UP:])


def show(name: str, ratios: list[float]) -> None:
    print(f"  {name:28s} median {statistics.median(ratios):.3f}  min {min(ratios):.3f}  max {max(ratios):.3f}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=24)
    options = parser.parse_args()
    for name, size in SIZES.items():
        without, every = [], []
        with tempfile.TemporaryDirectory() as folder:
            plain = job(Path(folder), size, steps=options.steps, every=0)
            protected = job(Path(folder), size, steps=options.steps, every=1)
            for _ in range(options.pairs):
                theirs = typical(peer(plain))
                without.append(theirs / typical(ours(plain)))
                every.append(theirs / typical(ours(protected)))
        print(f"{name}: a step of {theirs:.2f} s by hand; tokens/s of launch over the script, {options.pairs} pairs")
        show("no snapshots", without)
        show("a snapshot every step", every)


if __name__ == "__main__":
    main()
