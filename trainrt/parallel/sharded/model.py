"""A model's split parameters: stored as DTensors of the local part, seen by its code as whole ones.

Wherever the model's code reads one, it gets a Sharded of the current local part (what FSDP2 has just gathered, say).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from trainrt.parallel.sharded import rules  # noqa: F401  what operators become
from trainrt.parallel.sharded.collectives import SumShared
from trainrt.parallel.sharded.owners import Split
from trainrt.parallel.sharded.tensor import Axis, Sharded
from trainrt.parallel.shown import local_part, show


def shard_model(model: nn.Module, splits: Mapping[str, Split], mesh: DeviceMesh, *, sequence: bool = False) -> Axis:
    """Leave this rank its part of each split parameter and have the model's code run on it.

    `mesh` has one dimension. `sequence`: activations are scattered by positions between split regions. Returns the axis,
    which counts what had to be gathered.
    """
    axis = Axis(mesh.get_group(), sequence=sequence)
    split_parameters(model, splits, axis, lambda parameter, split: _stored(parameter, split, axis, mesh))
    return axis


def split_parameters(
    model: nn.Module, splits: Mapping[str, Split], axis: Axis, stored: Callable[[Tensor, Split], Tensor]
) -> None:
    """Keep `stored` of each split parameter and show the model's code this rank's part. Tied parameters stay tied."""
    _let_functions_run_locally()
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    split_of: dict[int, Split] = {}
    for prefix, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            places.setdefault(id(parameter), []).append((module, leaf))
            name = f"{prefix}.{leaf}" if prefix else leaf
            if name in splits:
                split_of[id(parameter)] = splits[name]
    for identity, split in split_of.items():
        owners = places[identity]
        module, leaf = owners[0]
        whole = module._parameters[leaf]
        assert whole is not None
        kept = nn.Parameter(stored(whole.detach(), split), requires_grad=whole.requires_grad)
        for module, leaf in owners:
            module._parameters[leaf] = kept
            show(module, leaf, partial(local_part, view=partial(_view, split=split, axis=axis)))
    # Before as well: activation checkpointing runs layers again after the model has ended, and leaves their graph.
    model.register_forward_pre_hook(lambda *_: axis.forget())
    model.register_forward_hook(lambda *_: axis.forget(), always_call=True)


def _stored(parameter: Tensor, split: Split, axis: Axis, mesh: DeviceMesh) -> DTensor:
    """This rank's part as the local tensor of a DTensor."""
    share = axis.take(parameter, split.dim, split.owners).clone()
    shape = torch.Size(
        sum(split.owners.count(rank) for rank in range(axis.ranks)) if d == split.dim else n
        for d, n in enumerate(parameter.shape)
    )
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(share, mesh, [Shard(split.dim)], run_check=False, shape=shape, stride=stride)


def _view(local: Tensor, split: Split, axis: Axis) -> Sharded:
    if not split.owners.disjoint and torch.is_grad_enabled() and local.requires_grad:
        local = SumShared.apply(local, split.dim, split.owners, axis.group)
    return Sharded(local, axis, dim=split.dim, owners=split.owners)


def full(value: Any) -> Any:
    """Outputs of a sharded model with every tensor whole and plain."""
    return tree_map_only(Sharded, lambda tensor: tensor.full(), value)


@contextlib.contextmanager
def locals_shown(module: nn.Module) -> Iterator[None]:
    """Hooks that are registered inside see local tensors where sharded ones go in and out of the module.

    FSDP2 waits for the gradients of what goes in and comes out; a shell has none. Hooks from before see shells: what runs a
    forward pass again (activation checkpointing) has to.
    """
    waiting: list[list[Sharded | None]] = []

    def opened(value: Any) -> Any:
        leaves, structure = tree_flatten(value)
        waiting.append([leaf if isinstance(leaf, Sharded) else None for leaf in leaves])
        return tree_unflatten([leaf.local if isinstance(leaf, Sharded) else leaf for leaf in leaves], structure)

    def closed(value: Any) -> Any:
        leaves, structure = tree_flatten(value)
        shells = waiting.pop()
        made = [leaf if shell is None else shell.like(leaf) for leaf, shell in zip(leaves, shells, strict=True)]
        return tree_unflatten(made, structure)

    # The later one is put in front, the earlier it runs.
    module.register_forward_pre_hook(lambda _, args, kwargs: closed((args, kwargs)), prepend=True, with_kwargs=True)
    yield
    module.register_forward_pre_hook(lambda _, args, kwargs: opened((args, kwargs)), prepend=True, with_kwargs=True)
    module.register_forward_hook(lambda _, args, output: opened(output), prepend=True)
    module.register_forward_hook(lambda _, args, output: closed(output))


def _let_functions_run_locally() -> None:
    """A model's own autograd.Function is applied to local parts: it would lose its gradient inside a shell.

    Where its tensors are not all split alike it is applied to whole ones, like an operator without a rule.
    """
    original = torch.autograd.Function.__dict__["apply"]
    if getattr(original, "_of_trainrt", False):
        return

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        shells = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Sharded)]
        if not shells:
            return original.__func__(cls, *args, **kwargs)
        first = next((shell for shell in shells if shell.along is not None), shells[0])
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(not isinstance(one, Sharded) or _split_of(one) != _split_of(first) for one in tensors):
            first.axis.gathered[cls.__name__] += 1
            return original.__func__(cls, *full(args), **full(kwargs))
        args, kwargs = tree_map_only(Sharded, lambda shell: shell.local, (args, kwargs))
        return tree_map_only(Tensor, lambda made: _like(made, first, cls), original.__func__(cls, *args, **kwargs))

    method = classmethod(apply)
    method._of_trainrt = True  # type: ignore[attr-defined]
    torch.autograd.Function.apply = method  # type: ignore[method-assign, assignment]


def _split_of(shell: Sharded) -> tuple[Any, ...]:
    return shell.along, shell.owners, shell.partial


def _like(made: Tensor, first: Sharded, cls: Any) -> Tensor:
    if made.shape != first.local.shape:
        raise NotImplementedError(f"{cls.__name__} changes the shape of a split tensor")
    return first.like(made)
