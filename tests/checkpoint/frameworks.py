"""Checkpoints made by the frameworks themselves, each in processes of its own, and what they hold as the framework sees it.

python -m tests.checkpoint.frameworks deepspeed FOLDER '{"stage": 3, "world": 2, ...}'
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

LLAMA = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip


def make(framework: str, folder: Path, **options: Any) -> dict[str, np.ndarray]:
    """Have a framework train and save. Returns `role/name` to what it says it holds, in float32."""
    environ = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "DS_BUILD_OPS": "0",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    words = [sys.executable, "-m", "tests.checkpoint.frameworks", framework, str(folder), json.dumps(options)]
    done = subprocess.run(
        words, env=environ, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    with np.load(folder / "expected.npz") as held:
        return {key: held[key] for key in held.files}


def llama(*, dtype: str = "float32", **changes: Any) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**LLAMA, **changes})).to(getattr(torch, dtype))


def batch(rank: int) -> Any:
    import torch

    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randint(0, LLAMA["vocab_size"], (2, 16), generator=generator)


def deepspeed_rank(rank: int, port: int, folder: Path, options: dict[str, Any]) -> None:
    """Three steps of a tiny Llama under ZeRO, saved; the state as DeepSpeed's own accessors show it."""
    world, stage, dtype = options["world"], options["stage"], options.get("dtype", "float32")
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    import deepspeed
    import torch
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    torch.set_num_threads(1)
    model = llama(**options.get("model", {}))
    for name in options.get("frozen", ()):
        model.get_parameter(name).requires_grad_(False)
    decayed = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.dim() == 1]
    groups = (
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        if options.get("groups")
        else None
    )
    config = {
        "train_micro_batch_size_per_gpu": 2, "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage, "sub_group_size": options.get("sub_group_size", 1e9), "stage3_param_persistence_threshold": 0,
        },
        "bf16": {"enabled": dtype == "bfloat16"},
    }  # fmt: skip
    optimizer = torch.optim.AdamW(groups or [p for p in model.parameters() if p.requires_grad], lr=1e-3)
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=True)
    for _ in range(options.get("steps", 3)):
        loss = engine(input_ids=batch(rank), labels=batch(rank)).loss
        engine.backward(loss)
        engine.step()
    engine.save_checkpoint(str(folder / "checkpoint"))
    expected = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            expected[f"master/{name}"] = safe_get_full_fp32_param(parameter)
            # DeepSpeed 0.19 does not find the moments of more than one group (stages 1 and 2).
            for role in ("exp_avg", "exp_avg_sq") if groups is None or stage == 3 else ():
                expected[f"{role}/{name}"] = safe_get_full_optimizer_state(parameter, role)
    if rank == 0:
        np.savez(folder / "expected.npz", **{key: value.detach().float().numpy() for key, value in expected.items()})
    torch.distributed.barrier()


RANKS = {"deepspeed": deepspeed_rank}


def main() -> None:
    import torch.multiprocessing as mp

    framework, folder, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    mp.spawn(RANKS[framework], (port, folder, options), nprocs=options["world"])


if __name__ == "__main__":
    main()
