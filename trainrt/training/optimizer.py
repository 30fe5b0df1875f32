"""The optimizer on this rank's shards, and the learning-rate schedule.

It updates plain local tensors that share memory with the sharded parameters: an elementwise
optimizer needs no more, and meshes of any mix meet in one step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from trainrt.config import JobConfig, OptimizerConfig

STATE_ROLES = ("exp_avg", "exp_avg_sq")


def learning_rate(config: OptimizerConfig, *, step: int, steps: int) -> float:
    """The rate of optimizer step `step` (from 1) of `steps`: linear warm-up, then the schedule.

    wsd: constant, then linear decay over the last `decay_fraction` of the steps (MiniCPM, arXiv 2404.06395).
    """
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    floor = config.minimum_learning_rate_ratio
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
        factor = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    elif config.schedule == "wsd":
        decay = max(1, round(config.decay_fraction * steps))
        factor = 1 - (1 - floor) * min(1.0, max(0, step - (steps - decay)) / decay)
    else:
        factor = 1.0
    return config.learning_rate * factor


def decayed(shape: tuple[int, ...]) -> bool:
    """Matrices are decayed; norms, biases and other vectors are not."""
    return len(shape) >= 2


def make_optimizer(
    config: JobConfig, local: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> torch.optim.Optimizer:
    """AdamW over local shards in two groups (decayed, not decayed), with its state allocated.

    `shapes` are those of the whole parameters: a shard's own shape says nothing of its kind.
    """
    settings = config.optimizer
    groups = []
    for decay in (True, False):
        names = [name for name in local if decayed(shapes[name]) is decay]
        if names:
            weight_decay = settings.weight_decay if decay else 0.0
            groups.append({"params": [local[n] for n in names], "names": names, "weight_decay": weight_decay})
    optimizer = torch.optim.AdamW(
        groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.epsilon, foreach=True
    )
    for tensor in local.values():
        optimizer.state[tensor] = {
            "step": torch.tensor(0.0),
            **{role: torch.zeros_like(tensor) for role in STATE_ROLES},
        }
    return optimizer


def group_document(optimizer: torch.optim.Optimizer, logical: dict[str, list[str]]) -> list[dict[str, object]]:
    """The parameter groups as a checkpoint's manifest holds them. `logical`: live name -> logical names."""
    kept = ("lr", "betas", "eps", "weight_decay")
    return [
        {
            "tensors": [name for live in group["names"] for name in logical[live]],
            "hyperparameters": {key: group[key] for key in kept},
        }
        for group in optimizer.param_groups
    ]
