"""Operands of an operator brought to one split."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from trainrt.parallel.sharded.owners import Owners, agree
from trainrt.parallel.sharded.tensor import Axis, Sharded, is_split


def wrapped(axis: Axis, local: Tensor, dim: int, owners: Owners) -> Sharded:
    """A split result; where every rank holds all of it, a partial one."""
    if owners.shared:
        return Sharded(local, axis, partial=True)
    return Sharded(local, axis, dim=dim, owners=owners)


def entered(axis: Axis, tensor: Tensor) -> Tensor:
    """The local tensor of an unsplit operand, for use by split computation."""
    if isinstance(tensor, Sharded):
        return tensor.local if tensor.partial else axis.enter(tensor.local)
    return axis.enter(tensor)


def part(axis: Axis, tensor: Tensor, dim: int, owners: Owners) -> Tensor:
    """This rank's part along `dim` of an operand: narrowed where it is split with more, taken where it is whole."""
    if isinstance(tensor, Sharded) and tensor.along is not None and tensor.owners is not None:
        if tensor.owners is owners:
            return tensor.local
        held, wanted = tensor.owners.held(axis.rank), owners.held(axis.rank)
        where = torch.from_numpy(np.searchsorted(held, wanted)).to(tensor.local.device)
        return tensor.local.index_select(dim, where)
    return axis.take(entered(axis, tensor), dim, owners)


def common(operands: list[tuple[Tensor, int]]) -> Owners | None:
    """The owners under which split operands can be read together, given the dimension each should be split along.

    None where one is split along another dimension, or they do not agree.
    """
    owners: Owners | None = None
    for tensor, dim in operands:
        if not isinstance(tensor, Sharded) or tensor.along is None or tensor.owners is None:
            continue
        if tensor.along != dim:
            return None
        owners = tensor.owners if owners is None else agree(owners, tensor.owners)
        if owners is None:
            return None
    return owners


__all__ = ["common", "entered", "is_split", "part", "wrapped"]
