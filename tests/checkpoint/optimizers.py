"""Optimizers of all kinds, and checkpoints of models that they trained, as torch.distributed.checkpoint saves them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from tests.checkpoint.frameworks import batch, llama

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class Lion(torch.optim.Optimizer):
    """One moment, and no count of steps (arXiv 2302.06675)."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                held = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.sub_(group["lr"] * torch.sign(first * held + (1 - first) * p.grad))
                held.mul_(second).add_(p.grad, alpha=1 - second)


def _muon(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, Adam for the rest, in two groups."""
    named = dict(model.named_parameters())
    matrices = [p for name, p in named.items() if p.dim() == 2 and ".layers." in name]
    vectors = [p for p in named.values() if p.dim() == 1]
    others = [p for name, p in named.items() if p.dim() == 2 and ".layers." not in name]
    return [
        torch.optim.Muon(matrices, lr=1e-3),
        torch.optim.AdamW([{"params": vectors, "weight_decay": 0.0}, {"params": others}], lr=1e-3),
    ]


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


OPTIMIZERS: dict[str, Callable[[nn.Module], list[torch.optim.Optimizer]]] = {
    "adam": lambda model: [torch.optim.AdamW(_trained(model), lr=1e-3)],
    "sgd": lambda model: [torch.optim.SGD(_trained(model), lr=1e-3, momentum=0.9)],
    "lion": lambda model: [Lion(_trained(model))],
    "adafactor": lambda model: [torch.optim.Adafactor(_trained(model))],
    "muon": _muon,
}


def steps(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], count: int = 3, *, late: Sequence[str] = ()
) -> list[float]:
    """Train a little; `late`: parameters that take no part in the first step. Returns the losses."""
    losses = []
    for number in range(count):
        loss = model(input_ids=batch(0), labels=batch(0)).loss
        loss.backward()
        for name in late if number == 0 else ():
            model.get_parameter(name).grad = None
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def save(
    kind: str, path: Path, *, frozen: Sequence[str] = (), late: Sequence[str] = (), **changes: Any
) -> tuple[dict[tuple[str, str], Tensor], list[float]]:
    """Three steps, saved. Returns what is in it, and the losses of three more."""
    model = llama(**changes)
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    optimizers = OPTIMIZERS[kind](model)
    steps(model, optimizers, late=late)
    weights, state = get_state_dict(model, optimizers, options=FLAT)
    dcp.save({"model": weights, "optim": state}, checkpoint_id=str(path), no_dist=True)
    held = {(name, "parameter"): p.detach().clone() for name, p in model.named_parameters()}
    for optimizer in optimizers:
        for name, p in model.named_parameters():
            moments = optimizer.state.get(p, {})
            held |= {(name, role): v.clone() for role, v in moments.items() if role != "step"}
    return held, steps(model, optimizers)


def load(kind: str, path: Path, **changes: Any) -> list[float]:
    """The losses of three steps after a checkpoint that was loaded."""
    model = llama(**changes)
    optimizers = OPTIMIZERS[kind](model)
    weights, state = get_state_dict(model, optimizers, options=FLAT)
    dcp.load({"model": weights, "optim": state}, checkpoint_id=str(path), no_dist=True)
    set_state_dict(model, optimizers, model_state_dict=weights, optim_state_dict=state, options=FLAT)
    return steps(model, optimizers)
