"""What each kind of operator does to labels: movement, pointwise, contraction, reduction, lookup.

An operator without a rule here raises Conflict when it meets labels: the columns that led to it are not cut.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from trainrt.parallel.planner.contraction import contract, convolve
from trainrt.parallel.planner.labels import Conflict, Flow
from trainrt.parallel.planner.tape import Op, Ref
from trainrt.parallel.planner.weights import Weight

IDENTITY = {
    "clone", "_to_copy", "contiguous", "alias", "detach", "lift_fresh", "lift_fresh_copy", "tril", "triu",
    "native_dropout",
}  # fmt: skip
MOVEMENT = {
    "cat", "stack", "index", "index_select", "gather", "repeat", "constant_pad_nd", "roll", "flip", "index_add",
    "index_copy", "index_put", "_index_put_impl", "scatter", "scatter_add", "slice_scatter", "select_scatter",
    "take_along_dim", "masked_scatter", "repeat_interleave", "slice", "select", "view", "_unsafe_view", "expand",
    "permute", "transpose", "unfold",
}  # fmt: skip
EXTREMES = {"amax", "amin", "max", "min", "argmax", "argmin", "prod", "any", "all"}
SUMS = {"sum", "mean", "var", "var_mean", "std", "linalg_vector_norm", "norm"}
WRITES = {"index_add": 3, "index_copy": 3, "scatter": 3, "scatter_add": 3}
"""Movement of rows into rows along a dimension (the first argument), and which argument brings them."""
SCANS = {"cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "sort", "topk", "kthvalue"}
CONTRACTIONS = {"mm", "bmm", "addmm", "baddbmm", "linear", "matmul", "_grouped_mm", "addbmm", "mv"}
ALIKE = {"zeros_like", "empty_like", "ones_like", "full_like", "rand_like"}
NEW = {"new_zeros", "new_empty", "new_ones", "new_full"}
FILLED = {"fill", "zero", "bernoulli", "uniform", "normal", "exponential"}
"""Operators whose result does not carry on what is in their operand, but is made for the same place."""


def follow(flow: Flow, op: Op) -> None:
    """Carry labels, weights and taint over one operator. Raises Conflict."""
    inputs = [ref for ref in op.inputs if ref.data is None]
    if not inputs or _is_view(op) or op.name in FILLED:
        return
    if op.name in ALIKE or op.name in NEW:
        made(flow, op)
        return
    split = any(flow.label(ref) is not None for ref in inputs)
    weighted = any(flow.weight(ref) is not None for ref in inputs)
    if not split and not weighted:
        if any(ref.storage in flow.tainted for ref in inputs):
            flow.taint(op.outputs)
        return
    rule = _rule(op)
    if rule is not None:
        rule(flow, op)
    elif split:
        raise Conflict(f"{op.func} has no rule for split channels ({op.module})")
    else:
        plain(flow, op)
    if flow.known:
        _check(flow, op)


def _rule(op: Op) -> Callable[[Flow, Op], None] | None:
    name = op.name
    if name in CONTRACTIONS:
        return contract
    if name == "convolution":
        return convolve
    if name in SPECIAL:
        return SPECIAL[name]
    if name in IDENTITY or name in ("copy", "masked_fill") or torch.Tag.pointwise in op.func.tags:
        return pointwise
    if name in MOVEMENT:
        return movement
    return reduction if name in SUMS or name in EXTREMES else scan if name in SCANS else None


def _is_view(op: Op) -> bool:
    """A new view of an operand's storage: known already. What is written in place is not."""
    storages = {ref.storage for ref in op.inputs}
    return not op.in_place and bool(op.outputs) and all(ref.storage in storages for ref in op.outputs)


def made(flow: Flow, op: Op) -> None:
    """A buffer made from a tensor is split like it, along the dimensions in which they are alike: slices fill it later."""
    ref, out = op.inputs[0], op.outputs[0]
    label = flow.label(ref)
    if label is None or len(ref.size) > len(out.size):
        return
    for dim, (n, m) in enumerate(zip(ref.size, out.size, strict=False)):
        if n != m:
            label = label.narrow(dim, 0, 1)
    if len(ref.size) == len(out.size):
        flow.set_label(out, label.expand(out.size))


def plain(flow: Flow, op: Op) -> None:
    """An operator that needs its weights whole."""
    flow.demote([flow.weight(ref) for ref in op.inputs], op)
    flow.taint(op.outputs)


def _check(flow: Flow, op: Op) -> None:
    """The runtime splits a tensor along one dimension: where groups differ along several, the outermost stays."""
    for ref in op.outputs:
        label = flow.label(ref)
        if label is None or ref.data is not None:
            continue
        groups = flow.group(label)
        varying = [dim for dim in range(groups.dim()) if bool((groups != groups.narrow(dim, 0, 1)).any())]
        if len(varying) > 1:
            flow.wide.append((op, label, varying))
        flow.together.append(np.unique(groups.numpy()))


def pointwise(flow: Flow, op: Op) -> None:
    """Element by element, with broadcasting: labels are joined, weights cut with them or made whole."""
    out = op.outputs[0]
    inputs = [ref for ref in op.inputs if ref.data is None]
    if op.name == "copy":
        inputs = inputs[1:]
    elif op.name in IDENTITY:
        inputs = inputs[:1]
    labels = [label for ref in inputs if (label := flow.label(ref)) is not None]
    held = [(ref, weight) for ref in inputs if (weight := flow.weight(ref)) is not None and flow.label(ref) is None]
    if labels:
        label = flow.merge(labels, out.size)
        for ref, weight in held:
            flow.bind(ref, weight, label, op)
        for ref in op.outputs:
            if ref.size == out.size:
                flow.set_label(ref, label)
        flow.taint(op.outputs)
        return
    derived = _derived(flow, op, inputs, held, out)
    if derived is not None and (not op.in_place or held[0][0] is inputs[0]):
        # What is written in place of a weight lies where it did.
        flow.weights.update({} if op.in_place else {out.storage: derived})
    else:
        flow.demote([weight for _, weight in held], op)
        flow.taint(op.outputs)


def _derived(flow: Flow, op: Op, inputs: list[Ref], held: list[tuple[Ref, Weight]], out: Ref) -> Weight | None:
    """The result of an operator on a weight and constants is a weight still."""
    others = [ref for ref in inputs if flow.weight(ref) is None]
    if not held or any(ref.storage in flow.tainted for ref in others):
        return None
    made = [weight.broadcast(ref, out) for ref, weight in held]
    if any(not _same(made[0], other) for other in made[1:]):
        return None
    return made[0]


def _same(a: Weight, b: Weight) -> bool:
    if a.coordinates.keys() != b.coordinates.keys():
        return False
    return all(
        np.array_equal(x, y)
        for key in a.coordinates
        for x, y in zip(a.coordinates[key].steps, b.coordinates[key].steps, strict=True)
    )


def movement(flow: Flow, op: Op) -> None:
    """Elements go elsewhere: the operator itself is run on the labels."""
    inputs = [ref for ref in op.inputs if ref.data is None]
    if all(flow.label(ref) is None for ref in inputs):
        _weight_movement(flow, op)
        return
    out = op.outputs[0]
    if op.name in WRITES:
        label = _written(flow, op)
    elif op.name == "constant_pad_nd":
        label = _padded(flow, _label_of(flow, op.args[0], op), op.args[1])
    else:
        values = tree_map(
            lambda value: _label_of(flow, value, op) if isinstance(value, Ref) else value, (op.args, op.kwargs)
        )
        if op.name == "cat":
            values = ((_alike(flow, values[0][0], *values[0][1:]), *values[0][1:]), values[1])
        if op.in_place:
            values = ((values[0][0].clone(), *values[0][1:]), values[1])
        label = op.func(*_without_value(op, values[0]), **values[1])
    flow.set_label(out, label)
    flow.taint(op.outputs)


def _alike(flow: Flow, labels: list[Tensor], dim: int = 0) -> list[Tensor]:
    """What is put beside split heads and is whole is cut with them: the rotary part of k beside the rest."""
    first = next(label for label in labels if label.any())
    dim %= first.dim()
    one = first.narrow(dim, 0, 1)
    if flow.known and not flow.same_along(first, [dim]):
        return labels
    return [label if label.any() or label.dim() != first.dim() else one.expand_as(label) for label in labels]


def _written(flow: Flow, op: Op) -> Tensor:
    """Rows put among rows: those that none is put to, or a constant, are split like the others."""
    into, brought = _label_of(flow, op.args[0], op), op.args[WRITES[op.name]]
    if not isinstance(brought, Ref):
        return into
    added = _label_of(flow, brought, op)
    dim = op.args[1]
    rest = [n for d, n in enumerate(added.shape) if d != dim % added.dim()]
    if rest != [n for d, n in enumerate(into.shape) if d != dim % into.dim()] or not added.shape[dim]:
        raise Conflict(f"{op.func} into a part of split rows ({op.module})")
    flow.join_along(added, [dim])
    return flow.merge([into, added.narrow(dim, 0, 1)], tuple(into.shape))


def _padded(flow: Flow, label: Tensor, sizes: list[int]) -> Tensor:
    """What is padded along a dimension that is not split is split like the rest."""
    for i in range(0, len(sizes), 2):
        dim = label.dim() - 1 - i // 2
        around = [0] * (2 * (i // 2)) + list(sizes[i : i + 2])
        alike = label.shape[dim] > 0 and flow.same_along(label, [dim])
        wide = torch.nn.functional.pad(label, around)
        label = label.narrow(dim, 0, 1).expand_as(wide) if alike else wide
    return label


def _without_value(op: Op, args: tuple[Any, ...]) -> tuple[Any, ...]:
    if op.name in ("index_put", "_index_put_impl"):
        return (*args[:3], False)
    return args


def _label_of(flow: Flow, ref: Ref, op: Op) -> Tensor:
    """Labels of an operand; integers stand for themselves. A weight among labelled operands gives its own atoms."""
    if ref.data is not None:
        return ref.data
    label = flow.label(ref)
    if label is not None:
        return label
    weight = flow.weight(ref)
    if weight is not None and not weight.lookup and len(weight.coordinates) == 1:
        ((key, seen),) = weight.seen_by(ref).items()
        flow.direct.add(key)
        return flow.atoms_of(key, seen.grid()).broadcast_to(ref.size)
    flow.demote([weight], op)
    return torch.zeros(ref.size, dtype=torch.int64)


def _weight_movement(flow: Flow, op: Op) -> None:
    """Rows of a weight picked by a list of indices stay a weight; anything else needs it whole."""
    first = op.args[0]
    weight = flow.weight(first) if isinstance(first, Ref) else None
    if weight is not None and op.name in ("index", "index_select"):
        if op.name == "index":
            given = [(axis, index) for axis, index in enumerate(op.args[1]) if index is not None]
        else:
            given = [(op.args[1], op.args[2])]
        axis, index = given[0]
        if len(given) == 1 and len(index.size) == 1 and index.data is not None and index.data.dtype != torch.bool:
            flow.weights[op.outputs[0].storage] = weight.picked(first, op.outputs[0], axis, index.data.numpy())
            return
    plain(flow, op)


def _dims(op: Op, ref: Ref) -> tuple[list[int], bool]:
    """The reduced dimensions of a reduction, and whether they are kept."""
    names = [argument.name for argument in op.func._schema.arguments]
    given = dict(zip(names, op.args, strict=False)) | op.kwargs
    dims = given.get("dim")
    if dims is None or dims == []:
        dims = list(range(len(ref.size)))
    listed = [dims] if isinstance(dims, int) else dims
    return [dim % max(len(ref.size), 1) for dim in listed], bool(given.get("keepdim", False))


def labelled(rule: Callable[[Flow, Op, Ref, Tensor], None]) -> Callable[[Flow, Op], None]:
    """A rule about the labels of the first operand; where that has none, weights are needed whole."""

    def followed(flow: Flow, op: Op) -> None:
        ref = op.inputs[0]
        label = flow.label(ref)
        if label is None:
            plain(flow, op)
            return
        rule(flow, op, ref, label)
        flow.taint(op.outputs)

    return followed


@labelled
def reduction(flow: Flow, op: Op, ref: Ref, label: Tensor) -> None:
    """Channels added up must be on one rank, or be partial sums where that is allowed."""
    dims, keep = _dims(op, ref)
    first = _reduced(flow, op, label, dims, partial=op.name in SUMS)
    if first is not None and not keep:
        for dim in sorted(dims, reverse=True):
            first = first.select(dim, 0)
    for out in op.outputs:
        flow.set_label(out, first)


def _reduced(flow: Flow, op: Op, label: Tensor, dims: list[int], *, partial: bool) -> Tensor | None:
    """The label of what is reduced over `dims` (kept, of length 1), or None where it is summed over ranks."""
    first = label
    for dim in dims:
        first = first.narrow(dim, 0, 1)
    if flow.known and flow.same_along(label, dims):
        return first
    if flow.reduce:
        if not flow.known:
            return None
        if not partial or bool((label == 0).any()):
            raise Conflict(f"{op.func} over split channels ({op.module})")
        return None
    if bool(((label == 0).any(dims[0], keepdim=True) & (label != 0).any(dims[0], keepdim=True)).any()):
        raise Conflict(f"{op.func} over channels of which some are split ({op.module})")
    flow.join_along(label, dims)
    return first


@labelled
def scan(flow: Flow, op: Op, ref: Ref, label: Tensor) -> None:
    """Order along a dimension matters: its channels must be on one rank."""
    where = 2 if op.name in ("topk", "kthvalue") else 1
    dim = op.kwargs.get("dim", op.args[where] if len(op.args) > where else -1) % len(ref.size)
    if flow.known and not flow.same_along(label, [dim]):
        raise Conflict(f"{op.func} along split channels ({op.module})")
    flow.join_along(label, [dim])
    for out in op.outputs:
        flow.set_label(out, label.narrow(dim, 0, out.size[dim]))


@labelled
def softmax(flow: Flow, op: Op, ref: Ref, label: Tensor) -> None:
    """Over split channels the log-softmax of a vocabulary is computed in parts; attention's is joined."""
    dim = op.args[1] % len(ref.size)
    if op.name != "_log_softmax":
        _reduced(flow, op, label, [dim], partial=True)
    flow.set_label(op.outputs[0], label)


def picked_loss(flow: Flow, op: Op) -> None:
    """Negative log-likelihood picks one channel of a row: its owner has it, the others add zero."""
    plain(flow, op)
    for out in op.outputs:
        flow.set_label(out, None)


@labelled
def normalization(flow: Flow, op: Op, ref: Ref, label: Tensor) -> None:
    """A norm over the last dimensions, with weights of their shape."""
    shape = op.args[1]
    held = [value for value in op.args[2:4] if isinstance(value, Ref)]
    dims = list(range(len(ref.size) - len(shape), len(ref.size)))
    _reduced(flow, op, label, dims, partial=True)
    for part in held:
        weight = flow.weight(part)
        if weight is not None:
            flow.bind(part, weight, label, op)
    flow.set_label(op.outputs[0], label)


def embedding(flow: Flow, op: Op) -> None:
    """Rows looked up: a table may be cut by rows, or by columns where they meet labels later."""
    ref, out = op.args[0], op.outputs[0]
    weight = flow.weight(ref)
    if weight is None:
        raise Conflict(f"a lookup in split channels ({op.module})")
    keys = [key for key, seen in weight.seen_by(ref).items() if seen.varies(0)]
    flow.tables.update(keys)
    if any(key in flow.active for key in keys):
        flow.taint(op.outputs)
    else:
        flow.weights[out.storage] = weight.looked_up(ref, out)


SPECIAL: dict[str, Callable[[Flow, Op], None]] = {
    "_softmax": softmax,
    "_log_softmax": softmax,
    "_safe_softmax": softmax,
    "nll_loss_forward": picked_loss,
    "nll_loss2d_forward": picked_loss,
    "native_layer_norm": normalization,
    "_fused_rms_norm": normalization,
    "embedding": embedding,
}
