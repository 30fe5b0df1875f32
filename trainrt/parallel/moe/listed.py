"""A list of expert modules spread over ranks: each keeps some experts, all gather the rest while the layer computes.

Whatever the code around the list does with it stays right: rows do not move, so ranks need not agree on who calls which
expert. It is what ZeRO-3 does, by experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from trainrt.parallel.blocks import CONTAINERS
from trainrt.parallel.collectives import all_gather, reduce_scatter
from trainrt.parallel.moe.experts import local
from trainrt.parallel.moe.layout import ExpertLayout
from trainrt.parallel.shown import show


class GatherExperts(torch.autograd.Function):
    """The parameters of this rank's experts to those of all, expert by expert; gradients are summed on the way back.

    `share`: what part of its gradient a rank contributes (tensor-parallel ranks all have the same one).
    """

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, share: float, *held: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.share, ctx.shapes = group, share, [tensor.shape for tensor in held]
        parts = all_gather(torch.cat([tensor.flatten() for tensor in held]), group)
        sizes = [tensor.numel() for tensor in held]
        return tuple(
            flat.view(shape)
            for part in parts
            for flat, shape in zip(part.split(sizes), ctx.shapes, strict=True)
        )  # fmt: skip

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        kind = torch.promote_types(grads[0].dtype, torch.float32)
        flat = torch.cat([gradient.flatten().to(kind) for gradient in grads]) * ctx.share
        mine = reduce_scatter(flat, ctx.group).to(grads[0].dtype)
        parts = mine.split([shape.numel() for shape in ctx.shapes])
        return None, None, *(part.view(shape) for part, shape in zip(parts, ctx.shapes, strict=True))


class GatheredList(nn.ModuleList):
    """The list as a module that is called, so that FSDP2 shards it as one: `forward` gathers, `seen` says what is there."""

    group: dist.ProcessGroup
    share: float
    seen: Mapping[tuple[int, str], Tensor]

    def forward(self) -> tuple[Tensor, ...]:
        here = ExpertLayout(len(self), self.group.size()).held(self.group.rank())
        leaves = [leaf for leaf, _ in self[0].named_parameters()]
        mine = [dict(self[index].named_parameters()) for index in here]
        held = [local(parameters[leaf]) for parameters in mine for leaf in leaves]
        gathered = GatherExperts.apply(self.group, self.share, *held)
        names = [(index, leaf) for index in range(len(self)) for leaf in leaves]
        self.seen = dict(zip(names, gathered, strict=True))
        return gathered


def gather_list(model: nn.Module, name: str, mesh: DeviceMesh, tp: dist.ProcessGroup | None) -> nn.Module:
    """Leave this rank its experts of the list `name`, as DTensors over `mesh` (ep), and gather when its layer is called."""
    experts = model.get_submodule(name)
    experts.__class__ = GatheredList
    assert isinstance(experts, GatheredList)
    experts.group, experts.share = mesh.get_group(), 1.0 / tp.size() if tp is not None else 1.0
    experts.seen = {}
    layout = ExpertLayout(len(experts), mesh.size())
    for index, expert in enumerate(experts):
        for prefix, owner in expert.named_modules():
            for leaf, parameter in list(owner.named_parameters(recurse=False)):
                whole = parameter.detach()
                share = whole.clone() if layout.owner(index) == mesh.get_local_rank() else whole[:0].clone()
                held = DTensor.from_local(
                    share, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
                )
                owner._parameters[leaf] = nn.Parameter(held, requires_grad=parameter.requires_grad)
                key = (index, f"{prefix}.{leaf}" if prefix else leaf)
                show(owner, leaf, partial(_seen, experts, key))
    layer = _layer(model, name)
    layer.register_forward_pre_hook(lambda *_: experts() and None)
    layer.register_forward_hook(lambda *_: setattr(experts, "seen", {}), always_call=True)
    return experts


def _seen(experts: GatheredList, key: tuple[int, str], stored: Tensor) -> Tensor:
    return experts.seen.get(key, stored)


def _layer(model: nn.Module, name: str) -> nn.Module:
    """The module whose code calls the experts."""
    while True:
        name = name.rpartition(".")[0]
        layer = model.get_submodule(name)
        if not isinstance(layer, CONTAINERS):
            return layer
