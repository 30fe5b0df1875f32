"""Matrix products and convolutions: columns, rows, heads as batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainrt.parallel.sharded.operands import common, entered, is_split, part, wrapped
from trainrt.parallel.sharded.owners import Owners
from trainrt.parallel.sharded.sequence import split_by_rows, total, whole_rows
from trainrt.parallel.sharded.tensor import Axis, Sharded

Args = tuple[Any, ...]


def product(axis: Axis, a: Tensor, b: Tensor) -> Any:
    """a (..., M, K) times b (..., K, N), of equal numbers of dimensions, two or three."""
    n = a.ndim
    if split_by_rows(a) and n == 2 and is_split(b):
        assert isinstance(a, Sharded)
        a = whole_rows(axis, a)
    for dim_a, dim_b, where in ((n - 1, n - 2, None), (0, 0, 0), (n - 2, None, n - 2), (None, n - 1, n - 1)):
        if n == 2 and where == 0 and dim_b == 0:
            continue
        mine = (is_split(a) and a.along == dim_a) or (is_split(b) and b.along == dim_b)  # type: ignore[attr-defined]
        if not mine:
            continue
        owners = common([(a, -1 if dim_a is None else dim_a), (b, -1 if dim_b is None else dim_b)])
        if owners is None:
            return NotImplemented
        x = entered(axis, a) if dim_a is None else part(axis, a, dim_a, owners)
        y = entered(axis, b) if dim_b is None else part(axis, b, dim_b, owners)
        if where is not None:
            return wrapped(axis, x @ y, where, owners)
        return summed(axis, x @ y, owners)
    return NotImplemented


def summed(axis: Axis, partial: Tensor, owners: Owners) -> Any:
    """The sum over ranks of products along a split dimension. Indices that all ranks hold would count twice."""
    if not owners.disjoint:
        return NotImplemented
    made = total(axis, partial)
    return made if isinstance(made, Sharded) else Sharded(made, axis)


def mm(axis: Axis, func: Any, args: Args, kwargs: dict[str, Any]) -> Any:
    return product(axis, args[0], args[1])


def addmm(axis: Axis, func: Any, args: Args, kwargs: dict[str, Any]) -> Any:
    """beta * added + alpha * a @ b; what is added to a sum over ranks is added once."""
    added, a, b = args
    made = product(axis, a, b)
    return made if made is NotImplemented else _plus(axis, made, added, **kwargs)


def _plus(axis: Axis, made: Any, added: Tensor, *, beta: float = 1.0, alpha: float = 1.0) -> Any:
    value = made.local if alpha == 1 else made.local * alpha
    if not is_split(made):
        if is_split(added):
            return NotImplemented
        if made.partial:
            plus = entered(axis, added)
        elif isinstance(added, Sharded):
            plus = added.full()
        else:
            plus = added
        return Sharded(value + (plus if beta == 1 else plus * beta), axis, partial=made.partial)
    where = made.along - made.ndim + added.ndim
    owners = common([(made, made.along), (added, where)])
    if owners is None or owners is not made.owners:
        return NotImplemented
    plus = entered(axis, added) if where < 0 or added.shape[where] == 1 else part(axis, added, where, owners)
    return wrapped(axis, value + (plus if beta == 1 else plus * beta), made.along, owners)


def grouped(axis: Axis, func: Any, args: Args, kwargs: dict[str, Any]) -> Any:
    """Rows (N, K) of experts one after the other, times (experts, K, N')."""
    a, b, offsets = args[0], args[1], kwargs.get("offs", args[2] if len(args) > 2 else None)
    if b.ndim != 3 or offsets is None:
        return NotImplemented
    if (is_split(a) and a.along == 1) or (is_split(b) and b.along == 1):
        owners = common([(a, 1), (b, 1)])
        if owners is None:
            return NotImplemented
        return summed(axis, _grouped(part(axis, a, 1, owners), part(axis, b, 1, owners), offsets), owners)
    if is_split(b) and b.along == 2 and not is_split(a):
        return wrapped(axis, _grouped(entered(axis, a), b.local, offsets), 1, b.owners)
    return NotImplemented


def _grouped(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """The grouped product; expert by expert where the cut leaves rows that the kernel does not take (16 bytes)."""
    aligned = all(n * a.element_size() % 16 == 0 for n in (a.shape[1], b.shape[1], b.shape[2]))
    if aligned:
        return torch.nn.functional.grouped_mm(a.contiguous(), _dense(b), offs=offsets)
    stops = offsets.tolist()
    sizes = [stop - start for start, stop in zip([0, *stops], stops, strict=False)]
    rows = a[: stops[-1]].split(sizes)
    made = torch.cat([rows[expert] @ b[expert] for expert in range(len(sizes))])
    return made if len(made) == len(a) else torch.cat((made, made.new_zeros(len(a) - len(made), made.shape[1])))


def _dense(b: Tensor) -> Tensor:
    return b if b.is_contiguous() or b.transpose(-1, -2).is_contiguous() else b.contiguous()


def convolution(axis: Axis, func: Any, args: Args, kwargs: dict[str, Any]) -> Any:
    """A depthwise convolution, channel by channel."""
    x, weight, bias, groups = args[0], args[1], args[2], args[8]
    if groups != x.shape[1] or groups != weight.shape[0]:
        return NotImplemented
    owners = common([(x, 1), (weight, 0), *([(bias, 0)] if bias is not None else [])])
    if owners is None:
        return NotImplemented
    own = None if bias is None else part(axis, bias, 0, owners)
    local = func(part(axis, x, 1, owners), part(axis, weight, 0, owners), own, *args[3:8], owners.count(axis.rank))
    return wrapped(axis, local, 1, owners)


RULES = {
    **dict.fromkeys(("mm", "bmm"), mm),
    **dict.fromkeys(("addmm", "baddbmm"), addmm),
    "_grouped_mm": grouped,
    "convolution": convolution,
}
