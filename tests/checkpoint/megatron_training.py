"""Training by megatron-core on CPU, with its own pipeline, optimizer and scheduler, up to and after a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from tests.checkpoint.megatron import STEPS, Rank, without_cuda

MICROBATCHES, SAMPLES, LENGTH = 2, 2, 16


class FusedAdam(torch.optim.AdamW):
    """torch's arithmetic, with the state where Transformer Engine's FusedAdam keeps it, and as strict as it is about that."""

    def __init__(self, params: Any, *, adam_w_mode: bool, **settings: Any) -> None:
        assert adam_w_mode
        super().__init__(params, **settings)
        for group in self.param_groups:
            group["bias_correction"] = True

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1

    def state_dict(self) -> dict[str, Any]:
        held = super().state_dict()
        moments = {
            number: {role: value for role, value in state.items() if role != "step"}
            for number, state in held["state"].items()
        }
        return {**held, "state": moments}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        steps = {number: group.get("step", 0) for group in state_dict["param_groups"] for number in group["params"]}
        state = {}
        for number, held in state_dict["state"].items():
            if set(held) - {"exp_avg", "exp_avg_sq"}:
                raise KeyError(", ".join(sorted(held)))
            state[number] = {**held, "step": torch.tensor(float(steps[number]))}
        super().load_state_dict({**state_dict, "state": state})


def use_fused_adam() -> None:
    """As if Transformer Engine were there."""
    from megatron.core import optimizer

    optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER = FusedAdam, False


def batches(step: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and labels of a step's microbatches: the same on every mesh."""
    generator = torch.Generator().manual_seed(1000 + step)
    for _ in range(MICROBATCHES):
        tokens = torch.randint(0, 61, (SAMPLES, LENGTH + 1), generator=generator)
        yield tokens[:, :-1], tokens[:, 1:]


def forward_step(data: Iterator[tuple[Tensor, Tensor]], model: Any) -> tuple[Tensor, Any]:
    """What Megatron's schedules call for a microbatch."""
    tokens, labels = next(data)
    positions = torch.arange(LENGTH).expand_as(tokens)

    def loss_of(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = losses.float().mean()
        return loss, {"loss": loss.detach().clone()}

    return model(tokens, positions, None, labels=labels), loss_of


def train(rank: Rank, optimizer: Any, scheduler: Any, *, first: int) -> list[float]:
    """Steps from `first` on. Returns their losses (on the last stage)."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    rank.config.finalize_model_grads_func = finalize_model_grads
    losses = []
    for step in range(first, first + STEPS):
        for chunk in rank.wrapped:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        reduced = get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=batches(step), model=rank.wrapped,
            num_microbatches=MICROBATCHES, seq_length=LENGTH, micro_batch_size=SAMPLES, forward_only=False,
        )  # fmt: skip
        optimizer.step()
        scheduler.step(increment=1)
        losses.append(float(np.mean([found["loss"].item() for found in reduced])) if reduced else 0.0)
    return losses


def megatron_training_rank(rank: int, port: int, folder: Path, options: dict[str, Any]) -> None:
    """Steps, a checkpoint, and the losses of the steps after it. With `load` those after a checkpoint that was loaded."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=options["world"])
    with without_cuda():
        if options.get("adam") == "fused":
            use_fused_adam()
        mine = Rank(rank, options)
        mine.fill()
        optimizer = mine.fresh_optimizer()
        scheduler = mine.scheduler(optimizer)
        if "load" in options:
            mine.load(Path(options["load"]), optimizer, scheduler)
        else:
            train(mine, optimizer, scheduler, first=0)
            mine.save(folder / "checkpoint", optimizer, scheduler)
        losses = train(mine, optimizer, scheduler, first=STEPS)
    if rank == options["world"] - 1:
        np.save(folder / "losses.npy", losses)
        np.savez(folder / "expected.npz")
    dist.barrier()
    dist.destroy_process_group()
