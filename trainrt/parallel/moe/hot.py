"""Hot experts: where one expert gets far more rows than others, its weights go to the rows instead.

Every rank is lent the weights of the hottest experts for one call and computes its own rows of them; gradients of these weights
are summed where they are held. Nothing is kept apart and nothing moves in between, so who is hot may change from call to call
(dynamic shadowing: FasterMoE, PPoPP'22, section 4.2; it sends each copy's gradient back, too).

Legend: N rows sorted by position, Q positions of experts, W ranks, H hot experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from trainrt.events import ring
from trainrt.parallel.collectives import group_name
from trainrt.parallel.moe.exchange import Counts


def hottest(count_WQ: Counts, number: int) -> list[int]:
    """The positions of the experts with most rows, ascending; the same on all ranks."""
    return sorted(np.argsort(-count_WQ.sum(0), kind="stable")[:number].tolist())


class Lend(torch.autograd.Function):
    """The weights of some experts, from the ranks that hold them to all ranks of the group; gradients are summed back.

    seats: of each, the rank and the index among the experts there. Weights are stacked, or flattened with their rows.
    """

    @staticmethod
    def forward(
        ctx: Any, seats: Sequence[tuple[int, int]], here: int, group: dist.ProcessGroup, *held: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.seats, ctx.here, ctx.group, ctx.shapes = seats, here, group, [weight.shape for weight in held]
        lent = [weight.new_empty((len(seats), len(weight) // here, *weight.shape[1:])) for weight in held]
        with _recorded("broadcast", lent, group):
            started = []
            for weight, out in zip(held, lent, strict=True):
                by_expert = weight.unflatten(0, (here, -1))
                for part, (rank, index) in zip(out.unbind(0), seats, strict=True):
                    if rank == group.rank():
                        part.copy_(by_expert[index])
                    started.append(dist.broadcast(part, group_src=rank, group=group, async_op=True))
            for work in started:
                work.wait()
        return tuple(out.flatten(0, 1) for out in lent)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        # Summed in float32 at least.
        kind = torch.promote_types(grads[0].dtype, torch.float32)
        parts = [gradient.unflatten(0, (len(ctx.seats), -1)).to(kind, copy=True) for gradient in grads]
        with _recorded("reduce", parts, ctx.group):
            started = [
                dist.reduce(part, group_dst=rank, group=ctx.group, async_op=True)
                for of_weight in parts for part, (rank, _) in zip(of_weight.unbind(0), ctx.seats, strict=True)
            ]  # fmt: skip
            for work in started:
                work.wait()
        found = []
        for part, shape in zip(parts, ctx.shapes, strict=True):
            back = torch.zeros(shape, dtype=grads[0].dtype, device=part.device)
            by_expert = back.unflatten(0, (ctx.here, -1))
            for (rank, index), summed in zip(ctx.seats, part, strict=True):
                if rank == ctx.group.rank():
                    by_expert[index] = summed
            found.append(back)
        return None, None, None, *found


def _recorded(name: str, tensors: Sequence[Tensor], group: dist.ProcessGroup) -> AbstractContextManager[None]:
    size = sum(tensor.nbytes for tensor in tensors)
    return ring.collective(name, group=group_name(group), bytes=size)
