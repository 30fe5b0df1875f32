"""Sums, norms and softmax: local along whole dimensions, partial sums over the ranks along the split one."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from trainrt.parallel.sharded.collectives import ReduceFromGroup, largest
from trainrt.parallel.sharded.operands import entered, is_split, part, wrapped
from trainrt.parallel.sharded.tensor import Axis, Sharded

Args = tuple[Any, ...]


def _given(func: Any, args: Args, kwargs: dict[str, Any]) -> dict[str, Any]:
    names = [argument.name for argument in func._schema.arguments]
    return dict(zip(names, args, strict=False)) | kwargs


def _dims(x: Tensor, given: dict[str, Any]) -> list[int]:
    dims = given.get("dim")
    if dims is None or dims == []:
        return list(range(x.ndim))
    return [dim % x.ndim for dim in ([dims] if isinstance(dims, int) else dims)]


def local_reduction(axis: Axis, func: Any, args: Args, kwargs: dict[str, Any]) -> Any:
    """Anything along whole dimensions that leaves the others as they are."""
    x = args[0]
    given = _given(func, args, kwargs)
    dims = _dims(x, given)
    if not is_split(x) or x.along in dims or any(is_split(value) for value in args[1:]):
        return NotImplemented
    result = func(x.local, *args[1:], **kwargs)
    several = isinstance(result, tuple | list)
    made = [
        wrapped(axis, one, x.along if one.ndim == x.ndim else x.along - sum(d < x.along for d in dims), x.owners)
        for one in (result if several else [result])
    ]
    return tuple(made) if several else made[0]


def total(axis: Axis, func: Any, args: Args, kwargs: dict[str, Any]) -> Any:
    """Sum and mean, over the split dimension too."""
    x, given = args[0], _given(func, args, kwargs)
    dims = _dims(x, given)
    if x.along not in dims:
        return local_reduction(axis, func, args, kwargs)
    if not x.owners.disjoint:
        return NotImplemented
    dtype = given.get("dtype")
    made = ReduceFromGroup.apply(x.local.sum(dims, keepdim=bool(given.get("keepdim", False)), dtype=dtype), axis.group)
    if func.overloadpacket.__name__ == "mean":
        for dim in dims:
            made = made / x.shape[dim]
    return Sharded(made, axis)


def _mean(axis: Axis, values: Tensor, x: Sharded, dims: list[int]) -> Tensor:
    """The mean of values of x's local shape over `dims`, the split one among them; dimensions are kept."""
    total = ReduceFromGroup.apply(values.sum(dims, keepdim=True), axis.group)
    return total / math.prod(x.shape[dim] for dim in dims)


def _moments(axis: Axis, x: Sharded, dims: list[int]) -> tuple[Tensor, Tensor]:
    """Mean, as split computation sees it, and mean square deviation over the split dimension; dimensions are kept."""
    mean = axis.enter(_mean(axis, x.local, x, dims))
    return mean, _mean(axis, (x.local - mean).square(), x, dims)


def deviation(axis: Axis, func: Any, args: Args, kwargs: dict[str, Any]) -> Any:
    """Variance and standard deviation, over the split dimension too."""
    x, given = args[0], _given(func, args, kwargs)
    dims = _dims(x, given)
    if x.along not in dims:
        return local_reduction(axis, func, args, kwargs)
    if not x.owners.disjoint:
        return NotImplemented
    count = math.prod(x.shape[dim] for dim in dims)
    less = given.get("correction", given.get("unbiased"))
    _, square = _moments(axis, x, dims)
    made = square * (count / (count - (1 if less is None else less)))
    if func.overloadpacket.__name__ == "std":
        made = made.sqrt()
    return Sharded(made if given.get("keepdim", False) else made.squeeze(dims), axis)


def norm(axis: Axis, func: Any, args: Args, kwargs: dict[str, Any]) -> Any:
    """Layer norm (weight and bias) and root-mean-square norm (weight) over the last dimensions."""
    x, shape, *weights, epsilon = args
    dims = list(range(x.ndim - len(shape), x.ndim))
    if not is_split(x) or not x.owners.disjoint:
        return NotImplemented
    if x.along not in dims:
        made = func(x.local, shape, *(None if w is None else entered(axis, w) for w in weights), epsilon)
        return tuple(wrapped(axis, one, x.along, x.owners) for one in made)
    statistics: list[Tensor] = []
    centred = x.local
    if len(weights) == 2:
        mean, square = _moments(axis, x, dims)
        statistics, centred = [mean], x.local - mean
    else:
        square = _mean(axis, x.local.square(), x, dims)
    scale = torch.rsqrt(axis.enter(square) + (torch.finfo(x.dtype).eps if epsilon is None else epsilon))
    made = centred * scale
    own = [None if w is None else part(axis, w, x.along - dims[0], x.owners) for w in weights]
    made = made if own[0] is None else made * own[0]
    made = made if own[1:] in ([], [None]) else made + own[1]
    partial = (Sharded(one, axis, partial=True) for one in (*statistics, scale))
    return wrapped(axis, made, x.along, x.owners), *partial


def softmax(axis: Axis, func: Any, args: Args, kwargs: dict[str, Any]) -> Any:
    """Over the split dimension: the largest and the sum of exponentials are found over the ranks (Megatron-LM, section 3)."""
    x, dim = args[0], args[1] % args[0].ndim
    if dim != x.along:
        return wrapped(axis, func(x.local, *args[1:], **kwargs), x.along, x.owners)
    if not x.owners.disjoint:
        return NotImplemented
    shifted = x.local - largest(x.local.amax(dim, keepdim=True), axis.group)
    power = shifted.exp()
    sums = axis.enter(ReduceFromGroup.apply(power.sum(dim, keepdim=True), axis.group))
    made = shifted - sums.log() if func.overloadpacket.__name__ == "_log_softmax" else power / sums
    return wrapped(axis, made, dim, x.owners)


def logsumexp(axis: Axis, func: Any, args: Args, kwargs: dict[str, Any]) -> Any:
    x, given = args[0], _given(func, args, kwargs)
    dims = _dims(x, given)
    if dims != [x.along] or not x.owners.disjoint:
        return local_reduction(axis, func, args, kwargs)
    top = largest(x.local.amax(dims, keepdim=True), axis.group)
    sums = ReduceFromGroup.apply((x.local - top).exp().sum(dims, keepdim=True), axis.group)
    made = sums.log() + top
    return Sharded(made if given.get("keepdim", False) else made.squeeze(dims[0]), axis)


def scan(axis: Axis, func: Any, args: Args, kwargs: dict[str, Any]) -> Any:
    """Sorting, choosing and running sums along a whole dimension."""
    x, given = args[0], _given(func, args, kwargs)
    if given.get("dim", -1) % x.ndim == x.along:
        return NotImplemented
    result = func(x.local, *args[1:], **kwargs)
    if isinstance(result, Tensor):
        return wrapped(axis, result, x.along, x.owners)
    return tuple(wrapped(axis, one, x.along, x.owners) for one in result)


RULES = {
    **dict.fromkeys(("sum", "mean"), total),
    **dict.fromkeys(("var", "std"), deviation),
    **dict.fromkeys(
        (
            "var_mean",
            "amax",
            "amin",
            "max",
            "min",
            "argmax",
            "argmin",
            "prod",
            "any",
            "all",
            "linalg_vector_norm",
            "norm",
        ),
        local_reduction,
    ),
    **dict.fromkeys(("_softmax", "_log_softmax", "_safe_softmax"), softmax),
    **dict.fromkeys(("cumsum", "cumprod", "logcumsumexp", "sort", "topk", "cummax", "cummin"), scan),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm"), norm),
    "logsumexp": logsumexp,
}
