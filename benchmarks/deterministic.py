"""What `run.deterministic` costs: steps with sums in one order against ordinary ones, on two ranks.

    python -m benchmarks.deterministic [--pairs 7]

Two engines of one model live side by side and step in turn; once with one round of microbatches a step, once with four. Prints
the median of the pairwise ratios of seconds (deterministic over ordinary, below 1 it is faster) and their spread.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS, LENGTH, MICROBATCH = 2, 128, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    arguments = parser.parse_args()
    for rounds in (1, 4):
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(measure, (f"{folder}/store", rounds, arguments.pairs), nprocs=RANKS)


def measure(rank: int, store: str, rounds: int, pairs: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    engines = [make(rank, rounds, deterministic=deterministic) for deterministic in (False, True)]
    generator = torch.Generator().manual_seed(rank)
    tokens = torch.randint(256, (MICROBATCH, LENGTH + 1), generator=generator)
    batch = ({"input_ids": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}, 1)
    seconds: list[list[float]] = [[], []]
    for step in range(1, pairs + 2):
        for engine, times in zip(engines, seconds, strict=True):
            dist.barrier()
            start = time.perf_counter()
            engine.step(step, [batch] * rounds, leaves=RANKS * rounds, steps=1000)
            times.append(time.perf_counter() - start)
    ratios = sorted(theirs / ours for ours, theirs in zip(*(times[1:] for times in seconds), strict=True))
    if rank == 0:
        ordinary = statistics.median(seconds[0][1:])
        elements = sum(tensor.numel() for tensor in engines[0].local.values()) * RANKS
        print(
            f"{rounds} round(s), {elements / 1e6:.0f} M parameters, ordinary step {ordinary:.2f} s: "
            f"{statistics.median(ratios):.3f}x ({ratios[0]:.3f} - {ratios[-1]:.3f})"
        )
    dist.barrier()
    os._exit(0)


def make(rank: int, rounds: int, *, deterministic: bool):
    from trainrt.config import parse
    from trainrt.parallel.mesh import make_groups
    from trainrt.training.engines.native import NativeEngine
    from trainrt.training.models.build import build
    from trainrt.training.pipeline import Pipeline, loss_function
    from trainrt.training.planning import make_plan

    sizes = {"layers": 4, "hidden_size": 256, "heads": 4, "kv_heads": 2, "intermediate_size": 512, "vocab_size": 320}
    config = parse(
        {
            "run": {"steps": 1000, "deterministic": deterministic},
            "model": {"config": sizes},
            "data": {"sequence_length": LENGTH, "microbatch": MICROBATCH, "global_batch": MICROBATCH * RANKS * rounds},
            "parallel": {"mode": "explicit", "fsdp": RANKS},
            "cluster": {"nodes": 1, "workers_per_node": RANKS, "device": "cpu"},
        }
    )
    plan = make_plan(config, world_size=RANKS)
    groups = make_groups(plan.mesh, torch.device("cpu"))
    loss = loss_function(config, Pipeline())
    return NativeEngine(build(config, fresh=True), plan, groups, config=config, loss=loss, rank=rank)


if __name__ == "__main__":
    main()
