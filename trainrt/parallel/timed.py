"""Forward and backward of each repeated layer as events, by hooks alone.

Backward is from the gradient of what came out to that of what went in, by hooks on these tensors: hooks of modules would put
functions of their own around the layer, after which nothing may be computed in place. Where what goes in has no gradient, it ends
with the next layer's or with the pass. What activation checkpointing computes again is a part of backward.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trainrt.events import EventRing, ring
from trainrt.parallel.sharded.tensor import Sharded


class _Passes:
    """The layers of a model. `_open`: the depth at which the backward of one is open."""

    def __init__(self, into: EventRing) -> None:
        self._ring = into
        self._open: int | None = None
        self._of: str | None = None
        self._depths: list[int] = []

    def before(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._ring.enabled:
            return
        outer = self._ring.innermost
        self._depths.append(self._ring.depth)
        if outer == "backward":
            self._ring.begin(f"{name}.recompute", outer)
            return
        self._open = None
        if torch.is_grad_enabled() and (tensor := _differentiable(args, kwargs.values())) is not None:
            tensor.register_hook(partial(self._ends, name))
        self._ring.begin(name, "evaluation" if outer == "evaluation" else "forward")

    def after(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if not self._ring.enabled:
            return
        # Also called where activation checkpointing has seen enough and breaks off, or the layer raises.
        self._ring.unwind(self._depths.pop())
        if self._ring.innermost == "backward" or not torch.is_grad_enabled():
            return
        if (tensor := _differentiable(_values(output))) is not None:
            tensor.register_hook(partial(self._begins, name))

    def _begins(self, name: str, gradient: Tensor) -> None:
        if self._open is not None:
            self._ring.unwind(self._open)
        self._open, self._of = self._ring.depth, name
        self._ring.begin(name, "backward")

    def _ends(self, name: str, gradient: Tensor) -> None:
        if self._open is not None and self._of == name:
            self._ring.unwind(self._open)
            self._open = None


def _values(output: Any) -> Iterable[Any]:
    if isinstance(output, Mapping):
        return output.values()
    return output if isinstance(output, (tuple, list)) else (output,)


def _differentiable(*found: Iterable[Any]) -> Tensor | None:
    """The first tensor that gets a gradient."""
    for values in found:
        for value in values:
            tensor = value.local if isinstance(value, Sharded) else value
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                return tensor
    return None


def time_blocks(blocks: Iterable[nn.Module], *, into: EventRing = ring) -> None:
    """Record what these layers do. To be called last: what other hooks do around them is then a part of it."""
    passes = _Passes(into)
    for index, block in enumerate(blocks):
        name = f"block.{index}"
        block.register_forward_pre_hook(partial(passes.before, name), prepend=True, with_kwargs=True)
        block.register_forward_hook(partial(passes.after, name), prepend=True, always_call=True)
