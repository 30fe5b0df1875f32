"""From a meta model and a mesh to the plan of its parameters: splits of tp and ep, then FSDP's shard."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from trainrt.config import MeshSize
from trainrt.parallel.plan import Cut, ParameterPlan, Part, Plan
from trainrt.parallel.planner.rules import Split, find_splits


def derive(model: nn.Module, size: MeshSize, *, parts: Mapping[str, tuple[Part, ...]] | None = None) -> Plan:
    """Place every parameter and persistent buffer of `model` on the mesh.

    `parts` maps live tensors to the logical ones they pack; what it does not name is logical itself.
    Raises PlanError where a form is asked for that no rule covers.
    """
    splits = find_splits(model, size)
    parts = parts or {}
    names: dict[int, str] = {}
    aliases: dict[str, str] = {}
    planned: list[ParameterPlan] = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in names:
            aliases[name] = names[id(parameter)]
            continue
        names[id(parameter)] = name
        split = splits.get(name)
        planned.append(
            ParameterPlan(
                name=name,
                shape=tuple(parameter.shape),
                dtype=dtype_name(parameter.dtype),
                cuts=_cuts(split),
                rule=split.rule if split else "replicated over tp: sees whole activations",
                parts=parts.get(name) or (Part.whole(name, tuple(parameter.shape)),),
                trainable=parameter.requires_grad,
            )
        )
    for name, buffer in persistent_buffers(model).items():
        whole = (Part.whole(name, tuple(buffer.shape)),)
        planned.append(
            ParameterPlan(name, tuple(buffer.shape), dtype_name(buffer.dtype), (), "buffer", whole, buffer=True)
        )
    return Plan(size, tuple(planned), aliases)


def _cuts(split: Split | None) -> tuple[Cut, ...]:
    if split is None:
        return (Cut("fsdp", 0),)
    if split.axis == "ep":
        return (Cut("ep", split.dim), Cut("efsdp", 1))
    return (Cut(split.axis, split.dim), Cut("fsdp", 0))


def persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that a state dict holds."""
    kept = {}
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                kept[f"{prefix}.{name}" if prefix else name] = buffer
    return kept


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
