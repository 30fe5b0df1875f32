"""What forward keeps for backward, counted in runs of the small model as the first rank of the axis would run it.

Bytes of a sample grow with its positions, and with their square where attention keeps its scores: three short runs give
the three numbers, layer by layer, and layers of a kind count as often as the whole model has them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainrt.parallel.planner.probe import RANDOM_ELEMENTS, Blueprint, layers_of, small_model
from trainrt.parallel.planner.sharding import Cache, Sharding, key_of

SHORT = 8
"""Positions of the shortest run, or as many as there are ranks; the others have two and three times as many."""

OUTSIDE = "outside of layers"


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes of one sample on a rank. kept: of all layers, and outside of them. inputs: of the layers' inputs only.

    layer: of the largest layer. transient: of the largest tensor, which comes once more while its gradient is made.
    """

    kept: float
    outside: float
    inputs: float
    layer: float
    transient: float

    def bytes(self, *, recomputed: bool) -> float:
        """What a sample takes in all, with every layer computed again in backward, or not."""
        layers = self.inputs + self.layer if recomputed else self.kept
        return self.outside + layers + self.transient


def activations_of(
    blueprint: Blueprint, whole: nn.Module, sharding: Sharding, dtype: torch.dtype, positions: int
) -> Activations | None:
    """Of a sample with so many positions, computed in `dtype`. None where the model's code does not run so."""
    key = key_of(f"activations, tp {sharding.ranks} {sharding.sequence}, {dtype}, {positions}", blueprint)
    known = Cache().read(key)
    if known is None:
        try:
            known = asdict(_measure(blueprint, whole, sharding, dtype, positions))
        except Exception:
            return None
        Cache().write(key, known)
    return Activations(**known)


def _measure(
    blueprint: Blueprint, whole: nn.Module, sharding: Sharding, dtype: torch.dtype, positions: int
) -> Activations:
    model = small_model(blueprint, dtype=dtype, random_elements=RANDOM_ELEMENTS).train()
    kinds = {id(layer): kind for layer, kind in layers_of(model)}
    times = Counter(kind for _, kind in layers_of(whole))
    here = Counter(kinds.values())
    if sharding.ranks > 1:
        # Not every plan splits, and torch's distributed tensors take a second to import.
        from trainrt.parallel.planner.imagined import split_as_first

        split_as_first(model, sharding.splits, sharding.ranks, sequence=sharding.sequence)

    def run(loss: Callable[[], Tensor]) -> _Counts:
        return _Count(model, kinds).run(loss)

    sized, scale = blueprint.sized, 1.0
    short = max(SHORT, sharding.ranks)
    if sized is None:
        found, scale = run(lambda: blueprint.loss(model)), 1 / blueprint.samples
    elif positions <= 3 * short:
        found = run(lambda: sized(model, positions))
    else:
        lengths = [short * times for times in (1, 2, 3)]
        found = _extrapolated(lengths, [run(partial(sized, model, length)) for length in lengths], positions)

    def all_layers(what: dict[str, float]) -> float:
        return sum(bytes * times[kind] / here[kind] for kind, bytes in what.items() if kind != OUTSIDE)

    kept, inputs = found.kept, found.inputs
    return Activations(
        kept=scale * all_layers(kept), outside=scale * kept.get(OUTSIDE, 0.0), inputs=scale * all_layers(inputs),
        layer=scale * max((bytes / here[kind] for kind, bytes in kept.items() if kind != OUTSIDE), default=0.0),
        transient=scale * found.largest,
    )  # fmt: skip


@dataclass(slots=True)
class _Counts:
    """Bytes by kind of layer, and of the largest tensor."""

    kept: dict[str, float]
    inputs: dict[str, float]
    largest: float


def _extrapolated(lengths: list[int], counts: list[_Counts], positions: int) -> _Counts:
    """The parabola through three runs, at `positions`."""

    def at(values: list[float]) -> float:
        return max(float(np.polyval(np.polyfit(lengths, values, 2), positions)), 0.0)

    kept = {kind: at([c.kept.get(kind, 0.0) for c in counts]) for kind in counts[-1].kept}
    inputs = {kind: at([c.inputs.get(kind, 0.0) for c in counts]) for kind in counts[-1].inputs}
    return _Counts(kept, inputs, at([c.largest for c in counts]))


class _Count:
    """One forward pass with every tensor counted that autograd keeps, once for each storage."""

    def __init__(self, model: nn.Module, kinds: dict[int, str]) -> None:
        self._model, self._kinds = model, kinds
        self._inside = [OUTSIDE]
        self._counts = _Counts(defaultdict(float), defaultdict(float), 0.0)
        # Kept alive, so that no other storage gets its address.
        self._seen = {p.untyped_storage()._cdata: p for p in (*model.parameters(), *model.buffers())}

    def run(self, forward: Callable[[], Tensor]) -> _Counts:
        hooks = []
        for layer in self._model.modules():
            if id(layer) in self._kinds:
                hooks.append(layer.register_forward_pre_hook(self._enter, with_kwargs=True))
                hooks.append(layer.register_forward_hook(lambda *_: self._inside.__delitem__(-1), always_call=True))
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda kept: kept):
                forward()
        finally:
            for hook in hooks:
                hook.remove()
        return self._counts

    def _enter(self, layer: nn.Module, args: Any, kwargs: Any) -> None:
        kind = self._kinds[id(layer)]
        self._inside.append(kind)
        tensors = (getattr(x, "local", x) for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        self._counts.inputs[kind] += sum({id(x): x.nbytes for x in tensors if x.requires_grad}.values())

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen[storage._cdata] = tensor.detach()  # type: ignore[assignment]
            self._counts.kept[self._inside[-1]] += storage.nbytes()
            self._counts.largest = max(self._counts.largest, storage.nbytes())
        return tensor
