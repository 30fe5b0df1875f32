"""The tape: every operator that a model runs on a small input, with the storage each tensor lies in.

The planner reads data flow off it, never names. A tensor is told by storage, size, stride and offset, so views need no
rule: what is known of a storage is known of all its views.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map


@dataclass(frozen=True, slots=True, eq=False)
class Ref:
    """A tensor of the tape, in elements of its storage; a complex number is two of them (`width`).

    data: the values, where they are integers or booleans (they index other tensors).
    """

    storage: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    elements: int
    data: Tensor | None
    width: int = 1


@dataclass(frozen=True, slots=True)
class Op:
    """One operator: `args` and `kwargs` with tensors replaced by Refs, which `inputs` lists.

    module: the innermost module that ran it.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Ref, ...]
    module: str
    inputs: list[Ref] = field(init=False)

    def __post_init__(self) -> None:
        found = [value for value in tree_flatten((self.args, self.kwargs))[0] if isinstance(value, Ref)]
        object.__setattr__(self, "inputs", found)

    @property
    def name(self) -> str:
        """The operator without overload and in-place mark: `add` for aten.add_.Tensor."""
        name: str = self.func.overloadpacket.__name__
        return name.removesuffix("_") if self.in_place else name

    @property
    def in_place(self) -> bool:
        name: str = self.func.overloadpacket.__name__
        return name.endswith("_") and not name.endswith("__")


@dataclass(slots=True)
class Tape:
    """`parameters`: name to the Ref of the whole parameter. Aliases appear under their first name."""

    ops: list[Op] = field(default_factory=list)
    parameters: dict[str, Ref] = field(default_factory=dict)


class _Recorder(TorchDispatchMode):
    def __init__(self, tape: Tape, modules: list[str]) -> None:
        super().__init__()
        self.tape, self.modules = tape, modules
        self._numbers: dict[int, int] = {}
        self._alive: list[Any] = []

    def ref(self, tensor: Tensor) -> Ref:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._numbers:
            self._numbers[key] = len(self._numbers)
            self._alive.append(storage)  # so that no other storage gets its address
        data = None if tensor.is_floating_point() or tensor.is_complex() else tensor
        width = 2 if tensor.is_complex() else 1
        return Ref(
            self._numbers[key], tuple(tensor.shape), tuple(step * width for step in tensor.stride()),
            int(tensor.storage_offset()) * width, storage.nbytes() // tensor.element_size() * width, data, width,
        )  # fmt: skip

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        told_args, told_kwargs = tree_map(self._told, (args, kwargs))
        result = func(*args, **kwargs)
        outputs = tuple(self.ref(value) for value in tree_flatten(result)[0] if isinstance(value, Tensor))
        self.tape.ops.append(Op(func, told_args, told_kwargs, outputs, self.modules[-1]))
        return result

    def _told(self, value: Any) -> Any:
        return self.ref(value) if isinstance(value, Tensor) else value


@torch.no_grad()
def record(model: nn.Module, run: Callable[[], Any]) -> Tape:
    """Run `run`, which calls `model` on real tensors, and return its tape. Errors of the model come through."""
    tape, modules = Tape(), [""]
    recorder = _Recorder(tape, modules)
    for name, parameter in model.named_parameters():
        tape.parameters[name] = recorder.ref(parameter)
    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: modules.append(name)))
        hooks.append(module.register_forward_hook(lambda *_: modules.__delitem__(-1), always_call=True))
    try:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), recorder:
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return tape
