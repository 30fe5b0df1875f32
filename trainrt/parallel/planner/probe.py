"""A small model of the same structure as a large one, to be run while planning: few layers, weights that cost nothing.

What repeats is decided once, so of each kind of layer one is kept. Buffers are real, since models compute them when they
are made; parameters get no storage until it is known which are left.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from trainrt.errors import PlanError
from trainrt.parallel.planner.tape import Tape, record

KEPT_LAYERS = 2
"""At least so many layers stay: what the first owns and the next ones use (T5's position bias) must be seen."""

RANDOM_ELEMENTS = 1 << 20
"""Larger weights are zero pages that nobody wrote: only where channels go matters to a tape."""


@dataclass(frozen=True, slots=True)
class Blueprint:
    """How to make a model without storage for its parameters, and how to run it: the loss of a small batch.

    key: gives text that is the same for two models only if they compute the same way; asked for where a plan is looked up.
    sized: the loss of one sample with so many positions; None where samples come as they are, `samples` in a small batch.
    """

    make: Callable[[], nn.Module]
    loss: Callable[[nn.Module], Tensor]
    key: Callable[[], str]
    sized: Callable[[nn.Module, int], Tensor] | None = None
    samples: int = 1


@contextlib.contextmanager
def hollow() -> Iterator[None]:
    """Modules made inside have parameters on the meta device; all else is real. Ties stay ties."""
    register = nn.Module.register_parameter

    def registered(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = registered  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@lru_cache(maxsize=1)
def trace(blueprint: Blueprint) -> Tape:
    """The tape of the shortened model, or of the whole one where it cannot be shortened. Raises PlanError.

    The last one is kept: a search asks for the plans of many meshes.
    """
    failure: Exception | None = None
    for shorten in (True, False):
        model = blueprint.make().eval()
        if shorten and not shortened(model):
            continue
        materialize(model, random_elements=RANDOM_ELEMENTS)
        try:
            return record(model, lambda model=model: blueprint.loss(model))  # type: ignore[misc]
        except Exception as error:
            failure = error
    raise PlanError(f"the model cannot be run on a small batch: {type(failure).__name__}: {failure}") from failure


def small_model(
    blueprint: Blueprint, *, dtype: torch.dtype = torch.float32, random_elements: float = float("inf")
) -> nn.Module:
    """The shortened model with random weights, the same every time, and zeros in those above `random_elements`."""
    model = blueprint.make().eval()
    shortened(model)
    materialize(model, dtype=dtype, random_elements=random_elements)
    return model


def shortened(model: nn.Module) -> bool:
    """Of each outermost list of layers keep one of each kind, in order. Returns whether any went."""
    changed = False
    for _, module in list(_outermost(model)):
        kinds: dict[str, int] = {}
        kept: list[nn.Module] = []
        for layer in module:
            kind = _kind(layer)
            if kind not in kinds or len(kept) < KEPT_LAYERS:
                kinds[kind] = len(kept)
                kept.append(layer)
        if len(kept) < len(module):
            changed = True
            for name in list(module._modules):
                del module._modules[name]
            for position, layer in enumerate(kept):
                module._modules[str(position)] = layer
    return changed


def layers_of(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """The layers of each outermost list, and text that is equal for those of a kind, in the shortened model too."""
    for name, layers in _outermost(model):
        for layer in layers:
            yield layer, f"{name} {_kind(layer)}"


def _kind(layer: nn.Module) -> str:
    return repr([(name, tuple(p.shape)) for name, p in layer.named_parameters()])


def _outermost(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            yield prefix + name, child
        else:
            yield from _outermost(child, f"{prefix}{name}.")


@torch.no_grad()
def materialize(model: nn.Module, *, random_elements: float = float("inf"), dtype: torch.dtype = torch.float32) -> None:
    """Give parameters storage: small random numbers, the same every time, and zeros in those above `random_elements`."""
    generator = torch.Generator().manual_seed(0)
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for leaf, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in made:
                if parameter.numel() <= random_elements:
                    values = torch.randn(parameter.shape, generator=generator, dtype=dtype) * 0.1
                else:
                    values = _untouched(tuple(parameter.shape), dtype)
                made[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
            module._parameters[leaf] = made[id(parameter)]
        for leaf, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_floating_point():
                module._buffers[leaf] = buffer.to(dtype)


def _untouched(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros in memory that nobody has written to, so that it takes none: numpy asks for such pages, torch writes them."""
    width = torch.empty((), dtype=dtype).element_size()
    return torch.from_numpy(np.zeros(shape, f"i{width}")).view(dtype)


def source_of(model: nn.Module) -> str:
    """What a model is made of, as text: a digest of the files its classes stand in, and its parameters."""
    files = set()
    for cls in {type(module) for module in model.modules()}:
        try:
            files.add(inspect.getfile(cls))
        except (OSError, TypeError):
            files.add(f"{cls.__module__}.{cls.__qualname__}")
    digest = hashlib.sha256(torch.__version__.encode())
    for file in sorted(files):
        digest.update(Path(file).read_bytes() if Path(file).exists() else file.encode())
    for name, parameter in model.named_parameters(remove_duplicate=False):
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
    return digest.hexdigest()
