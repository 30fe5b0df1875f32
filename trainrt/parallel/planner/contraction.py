"""Matrix products and convolutions: where columns begin and rows end.

A product is seen as x (..., M, K) times w (..., K, N). Of a weight, each dimension of the parameter runs along K, along N,
along both (flattened experts, seen whole) or along neither (a chosen expert).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trainrt.parallel.planner.labels import Conflict, Flow
from trainrt.parallel.planner.tape import Op, Ref
from trainrt.parallel.planner.weights import Coordinate, Dim, Weight


class Operand(NamedTuple):
    """One side, with dimensions in the order (..., rows, columns) of the product. `weight` None: an activation."""

    ref: Ref
    label: Tensor | None
    weight: Weight | None

    def coordinates(self) -> dict[Dim, Coordinate]:
        assert self.weight is not None
        return self.weight.seen_by(self.ref)


def contract(flow: Flow, op: Op) -> None:
    """The product of two operands, and what is added to it."""
    added, a, b = _sides(flow, op)
    out = op.outputs[0]
    if a.weight is not None and b.weight is not None:
        flow.demote([a.weight, b.weight], op)
        label = None
    elif b.weight is not None:
        label = _with_weight(flow, op, a, b)
    elif a.weight is not None:
        # A weight on the left: the transposed product.
        label = _with_weight(flow, op, _transposed(b), _transposed(a))
        label = label.transpose(-1, -2) if label is not None else None
    else:
        label = _activations(flow, op, a, b)
    if label is not None:
        label = label.broadcast_to(out.size) if label.dim() == len(out.size) else label.reshape(out.size)
    _add(flow, op, added, out, label)
    flow.taint(op.outputs)


def _sides(flow: Flow, op: Op) -> tuple[Ref | None, Operand, Operand]:
    args = [value for value in (*op.args, *op.kwargs.values()) if isinstance(value, Ref) and value.data is None]
    if op.name == "linear":
        x, w = args[0], _view(args[1], (1, 0))
        return (args[2] if len(args) > 2 else None), _operand(flow, x), _operand(flow, w)
    if op.name in ("addmm", "baddbmm", "addbmm"):
        return args[0], _operand(flow, args[1]), _operand(flow, args[2])
    if op.name == "mv":
        raise Conflict(f"{op.func} ({op.module})")
    return None, _operand(flow, args[0]), _operand(flow, args[1])


def _view(ref: Ref, order: tuple[int, ...]) -> Ref:
    size, stride = tuple(ref.size[d] for d in order), tuple(ref.stride[d] for d in order)
    return Ref(ref.storage, size, stride, ref.offset, ref.elements, ref.data)


def _operand(flow: Flow, ref: Ref) -> Operand:
    label, weight = flow.label(ref), flow.weight(ref)
    if label is not None or (weight is not None and weight.lookup):
        # Looked-up rows are activations to a product; their table is needed whole.
        flow.demote([weight] if label is None else [], _LOOKED_UP)
        weight = None
    return Operand(ref, label, weight)


def _transposed(operand: Operand) -> Operand:
    order = (*range(len(operand.ref.size) - 2), len(operand.ref.size) - 1, len(operand.ref.size) - 2)
    label = operand.label.transpose(-1, -2) if operand.label is not None else None
    return Operand(_view(operand.ref, order), label, operand.weight)


def _with_weight(flow: Flow, op: Op, x: Operand, w: Operand) -> Tensor | None:
    """Redco's rules: a whole input makes columns, an input cut along K makes rows."""
    coordinates = w.coordinates()
    across = len(w.ref.size) - 2
    inner = {key: seen for key, seen in coordinates.items() if seen.varies(across) and not seen.varies(across + 1)}
    outer = {key: seen for key, seen in coordinates.items() if seen.varies(across + 1) and not seen.varies(across)}
    if x.label is None:
        return _columns(flow, op, x, w, outer)
    last = x.label.dim() - 1
    if flow.known and flow.same_along(x.label, [last]):
        # Whole heads, say, against a weight that all of them share.
        flow.demote([w.weight], op)
        return x.label.narrow(last, 0, 1).expand(*x.label.shape[:-1], w.ref.size[-1])
    if bool((x.label == 0).any()):
        raise Conflict(f"{op.func}: part of its input is split ({op.module})")
    grids = {key: flow.atoms_of(key, seen.grid().swapaxes(-1, -2)) for key, seen in inner.items()}
    flow.bind_row(
        {key: grid if grid.dim() <= x.label.dim() else _shared_by_experts(grid, op) for key, grid in grids.items()},
        x.label,
        op,
    )
    return None


def _shared_by_experts(atoms: Tensor, op: Op) -> Tensor:
    """Rows of a grouped product go to experts by offsets: what (experts, 1, n) says must be the same for all."""
    if bool((atoms != atoms[:1]).any()):
        raise Conflict(f"{op.func}: experts are cut at different places ({op.module})")
    return atoms[0]


def _columns(flow: Flow, op: Op, x: Operand, w: Operand, outer: dict[Dim, Coordinate]) -> Tensor | None:
    for key in outer:
        flow.columns.setdefault(key, op.outputs[0])
    chosen = [key for key in outer if key in flow.active]
    if not chosen:
        if not outer:
            flow.demote([w.weight], op)
        return None
    if len(chosen) > 1:
        raise Conflict(f"{op.func}: two dimensions of its columns are split ({op.module})")
    (key,) = chosen
    index = torch.from_numpy(outer[key].grid())
    label = torch.where(torch.from_numpy(flow.active[key])[index], index + flow.atoms.first[key], 0)
    return _shared_by_experts(label, op) if label.dim() > len(op.outputs[0].size) else label


def _activations(flow: Flow, op: Op, a: Operand, b: Operand) -> Tensor | None:
    """Two activations: channels along K are joined, rows meet columns."""
    rows = _contracted(flow, op, a.label, -1)
    columns = _contracted(flow, op, b.label, -2)
    if rows is None and columns is None:
        return None
    shape = (*torch.broadcast_shapes(a.ref.size[:-2], b.ref.size[:-2]), a.ref.size[-2], b.ref.size[-1])
    return flow.merge([label for label in (rows, columns) if label is not None], shape)


def _contracted(flow: Flow, op: Op, label: Tensor | None, dim: int) -> Tensor | None:
    if label is None:
        return None
    where = label.dim() + dim
    mixed = (label == 0).any(where) & (label != 0).any(where)
    if bool(mixed.any()):
        raise Conflict(f"{op.func} over channels of which some are split ({op.module})")
    flow.join_along(label, [where])
    return label.narrow(where, 0, 1)


def _add(flow: Flow, op: Op, added: Ref | None, out: Ref, label: Tensor | None) -> None:
    """What a product is added to: a bias is cut with the columns, and added once after rows."""
    if added is not None:
        own, weight = flow.label(added), flow.weight(added)
        if own is not None:
            label = flow.merge([own] if label is None else [own, label], out.size)
        elif weight is not None and label is not None:
            flow.bind(added, weight, label, op)
        else:
            flow.demote([weight], op)
    flow.set_label(out, label)


def convolve(flow: Flow, op: Op) -> None:
    """A depthwise convolution is cut with its channels; a full one is a product along channels."""
    x, w = op.args[0], op.args[1]
    bias, groups = op.args[2], op.args[8]
    label, weight = flow.label(x), flow.weight(w)
    if label is None or weight is None or groups != w.size[0] or groups != x.size[1]:
        if label is not None:
            raise Conflict(f"{op.func} over split channels ({op.module})")
        flow.demote([weight, flow.weight(bias) if isinstance(bias, Ref) else None], op)
        flow.taint(op.outputs)
        return
    out = op.outputs[0]
    channel = label
    for dim in range(2, label.dim()):
        channel = channel.narrow(dim, 0, 1)
    result = channel.expand(out.size).clone()
    flow.bind(_channel_first(w, taps=len(out.size) - 2), weight, result, op)
    if isinstance(bias, Ref) and (held := flow.weight(bias)) is not None:
        flow.bind(_channel_first(bias, taps=len(out.size) - 2), held, result, op)
    flow.set_label(out, result)
    flow.taint(op.outputs)


def _channel_first(ref: Ref, *, taps: int) -> Ref:
    """(C, 1, k...) or (C,) seen as one value per channel: taps do not matter."""
    size, stride = (ref.size[0], *[1] * taps), (ref.stride[0], *[1] * taps)
    return Ref(ref.storage, size, stride, ref.offset, ref.elements, None)


_LOOKED_UP = Op(torch.ops.aten.embedding.default, (), {}, (), "a lookup")
