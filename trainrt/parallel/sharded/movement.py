"""Elements seen in another order or shape, picked, or put together."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from trainrt.parallel.sharded.operands import common, entered, is_split, part, wrapped
from trainrt.parallel.sharded.owners import Owners, reshaped
from trainrt.parallel.sharded.tensor import Axis, Sharded

Args = tuple[Any, ...]


def view(axis: Axis, func: Any, args: Args, kwargs: dict[str, Any]) -> Any:
    x = args[0]
    after = list(args[1])
    if -1 in after:
        after[after.index(-1)] = x.numel() // max(-math.prod(after), 1)
    found = reshaped(x.owners, x.along, tuple(x.shape), tuple(after)) if x.numel() else None
    if found is None:
        return NotImplemented
    dim, owners = found
    after[dim] = owners.count(axis.rank)
    return wrapped(axis, x.local.reshape(after), dim, owners)


def permute(axis: Axis, func: Any, args: Args, kwargs: dict[str, Any]) -> Any:
    x = args[0]
    order = [dim % x.ndim for dim in args[1]]
    return wrapped(axis, x.local.permute(order), order.index(x.along), x.owners)


def transpose(axis: Axis, func: Any, args: Args, kwargs: dict[str, Any]) -> Any:
    x = args[0]
    a, b = (0, x.ndim - 1) if len(args) < 3 else (args[1] % x.ndim, args[2] % x.ndim)
    dim = b if x.along == a else a if x.along == b else x.along
    return wrapped(axis, x.local.transpose(a, b), dim, x.owners)


def unsqueeze(axis: Axis, func: Any, args: Args, kwargs: dict[str, Any]) -> Any:
    x = args[0]
    where = args[1] % (x.ndim + 1)
    return wrapped(axis, x.local.unsqueeze(where), x.along + (where <= x.along), x.owners)


def squeeze(axis: Axis, func: Any, args: Args, kwargs: dict[str, Any]) -> Any:
    x = args[0]
    dims = range(x.ndim) if len(args) < 2 else [args[1]] if isinstance(args[1], int) else args[1]
    gone = [dim % x.ndim for dim in dims if x.shape[dim] == 1]
    local = x.local.squeeze(tuple(gone)) if gone else x.local.view_as(x.local)
    return wrapped(axis, local, x.along - sum(dim < x.along for dim in gone), x.owners)


def expand(axis: Axis, func: Any, args: Args, kwargs: dict[str, Any]) -> Any:
    x = args[0]
    size = list(args[1])
    dim = x.along + len(size) - x.ndim
    size[dim] = x.local.shape[x.along]
    return wrapped(axis, x.local.expand(size), dim, x.owners)


def taken(axis: Axis, x: Sharded, index: np.ndarray) -> Any:
    """Indices along the split dimension, where every rank is left with some or all hold the same; a view where it can be."""
    assert x.along is not None and x.owners is not None
    index = np.where(index < 0, index + len(x.owners), index)
    owners = Owners(x.owners.array[index], x.owners.ranks)
    if not len(index) or (not owners.shared and min(owners.count(rank) for rank in range(owners.ranks)) == 0):
        return NotImplemented
    mine = index[owners.held(axis.rank)]
    where = np.searchsorted(x.owners.held(axis.rank), mine)
    steps = np.diff(where)
    if len(where) == 1 or (bool((steps == steps[0]).all()) and steps[0] > 0):
        step = int(steps[0]) if len(where) > 1 else 1
        local = torch.ops.aten.slice.Tensor(x.local, x.along, int(where[0]), int(where[-1]) + 1, step)
    else:
        local = x.local.index_select(x.along, torch.from_numpy(where).to(x.device))
    return wrapped(axis, local, x.along, owners)


def slice_(axis: Axis, func: Any, args: Args, kwargs: dict[str, Any]) -> Any:
    x, dim = args[0], (args[1] if len(args) > 1 else 0) % args[0].ndim
    if dim != x.along:
        return wrapped(axis, func(x.local, *args[1:], **kwargs), x.along, x.owners)
    start, stop, step = (*args[2:], None, None, None)[:3]
    return taken(axis, x, np.arange(x.shape[dim])[slice(start, stop, step)])


def select(axis: Axis, func: Any, args: Args, kwargs: dict[str, Any]) -> Any:
    x, dim = args[0], args[1] % args[0].ndim
    if dim != x.along:
        return wrapped(axis, x.local.select(dim, args[2]), x.along - (dim < x.along), x.owners)
    one = taken(axis, x, np.array([args[2] % x.shape[dim]]))
    return one if one is NotImplemented else Sharded(one.local.squeeze(dim), axis, partial=True)


def split(axis: Axis, func: Any, args: Args, kwargs: dict[str, Any]) -> Any:
    x = args[0]
    dim = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % x.ndim
    if dim != x.along:
        return [wrapped(axis, piece, x.along, x.owners) for piece in func(x.local, *args[1:], **kwargs)]
    n = x.shape[dim]
    sizes = args[1] if not isinstance(args[1], int) else [min(args[1], n - i) for i in range(0, n, args[1])]
    stops = np.cumsum([0, *sizes])
    pieces = [taken(axis, x, np.arange(a, b)) for a, b in pairwise(stops)]
    return NotImplemented if any(piece is NotImplemented for piece in pieces) else pieces


def unbind(axis: Axis, func: Any, args: Args, kwargs: dict[str, Any]) -> Any:
    x, dim = args[0], (args[1] if len(args) > 1 else 0) % args[0].ndim
    if dim == x.along:
        return NotImplemented
    return [wrapped(axis, piece, x.along - (dim < x.along), x.owners) for piece in x.local.unbind(dim)]


def cat(axis: Axis, func: Any, args: Args, kwargs: dict[str, Any]) -> Any:
    # A cache begins as an empty one-dimensional tensor; it says nothing about dimensions.
    tensors = [tensor for tensor in args[0] if tensor.ndim > 1 or tensor.numel() or tensor.shape != (0,)]
    x = next(tensor for tensor in tensors if is_split(tensor))
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % x.ndim
    if dim != x.along:
        owners = common([(tensor, x.along) for tensor in tensors])
        if owners is None:
            return NotImplemented
        return wrapped(
            axis, torch.cat([part(axis, tensor, x.along, owners) for tensor in tensors], dim), x.along, owners
        )
    if any(is_split(tensor) and tensor.along != dim for tensor in tensors):
        return NotImplemented
    arrays = [tensor.owners.array if is_split(tensor) else np.full(tensor.shape[dim], -1) for tensor in tensors]
    locals_ = [tensor.local if is_split(tensor) else entered(axis, tensor) for tensor in tensors]
    return wrapped(axis, torch.cat(locals_, dim), dim, Owners(np.concatenate(arrays), axis.ranks))


def stack(axis: Axis, func: Any, args: Args, kwargs: dict[str, Any]) -> Any:
    tensors = args[0]
    x = next(tensor for tensor in tensors if is_split(tensor))
    where = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % (x.ndim + 1)
    owners = common([(tensor, x.along) for tensor in tensors])
    if owners is None:
        return NotImplemented
    local = torch.stack([part(axis, tensor, x.along, owners) for tensor in tensors], where)
    return wrapped(axis, local, x.along + (where <= x.along), owners)


def repeat(axis: Axis, func: Any, args: Args, kwargs: dict[str, Any]) -> Any:
    x, times = args[0], args[1]
    dim = x.along + len(times) - x.ndim
    return wrapped(axis, x.local.repeat(times), dim, Owners(np.tile(x.owners.array, times[dim]), axis.ranks))


def flip(axis: Axis, func: Any, args: Args, kwargs: dict[str, Any]) -> Any:
    x, dims = args[0], [dim % args[0].ndim for dim in args[1]]
    return NotImplemented if x.along in dims else wrapped(axis, x.local.flip(dims), x.along, x.owners)


def roll(axis: Axis, func: Any, args: Args, kwargs: dict[str, Any]) -> Any:
    x = args[0]
    dims = [dim % x.ndim for dim in args[2]] if len(args) > 2 else []
    return NotImplemented if not dims or x.along in dims else wrapped(axis, func(x.local, *args[1:]), x.along, x.owners)


def index(axis: Axis, func: Any, args: Args, kwargs: dict[str, Any]) -> Any:
    """Advanced indexing along whole dimensions, or with one list along the split one."""
    x, indices = args[0], args[1]
    given = [dim for dim, value in enumerate(indices) if value is not None]
    if not is_split(x) or any(is_split(value) for value in indices):
        return NotImplemented
    if x.along in given:
        one = indices[x.along]
        return (
            taken(axis, x, one.cpu().numpy())
            if len(given) == 1 and one.ndim == 1 and one.dtype != torch.bool
            else NotImplemented
        )
    together = given == list(range(given[0], given[-1] + 1))
    if any(value is not None and value.dtype == torch.bool and value.ndim > 1 for value in indices):
        return NotImplemented
    local = x.local[tuple(slice(None) if value is None else value for value in indices)]
    made = local.ndim - (x.ndim - len(given))
    kept = sum(1 for dim in range(x.along) if dim not in given)
    dim = kept if together and given[0] > x.along else kept + made
    return wrapped(axis, local, dim, x.owners)


def index_select(axis: Axis, func: Any, args: Args, kwargs: dict[str, Any]) -> Any:
    x, dim, wanted = args[0], args[1] % args[0].ndim, args[2]
    if dim == x.along:
        return taken(axis, x, wanted.cpu().numpy())
    return wrapped(axis, x.local.index_select(dim, wanted), x.along, x.owners)


def gather(axis: Axis, func: Any, args: Args, kwargs: dict[str, Any]) -> Any:
    x: Any = args[0]
    dim, wanted = args[1] % x.ndim, args[2]
    if not is_split(x) or dim == x.along or wanted.shape[x.along] != x.shape[x.along]:
        return NotImplemented
    return wrapped(axis, x.local.gather(dim, part(axis, wanted, x.along, x.owners)), x.along, x.owners)


def index_add(axis: Axis, func: Any, args: Args, kwargs: dict[str, Any]) -> Any:
    """Rows added to rows, or put in their place, along a whole dimension."""
    x, dim, where, source = args[0], args[1] % args[0].ndim, args[2], args[3]
    if not is_split(x) and not is_split(source):
        return NotImplemented
    along = x.along if is_split(x) else source.along
    owners = common([(x, along), (source, along)])
    in_place = func.overloadpacket.__name__.endswith("_")
    if owners is None or along == dim or (in_place and (not is_split(x) or x.owners is not owners)):
        return NotImplemented
    own = [part(axis, value, along, owners) for value in (x, source)]
    result = func(own[0], dim, where, own[1], *args[4:], **kwargs)
    return x if in_place else wrapped(axis, result, along, owners)


def scatter(axis: Axis, func: Any, args: Args, kwargs: dict[str, Any]) -> Any:
    """Elements, or a constant, put to places along a whole dimension."""
    x, dim = args[0], args[1] % args[0].ndim
    operands = [value for value in args[2:] if isinstance(value, torch.Tensor) and value.ndim]
    if not is_split(x) or x.along == dim or any(value.shape[x.along] != x.shape[x.along] for value in operands):
        return NotImplemented
    owners = common([(value, x.along) for value in (x, *operands)])
    if owners is None or owners is not x.owners:
        return NotImplemented
    own = [
        part(axis, value, x.along, owners) if isinstance(value, torch.Tensor) and value.ndim else value
        for value in args[2:]
    ]
    result = func(x.local, dim, *own, **kwargs)
    return x if func.overloadpacket.__name__.endswith("_") else wrapped(axis, result, x.along, owners)


def pad(axis: Axis, func: Any, args: Args, kwargs: dict[str, Any]) -> Any:
    x, sizes = args[0], list(args[1])
    padded = {x.ndim - 1 - i // 2 for i, size in enumerate(sizes) if size}
    return NotImplemented if x.along in padded else wrapped(axis, func(x.local, *args[1:]), x.along, x.owners)


def unfold(axis: Axis, func: Any, args: Args, kwargs: dict[str, Any]) -> Any:
    x, dim = args[0], args[1] % args[0].ndim
    return NotImplemented if dim == x.along else wrapped(axis, x.local.unfold(dim, *args[2:]), x.along, x.owners)


def complex_(axis: Axis, func: Any, args: Args, kwargs: dict[str, Any]) -> Any:
    """Pairs along the last dimension as complex numbers, and back."""
    x = args[0]
    if x.along == x.ndim - 1 and func.overloadpacket.__name__ == "view_as_complex":
        return NotImplemented
    local = x.local if x.local.is_contiguous() else x.local.contiguous()
    return wrapped(axis, func(local), x.along, x.owners)


RULES = {
    **dict.fromkeys(("view", "_unsafe_view", "_reshape_alias", "reshape"), view),
    **dict.fromkeys(("transpose", "t"), transpose),
    **dict.fromkeys(("split", "split_with_sizes"), split),
    **dict.fromkeys(("index_add", "index_copy"), index_add),
    **dict.fromkeys(("scatter", "scatter_add"), scatter),
    **dict.fromkeys(("view_as_complex", "view_as_real"), complex_),
    "permute": permute, "unsqueeze": unsqueeze, "squeeze": squeeze, "expand": expand, "slice": slice_, "select": select,
    "unbind": unbind, "cat": cat, "stack": stack, "repeat": repeat, "flip": flip, "roll": roll, "index": index,
    "index_select": index_select, "gather": gather, "constant_pad_nd": pad, "unfold": unfold,
}  # fmt: skip
