"""From a model and a mesh to the plan of its parameters: cuts over tp and ep, then FSDP's shard."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from trainrt.config import MeshSize
from trainrt.parallel.moe.layout import NO_ORDERS, Orders
from trainrt.parallel.plan import Cut, ParameterPlan, Part, Plan
from trainrt.parallel.planner.experts import expert_cuts, experts_of
from trainrt.parallel.planner.probe import Blueprint
from trainrt.parallel.planner.sharding import Sharding, experts_in, sharding_of
from trainrt.parallel.planner.slices import with_slices


def derive(
    model: nn.Module, size: MeshSize, blueprint: Blueprint, *, parts: Mapping[str, tuple[Part, ...]] | None = None,
    orders: Orders = NO_ORDERS,
) -> Plan:  # fmt: skip
    """Place every parameter and persistent buffer of `model` on the mesh.

    `parts` maps live tensors to the logical ones they pack; what it does not name is logical itself. `orders` are of modules
    whose experts are not held in their own order.
    Raises PlanError where a form is asked for that the model does not have.
    """
    modules = experts_of(model, experts_in(blueprint)) if size.ep > 1 else {}
    modules = with_slices(model, modules, blueprint, size.ep)
    experts = expert_cuts(model, size, modules, orders) if size.ep > 1 else {}
    sharding = sharding_of(blueprint, size.tp).spread(model) if size.tp > 1 else Sharding(1)
    parts = parts or {}
    names: dict[int, str] = {}
    aliases: dict[str, str] = {}
    planned: list[ParameterPlan] = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in names:
            aliases[name] = names[id(parameter)]
            continue
        names[id(parameter)] = name
        cuts, rule = experts.get(name) or _dense(name, tuple(parameter.shape), sharding)
        planned.append(
            ParameterPlan(
                name=name,
                shape=tuple(parameter.shape),
                dtype=dtype_name(parameter.dtype),
                cuts=cuts,
                rule=rule,
                parts=parts.get(name) or (Part.whole(name, tuple(parameter.shape)),),
                trainable=parameter.requires_grad,
            )
        )
    for name, buffer in persistent_buffers(model).items():
        whole = (Part.whole(name, tuple(buffer.shape)),)
        planned.append(
            ParameterPlan(name, tuple(buffer.shape), dtype_name(buffer.dtype), (), "buffer", whole, buffer=True)
        )
    return Plan(size, tuple(planned), aliases, experts=modules, orders=orders, sequence=sharding.sequence)


def _dense(name: str, shape: tuple[int, ...], sharding: Sharding) -> tuple[tuple[Cut, ...], str]:
    """The cuts of a parameter that is no expert's, and its rule."""
    rule = sharding.rules.get(name, "whole")
    if name not in sharding.splits:
        return (Cut("fsdp", 0),), rule
    dim, runs = sharding.splits[name].dim, sharding.runs(name)
    even = Cut("tp", dim)
    cut = even if runs == even.places(shape, sharding.ranks) else Cut("tp", dim, runs)
    return (cut, Cut("fsdp", 0)), rule


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
