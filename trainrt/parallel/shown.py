"""A parameter that is stored in one form and seen by its module's code in another."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def show(module: nn.Module, leaf: str, seen: Callable[[Tensor], Tensor]) -> None:
    """Have reads of `module.leaf` give `seen` of what is stored, wherever the model's code reads it.

    The module's class is replaced by one of the same name with a property; what is stored stays in `_parameters`.
    """

    def read(self: nn.Module) -> Tensor:
        stored = self._parameters[leaf]
        assert stored is not None
        return seen(stored)

    cls = type(module)
    if "_shown" not in cls.__dict__:
        cls = type(cls.__name__, (cls,), {"_shown": True})
        module.__class__ = cls
    setattr(cls, leaf, property(read))


def local_part(stored: Tensor, view: Callable[[Tensor], Tensor] = lambda local: local) -> Tensor:
    """A view of the local tensor of what is stored. FSDP2, which asks between forward passes, gets it as it is."""
    if isinstance(stored, DTensor):
        return stored if stored.device_mesh.ndim > 1 else view(stored.to_local())
    return view(stored)
