"""Sharded: a tensor that shows the model its global shape and holds this rank's part.

Three kinds. *Split*: along one dimension, by owners. *Partial*: whole on every rank, but each rank's gradient is a part of
the true one. *Whole*: whole, gradient and all; it exists only while an operator runs, outside it is a plain tensor.
Forward rules are enough: the local tensors are ordinary autograd tensors, the shell has no gradient of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from trainrt.parallel.sharded.collectives import CopyToGroup, GatherSplit, Settle
from trainrt.parallel.sharded.owners import Owners

Rule = Callable[["Axis", Any, tuple[Any, ...], dict[str, Any]], Any]

RULES: dict[str, Rule] = {}
"""What an operator on split tensors becomes, by its name without overload and in-place mark (rules.py fills it).

A rule returns the result, or NotImplemented: then the operands are gathered, the operator runs on all of them, and the axis
counts it.
"""

FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {}
"""Functions that are taken whole, before they fall apart into operators (functions.py fills it)."""

RECENT = 4
"""Inputs of split regions that are remembered: the same one often feeds q, k and v."""


class Axis:
    """The ranks that a model is split over, seen from one of them. `gathered`: operators that had to gather, and how often.

    sequence: whether activations are scattered by positions between split regions (sequence.py); `positions` are the
    (samples, positions) that have been seen, `scattered` counts the times.
    """

    def __init__(self, group: dist.ProcessGroup, *, sequence: bool = False) -> None:
        self.group, self.sequence = group, sequence
        self.rank, self.ranks = group.rank(), group.size()
        self.gathered: Counter[str] = Counter()
        self.positions: set[tuple[int, int]] = set()
        self.scattered = 0
        self._recent: list[tuple[Tensor, Tensor]] = []
        self._held: dict[tuple[Owners, torch.device], Tensor] = {}

    def forget(self) -> None:
        """Let go of remembered inputs; they hold the graph of a forward pass."""
        self._recent.clear()

    def enter(self, tensor: Tensor) -> Tensor:
        """A whole tensor for use by split computation: its gradients are summed over the ranks."""
        if not tensor.requires_grad or not torch.is_grad_enabled():
            return tensor
        return self.remembered(tensor, lambda: CopyToGroup.apply(tensor, self.group))

    def remembered(self, tensor: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """What a whole tensor, or rows of one, became when split computation last read it."""
        for known, made in self._recent:
            if known is tensor:
                return made
        made = make()
        self._recent = [(tensor, made), *self._recent[: RECENT - 1]]
        return made

    def held(self, owners: Owners, device: torch.device) -> Tensor:
        """The indices this rank holds."""
        key = (owners, device)
        if key not in self._held:
            self._held[key] = torch.from_numpy(owners.held(self.rank)).to(device)
        return self._held[key]

    def take(self, tensor: Tensor, dim: int, owners: Owners) -> Tensor:
        """This rank's part of a whole tensor along `dim`."""
        runs = owners.runs(self.rank)
        if len(runs) == 1:
            return tensor.narrow(dim, *runs[0])
        return tensor.index_select(dim, self.held(owners, tensor.device))


class Sharded(Tensor):
    """See the module. `along` (a dimension) and `owners` are None where it is not split; `partial` says which kind it is then."""

    local: Tensor
    axis: Axis
    along: int | None
    owners: Owners | None
    partial: bool

    @staticmethod
    def __new__(
        cls, local: Tensor, axis: Axis, *, dim: int | None = None, owners: Owners | None = None, partial: bool = False
    ) -> Sharded:
        size = list(local.shape)
        if dim is not None and owners is not None:
            size[dim] = len(owners)
        shell: Sharded = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, size, strides=_strides(local, size), dtype=local.dtype, device=local.device, requires_grad=False
        )
        shell.local, shell.axis, shell.along, shell.owners, shell.partial = local, axis, dim, owners, partial
        return shell

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        kind = f"split along {self.along}" if self.along is not None else "partial" if self.partial else "whole"
        return f"Sharded({tuple(self.shape)}, {kind}, local {tuple(self.local.shape)})"

    @property
    def whole(self) -> bool:
        return self.along is None and not self.partial

    def like(self, local: Tensor) -> Sharded:
        """Another local tensor split as this one is."""
        return Sharded(local, self.axis, dim=self.along, owners=self.owners, partial=self.partial)

    def full(self) -> Tensor:
        """The whole tensor, plain: gathered from the ranks where it is split."""
        if self.along is not None and self.owners is not None:
            return GatherSplit.apply(self.local, self.along, self.owners, self.axis.group)
        return Settle.apply(self.local, self.axis.ranks) if self.partial else self.local

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        rule = FUNCTIONS.get(func)
        with torch._C.DisableTorchFunctionSubclass():
            if rule is not None:
                return rule(*args, **kwargs)
            if getattr(func, "__name__", "") == "__get__":
                return func(*args, **kwargs)
            return as_operators(func, _axis_of(args, kwargs), args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch.overrides.enable_reentrant_dispatch():
            return _run(_axis_of(args, kwargs or {}), func, args, kwargs or {})


def is_split(value: Any) -> bool:
    return isinstance(value, Sharded) and value.along is not None


def as_operators(func: Callable[..., Any], axis: Axis, args: Any, kwargs: Any) -> Any:
    """A function left to fall apart into operators. A shell has no gradient, so none may meet a tensor that has one."""
    args, kwargs = tree_map_only(Tensor, lambda tensor: _shelled(tensor, axis), (args, kwargs))
    return tree_map_only(Sharded, _bare, func(*args, **kwargs))


def _axis_of(args: Any, kwargs: Any) -> Axis:
    found: list[Axis] = []
    tree_map_only(Sharded, lambda tensor: found.append(tensor.axis), (args, kwargs))
    return found[0]


def _shelled(tensor: Tensor, axis: Axis) -> Tensor:
    return Sharded(tensor, axis) if tensor.requires_grad and not isinstance(tensor, Sharded) else tensor


def _bare(tensor: Sharded) -> Tensor:
    return tensor.local if tensor.whole else tensor


def _strides(local: Tensor, size: list[int]) -> tuple[int, ...]:
    """The local tensor's where it is whole; else dense strides of the global size, in the local one's order of dimensions."""
    if list(local.shape) == size:
        return local.stride()
    strides = [0] * len(size)
    step = 1
    for dim in sorted(range(len(size)), key=lambda d: (local.stride(d), -d)):
        if local.stride(dim) != 0 or size[dim] == 1:
            strides[dim] = step
            step *= max(size[dim], 1)
    return tuple(strides)


def _run(axis: Axis, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One operator on operands of which at least one is sharded."""
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Sharded)]
    if not any(is_split(leaf) for leaf in leaves):
        return _unsplit(axis, func, args, kwargs, partial=any(leaf.partial for leaf in leaves))
    rule = _rule(func)
    result = rule(axis, func, args, kwargs) if rule is not None else NotImplemented
    return _gathered(axis, func, args, kwargs) if result is NotImplemented else result


def _rule(func: Any) -> Rule | None:
    name: str = func.overloadpacket.__name__
    bare = name.removesuffix("_") if not name.endswith("__") else name
    if bare in RULES:
        return RULES[bare]
    return RULES["pointwise"] if torch.Tag.pointwise in func.tags else None


def _unsplit(axis: Axis, func: Any, args: Any, kwargs: Any, *, partial: bool) -> Any:
    """Whole operands give whole results; with partial ones among them, partial results."""
    changed = _writes(func)
    if partial and changed and not (isinstance(args[0], Sharded) and args[0].partial):
        args = (args[0], *tree_map_only(Sharded, lambda tensor: Sharded(tensor.full(), axis), args[1:]))
        partial = False

    def local(tensor: Tensor) -> Tensor:
        own = tensor.local if isinstance(tensor, Sharded) else tensor
        whole = not (isinstance(tensor, Sharded) and tensor.partial)
        return axis.enter(own) if partial and whole else own

    args_, kwargs_ = tree_map_only(Tensor, local, (args, kwargs))
    result = func(*args_, **kwargs_)
    return args[0] if changed else tree_map_only(Tensor, lambda made: Sharded(made, axis, partial=partial), result)


def _writes(func: Any) -> bool:
    """Whether the operator changes its first operand."""
    first = func._schema.arguments[0] if func._schema.arguments else None
    return first is not None and first.alias_info is not None and first.alias_info.is_write


def _gathered(axis: Axis, func: Any, args: Any, kwargs: Any) -> Any:
    """The operator on whole tensors; right for every operator, and slow."""
    axis.gathered[str(func.overloadpacket.__name__)] += 1
    whole, named = tree_map_only(Sharded, lambda tensor: tensor.full(), (args, kwargs))
    if not _writes(func):
        return tree_map_only(Tensor, lambda tensor: Sharded(tensor, axis), func(*whole, **named))
    target = args[0]
    if not isinstance(target, Sharded):
        func(*whole, **named)
        return target
    changed = func(whole[0].clone(), *whole[1:], **named)
    if target.along is not None and target.owners is not None:
        changed = axis.take(changed, target.along, target.owners)
    target.local.copy_(changed)
    return target
