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


def llama(*, dtype: str = "float32", architecture: str = "Llama", **changes: Any) -> Any:
    """A tiny Llama, or another architecture that takes the same config."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(**{**LLAMA, **changes})
    config.architectures = [f"{architecture}ForCausalLM"]
    return getattr(transformers, config.architectures[0])(config).to(getattr(torch, dtype))


def batch(rank: int) -> Any:
    import torch

    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randint(0, LLAMA["vocab_size"], (2, 16), generator=generator)


def save(rank: int, folder: Path, expected: dict[str, np.ndarray], losses: list[float]) -> None:
    """Hand to the test what the framework says it holds, and the losses of the steps after that."""
    import torch.distributed as dist

    if rank == 0:
        np.savez(folder / "expected.npz", **expected)
        np.save(folder / "losses.npy", losses)
    dist.barrier()


MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "lion": ("exp_avg",), "sgd": ("momentum_buffer",)}


def _optimizer(kind: str, parameters: Any) -> Any:
    import torch

    from tests.checkpoint.optimizers import Lion

    if kind == "sgd":
        return torch.optim.SGD(parameters, lr=1e-2, momentum=0.9)
    return Lion(parameters) if kind == "lion" else torch.optim.AdamW(parameters, lr=1e-3)


def deepspeed_rank(rank: int, port: int, folder: Path, options: dict[str, Any]) -> None:
    """Three steps of a tiny Llama under ZeRO, saved; the state as DeepSpeed's own accessors show it, and three more losses.

    With `load` the three losses after a checkpoint that was loaded.
    """
    world, stage, dtype = options["world"], options["stage"], options.get("dtype", "float32")
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    import deepspeed
    import torch
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    torch.set_num_threads(1)
    # Compiled at first use into a folder that all processes of a user share: one that is killed there leaves a lock behind,
    # for which every later one waits without end. It serves inference only.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if options.get("float16_allowed"):
        # DeepSpeed takes a CPU without instructions for float16 for one that cannot do it; torch computes it all the same.
        deepspeed.get_accelerator().is_fp16_supported = lambda: True
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
        "bf16": {"enabled": dtype == "bfloat16"}, "fp16": {"enabled": dtype == "float16", "initial_scale_power": 12},
        "checkpoint": {"load_universal": options.get("universal", False)},
    }  # fmt: skip
    trained = groups or [p for p in model.parameters() if p.requires_grad]
    optimizer = _optimizer(options.get("optimizer", "adamw"), trained)
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=True)

    def steps(count: int) -> list[float]:
        losses = []
        for _ in range(count):
            loss = engine(input_ids=batch(rank), labels=batch(rank)).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        return losses

    if "load" in options:
        assert engine.load_checkpoint(options["load"])[0] is not None
        save(rank, folder, {}, steps(3))
        return
    steps(options.get("steps", 3))
    engine.save_checkpoint(str(folder / "checkpoint"))
    expected = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            expected[f"master/{name}"] = safe_get_full_fp32_param(parameter)
            # DeepSpeed 0.19 does not find the moments of more than one group (stages 1 and 2).
            for role in MOMENTS[options.get("optimizer", "adamw")] if groups is None or stage == 3 else ():
                expected[f"{role}/{name}"] = safe_get_full_optimizer_state(parameter, role)
    save(rank, folder, {key: value.detach().float().numpy() for key, value in expected.items()}, steps(3))


def dcp_rank(rank: int, port: int, folder: Path, options: dict[str, Any]) -> None:
    """Three steps under FSDP2 x TP, saved as torch.distributed.checkpoint.state_dict names it, and three more losses.

    With `load` the three losses after a checkpoint that was loaded.
    """
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=options["world"])
    tp = options.get("tp", 1)
    mesh = init_device_mesh("cpu", (options["world"] // tp, tp), mesh_dim_names=("dp", "tp"))
    model = llama(**options.get("model", {}))
    if tp > 1:
        for layer in model.model.layers:
            columns = dict.fromkeys(
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
            )
            plan: dict[str, Any] = {name: ColwiseParallel() for name in columns}
            plan |= {name: RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")}
            parallelize_module(layer, mesh["tp"], plan)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, foreach=False)

    def steps(count: int) -> list[float]:
        losses = []
        for _ in range(count):
            data = batch(mesh.get_coordinate()[0])
            loss = model(input_ids=data, labels=data).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    if "load" in options:
        weights, state = get_state_dict(model, optimizer, options=flat)
        dcp.load({"model": weights, "optim": state}, checkpoint_id=options["load"])
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state, options=flat)
        save(rank, folder, {}, steps(3))
        dist.destroy_process_group()
        return
    steps(3)
    weights, state = get_state_dict(model, optimizer, options=flat)
    dcp.save({"model": weights, "optim": state}, checkpoint_id=str(folder / "checkpoint"))
    expected = {}
    whole = lambda value: value.full_tensor() if isinstance(value, DTensor) else value  # noqa: E731
    for name, parameter in model.named_parameters():
        expected[f"parameter/{name}"] = whole(parameter.detach())
        for role in ("exp_avg", "exp_avg_sq"):
            expected[f"{role}/{name}"] = whole(optimizer.state[parameter][role])
    save(rank, folder, {key: value.float().numpy() for key, value in expected.items()}, steps(3))
    dist.destroy_process_group()


def megatron_rank(rank: int, port: int, folder: Path, options: dict[str, Any]) -> None:
    from tests.checkpoint import megatron

    megatron.megatron_rank(rank, port, folder, options)


def megatron_training_rank(rank: int, port: int, folder: Path, options: dict[str, Any]) -> None:
    from tests.checkpoint import megatron_training

    megatron_training.megatron_training_rank(rank, port, folder, options)


RANKS = {
    "deepspeed": deepspeed_rank, "dcp": dcp_rank, "megatron": megatron_rank, "megatron-training": megatron_training_rank,
}  # fmt: skip


def main() -> None:
    import torch.multiprocessing as mp

    framework, folder, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    mp.spawn(RANKS[framework], (port, folder, options), nprocs=options["world"])


if __name__ == "__main__":
    main()
