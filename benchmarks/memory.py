"""Memory as planned against memory as used: the peak of resident memory of real ranks over their start.

    python -m benchmarks.memory

Each form runs in fresh processes. The start is after imports, process groups and a first tiny step of another model, so that
libraries have what they need; the model is made on every rank, so its full size is freed before the peak is looked for.
"""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

from tests.jobs import engine, job, leaves, train
from tests.ranks import run_ranks
from trainrt.training.planning import make_plan

SIZES = {"layers": 6, "hidden_size": 512, "heads": 8, "kv_heads": 8, "intermediate_size": 1408, "vocab_size": 8192,
         "max_position": 512}  # fmt: skip
LLAMA = {"model_type": "llama", "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
         "num_key_value_heads": 8, "vocab_size": 8192, "max_position_embeddings": 512}  # fmt: skip
M_MMAP_THRESHOLD = -3
FORMS: dict[str, tuple[str, dict[str, int], dict[str, Any]]] = {
    "llama, one rank": ("huggingface", {}, {}),
    "llama, fsdp 2": ("huggingface", {"fsdp": 2}, {}),
    "llama, fsdp 2, one round": ("huggingface", {"fsdp": 2}, {"data": {"global_batch": 4}}),
    "llama, tp 2": ("huggingface", {"tp": 2}, {}),
    "llama, tp 2, computed again": ("huggingface", {"tp": 2}, {"model": {"activation_checkpointing": True}}),
    "llama, dp 2, bfloat16": ("huggingface", {"dp": 2}, {"model": {"dtype": "bfloat16"}}),
    "moe_lm, fsdp 2, ep 2": ("moe_lm", {"fsdp": 2, "ep": 2}, {}),
}


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10


def rank_main(rank: int, config: Any) -> int:
    """Bytes of the peak of a step over the start."""
    import ctypes

    import torch

    libc = ctypes.CDLL("libc.so.6")
    # Blocks from 64 KiB up go back to the system when they are freed: what is resident is what is held.
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 16)
    warm = job(config.model.kind, mesh={a: getattr(config.parallel, a) for a in ("dp", "fsdp", "tp", "ep")})
    train(engine(warm, rank), warm, steps=1)
    libc.malloc_trim(0)
    start = _resident()
    made = engine(config, rank)
    batches = leaves(config, 1)
    mine = [made.leaf_of(turn, len(batches)) for turn in range(made.rounds(len(batches)))]
    chosen = [(batches[leaf or 0], 0) for leaf in mine]
    made.step(1, chosen, leaves=len(batches), steps=10)
    libc.malloc_trim(0)
    _forget_peak()
    made.step(2, chosen, leaves=len(batches), steps=10)
    assert torch.isfinite(next(iter(made.local.values()))).all()
    return _peak() - start


def main() -> None:
    print("| form | planned, MiB | used, MiB | used / planned |\n|---|---|---|---|")
    for name, (kind, mesh, sections) in FORMS.items():
        model = {"config": SIZES if kind == "moe_lm" else LLAMA, **sections.get("model", {})}
        data = {"sequence_length": 256, "global_batch": 8, "microbatch": 2, **sections.get("data", {})}
        config = job(kind, mesh=mesh, model=model, data=data)
        planned = make_plan(config, world_size=config.world_size).memory_bytes_per_rank
        used = max(run_ranks(config.world_size, rank_main, config, timeout=300))
        print(f"| {name} | {planned / 2**20:.0f} | {used / 2**20:.0f} | {used / planned:.2f} |", flush=True)


if __name__ == "__main__":
    main()
