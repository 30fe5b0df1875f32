"""Tables cut by rows, and losses that pick a channel of a split row: the owner has it, the others add zero."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from trainrt.parallel.sharded.collectives import ReduceFromGroup
from trainrt.parallel.sharded.operands import is_split, wrapped
from trainrt.parallel.sharded.owners import ALL, Owners
from trainrt.parallel.sharded.sequence import looked_up, total
from trainrt.parallel.sharded.tensor import Axis, Sharded

Args = tuple[Any, ...]


def _local_index(axis: Axis, owners: Owners, index: Tensor) -> tuple[Tensor, Tensor]:
    """Where an index lies in this rank's part, and whether it counts there; what all hold counts on rank 0."""
    place = np.zeros(len(owners), np.int64)
    place[owners.held(axis.rank)] = np.arange(owners.count(axis.rank))
    counts = (owners.array == axis.rank) | ((owners.array == ALL) & (axis.rank == 0))
    return torch.from_numpy(place).to(index.device)[index], torch.from_numpy(counts).to(index.device)[index]


def embedding(axis: Axis, func: Any, args: Args, kwargs: dict[str, Any]) -> Any:
    """Vocabulary-parallel (Megatron-LM, arXiv 1909.08053, section 3), or cut along the width."""
    weight, index, *rest = args
    if not is_split(weight):
        return NotImplemented
    padding = rest[0] if rest else -1
    looked_up(axis, index)
    if weight.along == 1:
        return wrapped(axis, func(weight.local, index, *rest, **kwargs), index.ndim, weight.owners)
    place, counts = _local_index(axis, weight.owners, index)
    rows = F.embedding(torch.where(counts, place, 0), weight.local)
    if padding >= 0:
        # Its row is looked up but gets no gradient.
        rows = torch.where((index == padding).unsqueeze(-1), rows.detach(), rows)
    made = total(axis, rows * counts.unsqueeze(-1))
    return made if isinstance(made, Sharded) else Sharded(made, axis)


def negative_log_likelihood(axis: Axis, func: Any, args: Args, kwargs: dict[str, Any]) -> Any:
    """nll_loss_forward: x (N, C) split over classes, target (N,). Returns (loss, total weight)."""
    x, target, class_weight, reduction, ignored = args
    if not is_split(x) or x.ndim != 2 or x.along != 1 or class_weight is not None:
        return NotImplemented
    valid = target != ignored
    place, counts = _local_index(axis, x.owners, torch.where(valid, target, 0))
    counts = counts & valid
    picked = x.local.gather(1, torch.where(counts, place, 0).unsqueeze(1)).squeeze(1)
    loss = -ReduceFromGroup.apply(torch.where(counts, picked, 0), axis.group)
    weight = valid.sum().to(x.dtype)
    if reduction == 0:
        return Sharded(loss, axis), Sharded(torch.zeros_like(weight), axis)
    total = loss.sum()
    return Sharded(total / weight if reduction == 1 else total, axis), Sharded(weight, axis)


RULES = {"embedding": embedding, "nll_loss_forward": negative_log_likelihood}
