"""Collectives in pairs: each forward beside its backward, the group passed in, every wait recorded.

Legend of shapes: N rows, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainrt.events import ring

OF_ALL = ("default_pg", "mesh_default", "undefined", "")
"""What torch calls the group of all ranks. It is also that of an axis that has all of them."""
_longest: list[str] = ["world"]


def name_of_all(axis: str) -> None:
    """From here on a group of all ranks is that of this axis, where nothing else is said."""
    _longest[:] = [axis]


def group_name(group: dist.ProcessGroup) -> str:
    """The axis of the mesh that a group lies along, as events carry it; "world" of all ranks."""
    name = group.group_desc
    return _longest[0] if name in OF_ALL else name.removeprefix("mesh_")


def all_reduce(x: Tensor, group: dist.ProcessGroup, *, op: Any = dist.ReduceOp.SUM, axis: str | None = None) -> Tensor:
    """Reduce `x` in place over the group; not differentiable."""
    with ring.collective("all_reduce", group=axis or group_name(group), bytes=x.nbytes):
        dist.all_reduce(x, op=op, group=group)
    return x


def all_gather(x: Tensor, group: dist.ProcessGroup, *, axis: str | None = None) -> Tensor:
    """Stack the equal-shaped `x` of all ranks along a new first dimension; not differentiable."""
    out = x.new_empty((group.size(), *x.shape))
    with ring.collective("all_gather", group=axis or group_name(group), bytes=out.nbytes):
        dist.all_gather(list(out.unbind(0)), x.contiguous(), group=group)
    return out


def reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's part of the sum of `x`, which has as many equal parts along its first dimension; not differentiable."""
    out = x.new_empty((x.shape[0] // group.size(), *x.shape[1:]))
    with ring.collective("reduce_scatter", group=group_name(group), bytes=x.nbytes):
        if x.device.type == "cpu":
            # gloo's own is an all-reduce inside, which sends twice as much.
            parts = torch.empty_like(x, memory_format=torch.contiguous_format)
            dist.all_to_all_single(parts, x.contiguous(), group=group)
            return parts.unflatten(0, (group.size(), -1)).sum(0)
        dist.reduce_scatter_single(out, x.contiguous(), group=group)
    return out


@dataclass(frozen=True, slots=True)
class Started:
    """An all-to-all on its way. The tensors are kept until it has ended."""

    work: Any
    sent: Tensor
    received: Tensor
    group: str
    sequence: int

    def wait(self) -> Tensor:
        with ring.collective("all_to_all", group=self.group, bytes=self.sent.nbytes, sequence=self.sequence):
            self.work.wait()
        return self.received

    def is_completed(self) -> bool:
        return bool(self.work.is_completed())


def start_exchange(x_ND: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Started:
    """Start an uneven all-to-all: the first `send[0]` rows go to rank 0 and so on; not differentiable."""
    received, sent = x_ND.new_empty((sum(receive), *x_ND.shape[1:])), x_ND.contiguous()
    name = group_name(group)
    number = ring.next_of(name)
    work = dist.all_to_all_single(received, sent, receive, send, group=group, async_op=True)
    return Started(work, sent, received, name, number)


def exchange_rows(x_ND: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    """The same, waited for."""
    return start_exchange(x_ND, send, receive, group).wait()


class CopyToGroup(torch.autograd.Function):
    """Replicated activation into sharded computation: identity forward, all-reduce backward.

    Megatron-LM (arXiv 1909.08053, section 3) calls it f.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grads[0].contiguous().clone(), ctx.group), None


class ReduceFromGroup(torch.autograd.Function):
    """Partial sums to a replicated activation: all-reduce forward, identity backward (Megatron's g)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return all_reduce(x.contiguous().clone(), group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
