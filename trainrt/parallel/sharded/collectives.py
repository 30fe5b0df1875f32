"""The collectives of split computation that have no pair among the general ones, each beside its backward."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from trainrt.parallel.collectives import CopyToGroup, ReduceFromGroup, all_gather, all_reduce
from trainrt.parallel.sharded.owners import ALL, Owners

__all__ = ["CopyToGroup", "GatherSplit", "ReduceFromGroup", "Settle", "SumShared", "largest"]


class GatherSplit(torch.autograd.Function):
    """A split tensor made whole: parts gathered forward, each rank's part of the gradient backward.

    Of what every rank holds, each one's gradient is a part of the true one: it gets its share of what all have.
    """

    @staticmethod
    def forward(ctx: Any, local: Tensor, dim: int, owners: Owners, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.held = dim, torch.from_numpy(owners.held(group.rank())).to(local.device)
        ctx.shared = torch.from_numpy(np.flatnonzero(owners.array[owners.held(group.rank())] == ALL)).to(local.device)
        ctx.ranks = owners.ranks
        most = max(owners.count(rank) for rank in range(owners.ranks))
        padded = local.new_zeros((most, *local.movedim(dim, 0).shape[1:]))
        padded[: local.shape[dim]] = local.movedim(dim, 0)
        parts = all_gather(padded, group)
        whole = local.new_empty((len(owners), *padded.shape[1:]))
        for rank in range(owners.ranks):
            held = owners.held(rank)
            whole[torch.from_numpy(held).to(local.device)] = parts[rank, : len(held)]
        return whole.movedim(0, dim).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        part = grads[0].index_select(ctx.dim, ctx.held)
        if len(ctx.shared):
            part.index_copy_(ctx.dim, ctx.shared, part.index_select(ctx.dim, ctx.shared) / ctx.ranks)
        return part, None, None, None


class Settle(torch.autograd.Function):
    """A partial tensor used by whole computation: the gradient that every rank has is divided among them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] / ctx.ranks, None


class SumShared(torch.autograd.Function):
    """A split parameter of which all ranks hold some indices: the gradients of those are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, owners: Owners, group: dist.ProcessGroup) -> Tensor:
        shared = np.flatnonzero(owners.array[owners.held(group.rank())] == ALL)
        ctx.dim, ctx.shared, ctx.group = dim, torch.from_numpy(shared).to(x.device), group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        gradient = grads[0].contiguous().clone()
        part = all_reduce(gradient.index_select(ctx.dim, ctx.shared).contiguous(), ctx.group)
        return gradient.index_copy_(ctx.dim, ctx.shared, part), None, None, None


def largest(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The element-wise maximum over the ranks; not differentiable."""
    return all_reduce(x.detach().contiguous().clone(), group, op=dist.ReduceOp.MAX)
