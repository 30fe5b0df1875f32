"""Whether a plan is right: the model, made small, run split and in one piece; loss and every gradient compared.

Without it a wrong plan would be wrong numbers, not an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from trainrt.config import MeshSize
from trainrt.parallel.mesh import make_expert_groups
from trainrt.parallel.moe.experts import layout_of, local, slices_of
from trainrt.parallel.moe.foreign import ForeignExperts
from trainrt.parallel.moe.form import ExpertsForm, Form, ListedExperts
from trainrt.parallel.moe.layout import WHOLE, ExpertLayout
from trainrt.parallel.moe.parallel import SliceBySlice, share_of, spread_experts
from trainrt.parallel.moe.strategy import PLAIN, Fixed, Strategy
from trainrt.parallel.planner.experts import experts_of
from trainrt.parallel.planner.probe import Blueprint, small_model
from trainrt.parallel.planner.sharding import Sharding
from trainrt.parallel.planner.slices import with_slices
from trainrt.parallel.sharded.model import full, shard_model
from trainrt.parallel.verdict import NOTHING, Verdict


class Divided(NamedTuple):
    """A model divided over ranks: what gathered, how to take this rank's part of a whole gradient, and its factor."""

    gathered: Mapping[str, int]
    parts: Mapping[str, Callable[[Tensor], Tensor]]
    times: float


def compare_split(blueprint: Blueprint, sharding: Sharding, mesh: DeviceMesh) -> Verdict:
    """Tensor parallelism: every rank of the one-dimensional `mesh` calls this and gets the same verdict."""

    def divide(model: nn.Module) -> Divided:
        splits = sharding.spread(model).splits
        axis = shard_model(model, splits, mesh, sequence=sharding.sequence)
        parts = {name: partial(axis.take, dim=split.dim, owners=split.owners) for name, split in splits.items()}
        return Divided(axis.gathered, parts, 1.0)

    return _compare(blueprint, divide, mesh)


def compare_experts(
    blueprint: Blueprint, forms: Mapping[str, Form], mesh: DeviceMesh, strategy: Strategy = PLAIN, *, placed: bool = False
) -> Verdict:  # fmt: skip
    """Expert parallelism: all ranks run the same batch, so experts get what they would in one process, from each of them.

    placed: with whole experts in another order than their own.
    """

    def divide(model: nn.Module) -> Divided:
        modules = with_slices(model, experts_of(model, forms), blueprint, mesh.size())
        layouts = {name: layout_of(model.get_submodule(name), form, mesh.size()) for name, form in modules.items()}
        whole = [name for name, form in modules.items() if placed and form is None and layouts[name].slices == 1]
        orders = {name: tuple(reversed(range(layouts[name].experts))) for name in whole}
        layouts |= {name: replace(layouts[name], order=order) for name, order in orders.items()}
        widths = sorted({width for layout in layouts.values() for width in layout.widths})
        # How whole weights are cut is to be known before they are.
        slices = {
            name: WHOLE
            if isinstance(form, ListedExperts)
            else slices_of(model.get_submodule(name), form, layouts[name])
            for name, form in modules.items()
        }

        def of_layout(_: nn.Module, layout: ExpertLayout) -> Fixed:
            return Fixed(replace(strategy, r=min(strategy.r, layout.slices)))

        world = MeshSize(fsdp=mesh.size(), ep=mesh.size())
        groups = make_expert_groups(world, mesh, widths=widths, places=1)
        spread_experts(model, modules, mesh, groups, chooser=of_layout, orders=orders)
        place = mesh.get_local_rank()
        parts: dict[str, Callable[[Tensor], Tensor]] = {}
        for name, form in modules.items():
            module, layout = model.get_submodule(name), layouts[name]
            for leaf, _ in module.named_parameters():
                if isinstance(form, ListedExperts):
                    mine = layout.owner(int(leaf.partition(".")[0])) == place
                    parts[f"{name}.{leaf}"] = partial(_all_or_nothing, mine)
                else:
                    parts[f"{name}.{leaf}"] = partial(
                        share_of, layout=layout, rank=place, sliced=slices[name].get(leaf)
                    )
        return Divided({}, parts, float(mesh.size()))

    return _compare(blueprint, divide, mesh)


def compare_slices(blueprint: Blueprint, forms: Mapping[str, Form], mesh: DeviceMesh, ranks: int) -> Verdict:
    """What expert parallelism over so many ranks computes where these are more than experts: all slices, by each rank of `mesh`.

    It takes no more processes than there are, for any number of slices.
    """

    def divide(model: nn.Module) -> Divided:
        for name, form in with_slices(model, experts_of(model, forms), blueprint, ranks).items():
            if isinstance(form, ExpertsForm):
                module = model.get_submodule(name)
                one_by_one = SliceBySlice(ExpertLayout(form.experts, ranks), form.slices)
                module.forward = ForeignExperts(module, form, one_by_one).forward  # type: ignore[method-assign]
        return Divided({}, {}, 1.0)

    return _compare(blueprint, divide, mesh)


def _all_or_nothing(mine: bool, whole: Tensor) -> Tensor:
    return whole if mine else whole[:0]


def _compare(blueprint: Blueprint, divide: Callable[[nn.Module], Divided], mesh: DeviceMesh) -> Verdict:
    """In doubles where the model's operators have kernels for them."""
    try:
        return _compared(blueprint, divide, mesh, torch.float64)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        if not any(word in str(error) for word in ("Double", "double", "dtype")):
            raise
        return _compared(blueprint, divide, mesh, torch.float32)


def _compared(
    blueprint: Blueprint, divide: Callable[[nn.Module], Divided], mesh: DeviceMesh, dtype: torch.dtype
) -> Verdict:
    model = small_model(blueprint, dtype=dtype)
    expected = blueprint.loss(model)
    expected.backward()
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    reference = {name: zeros[name] if p.grad is None else p.grad for name, p in model.named_parameters()}
    elements = sum(p.numel() for p in model.parameters())
    nothing = NOTHING[dtype] * float(torch.stack([g.double().norm() for g in reference.values()]).norm())
    model = small_model(blueprint, dtype=dtype)
    divided = divide(model)
    loss = blueprint.loss(model)
    full(loss).backward()
    errors = torch.zeros(len(reference), dtype=torch.float64)
    for position, (name, parameter) in enumerate(model.named_parameters()):
        part = divided.parts.get(name)
        wanted = reference[name] if part is None else part(reference[name]) * divided.times
        found = torch.zeros_like(wanted) if parameter.grad is None else local(parameter.grad)
        scale = divided.times if part is not None else 1.0
        errors[position] = float((found - wanted).norm()) / scale / max(float(reference[name].norm()), nothing, 1e-300)
    dist.all_reduce(errors, op=dist.ReduceOp.MAX, group=mesh.get_group())
    worst = int(errors.nan_to_num(torch.inf).argmax())
    difference = abs(float(loss.detach()) - float(expected.detach()))
    return Verdict(
        ranks=mesh.size(), precision=str(dtype).removeprefix("torch."), gradient_error=float(errors[worst]),
        loss_error=difference / max(abs(float(expected.detach())), 1e-12), worst=list(reference)[worst],
        held=sum(local(p).numel() for p in model.parameters()) / elements, gathered=dict(divided.gathered),
    )  # fmt: skip
