"""The collectives of split computation that have no pair among the general ones, each beside its backward."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from trainrt.parallel.collectives import CopyToGroup, ReduceFromGroup, all_gather, all_reduce, reduce_scatter
from trainrt.parallel.sharded.owners import ALL, Owners

__all__ = [
    "CopyToGroup", "GatherRows", "GatherSplit", "ReduceFromGroup", "ScatterSum", "Settle", "SumShared", "largest",
]  # fmt: skip


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


class GatherRows(torch.autograd.Function):
    """Rows split evenly into split computation: gathered forward, gradients summed for each rank's rows backward.

    Megatron-LM's g (arXiv 2205.05198, section 4.2.2).
    """

    @staticmethod
    def forward(ctx: Any, local: Tensor, dim: int, owners: Owners, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.owners, ctx.group = dim, owners, group
        return _gather_rows(local, dim, owners, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _scatter_rows(grads[0], ctx.dim, ctx.owners, ctx.group), None, None, None


class ScatterSum(torch.autograd.Function):
    """Partial sums to each rank's rows of the sum: reduce-scatter forward, all-gather backward (g's conjugate)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, owners: Owners, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.owners, ctx.group = dim, owners, group
        return _scatter_rows(x, dim, owners, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _gather_rows(grads[0], ctx.dim, ctx.owners, ctx.group), None, None, None


@lru_cache(maxsize=64)
def _by_rank(owners: Owners, device: torch.device) -> Tensor | None:
    """The rows of the first rank, then those of the second, and so on; None where they lie so."""
    order = np.concatenate([owners.held(rank) for rank in range(owners.ranks)])
    return None if bool((order[1:] > order[:-1]).all()) else torch.from_numpy(order).to(device)


def _gather_rows(local: Tensor, dim: int, owners: Owners, group: dist.ProcessGroup) -> Tensor:
    parts = all_gather(local.movedim(dim, 0).contiguous(), group).flatten(0, 1)
    order = _by_rank(owners, local.device)
    whole = parts if order is None else torch.empty_like(parts).index_copy_(0, order, parts)
    return _fresh(whole.movedim(0, dim))


def _scatter_rows(x: Tensor, dim: int, owners: Owners, group: dist.ProcessGroup) -> Tensor:
    rows, order = x.movedim(dim, 0), _by_rank(owners, x.device)
    return _fresh(reduce_scatter(rows if order is None else rows.index_select(0, order), group).movedim(0, dim))


def _fresh(x: Tensor) -> Tensor:
    """Memory of its own: a model may write into what it gets."""
    return x.clone(memory_format=torch.contiguous_format)


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
