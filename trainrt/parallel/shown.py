"""A parameter that is stored in one form and seen by its module's code in another."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def show(module: nn.Module, leaf: str, view: Callable[[Tensor], Tensor] = lambda local: local) -> None:
    """Have reads of `module.leaf` give `view` of its local tensor, wherever the model's code reads it.

    The module's class is replaced by one of the same name with a property; what is stored stays in `_parameters`, and
    FSDP2, which asks for it between forward passes, gets it as it is.
    """

    def seen(self: nn.Module) -> Tensor:
        stored = self._parameters[leaf]
        assert stored is not None
        if isinstance(stored, DTensor):
            return stored if stored.device_mesh.ndim > 1 else view(stored.to_local())
        return view(stored)

    cls = type(module)
    if "_shown" not in cls.__dict__:
        cls = type(cls.__name__, (cls,), {"_shown": True})
        module.__class__ = cls
    setattr(cls, leaf, property(seen))
