"""Element by element: operands are brought to one split, random numbers are those of a single process."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from trainrt.parallel.sharded.operands import common, entered, is_split, part, wrapped
from trainrt.parallel.sharded.tensor import Axis


def pointwise(axis: Axis, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Any operator that broadcasts its operands and works on each element by itself."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
    target = next(tensor.along + len(shape) - tensor.ndim for tensor in tensors if is_split(tensor))  # type: ignore[attr-defined]
    owners = common([(tensor, target - len(shape) + tensor.ndim) for tensor in tensors])
    if owners is None:
        return NotImplemented

    def local(tensor: Tensor) -> Tensor:
        dim = target - len(shape) + tensor.ndim
        if dim < 0 or tensor.shape[dim] == 1:
            return entered(axis, tensor)
        return part(axis, tensor, dim, owners)

    first = args[0]
    if _in_place(func):
        if not is_split(first) or first.owners is not owners:
            return NotImplemented
        func(*tree_map_only(Tensor, local, args), **tree_map_only(Tensor, local, kwargs))
        return first
    result = func(*tree_map_only(Tensor, local, args), **tree_map_only(Tensor, local, kwargs))
    return tree_map_only(Tensor, lambda made: wrapped(axis, made, target, owners), result)


def _in_place(func: Any) -> bool:
    name: str = func.overloadpacket.__name__
    return name.endswith("_") and not name.endswith("__")


def like(axis: Axis, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A new tensor of the same shape and split."""
    first = args[0]
    return wrapped(axis, func(first.local, *args[1:], **kwargs), first.along, first.owners)


def sized(axis: Axis, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A new tensor of a size that is given: split like the one it is made from where that size is the same there.

    Models make buffers so, and fill them with slices that are split.
    """
    first, size = args[0], list(args[1])
    if len(size) <= first.along or size[first.along] != len(first.owners):
        return func(first.local, *args[1:], **kwargs)
    size[first.along] = first.local.shape[first.along]
    return wrapped(axis, func(first.local, size, *args[2:], **kwargs), first.along, first.owners)


def random(axis: Axis, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Random numbers written in place: all are drawn, on every rank alike, and this rank's kept."""
    first = args[0]
    if any(is_split(value) for value in args[1:]):
        return NotImplemented
    drawn = func(torch.empty(first.shape, dtype=first.dtype, device=first.device), *args[1:], **kwargs)
    first.local.copy_(axis.take(drawn, first.along, first.owners))
    return first


def dropout(axis: Axis, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The mask of the whole tensor is drawn, so that the result is that of a single process."""
    x, p, train = args[0], args[1], args[2] if len(args) > 2 else True
    if not train or p == 0:
        mask = torch.ones(x.local.shape, dtype=torch.bool, device=x.device)
        return wrapped(axis, x.local * 1.0, x.along, x.owners), wrapped(axis, mask, x.along, x.owners)
    drawn = torch.native_dropout(torch.ones(x.shape, dtype=x.dtype, device=x.device), p, True)[1]
    mask = axis.take(drawn, x.along, x.owners)
    kept = x.local * mask / (1.0 - p) if p < 1 else x.local * 0.0
    return wrapped(axis, kept, x.along, x.owners), wrapped(axis, mask, x.along, x.owners)


RULES = {
    "pointwise": pointwise,
    **dict.fromkeys(("clone", "_to_copy", "copy", "alias", "detach", "lift_fresh", "where", "masked_fill"), pointwise),
    **dict.fromkeys(("zeros_like", "ones_like", "empty_like", "full_like", "fill", "zero"), like),
    **dict.fromkeys(("new_zeros", "new_ones", "new_empty", "new_full"), sized),
    **dict.fromkeys(("bernoulli", "uniform", "normal", "exponential"), random),
    "native_dropout": dropout,
}
