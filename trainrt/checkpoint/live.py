"""Live names and file names: what frameworks that save a model as it stands in memory call the tensors of a Hugging Face model.

transformers packs some tensors of its file format into others (Mixtral's experts into one), ties some, and has an order of
parameters, which flat partitions follow. Packing and unpacking say the same bytes' places in other words: no byte is moved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from trainrt.checkpoint.formats.opened import Opened, release
from trainrt.checkpoint.source import Source
from trainrt.errors import CheckpointError
from trainrt.parallel.layout import Box, Fragment, Layout, LogicalTensor
from trainrt.parallel.packing import packed_parts
from trainrt.parallel.plan import Part


@dataclass(frozen=True, slots=True)
class LiveModel:
    """The order of a model's parameters, what is packed in them, and which names are tied to which."""

    order: tuple[str, ...]
    parts: Mapping[str, tuple[Part, ...]]
    ties: Mapping[str, str]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> LiveModel | None:
        """By a model's config.json; None where transformers does not know it.

        A config that does not name its class is that of a causal language model. Raises CheckpointError for one that is none.
        """
        if not config.get("architectures") and not config.get("model_type"):
            return None
        # Takes a second: only where there is a model to look for.
        import transformers
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        try:
            if config.get("model_type") not in transformers.CONFIG_MAPPING:
                return None
            (named, *_) = config.get("architectures") or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config["model_type"])]
            factory = getattr(transformers, str(named), None)
            if not (isinstance(factory, type) and issubclass(factory, transformers.PreTrainedModel)):
                return None
            with torch.device("meta"):
                model = factory(transformers.AutoConfig.for_model(**config))
            parts = packed_parts(model)
        except Exception as error:
            # What transformers makes of wrong numbers is any of its errors, or of torch's.
            raise CheckpointError(f"config.json: no model can be made of it: {error}") from error
        ties = {str(tied): str(owner) for tied, owner in (getattr(model, "all_tied_weights_keys", None) or {}).items()}
        packs = {name: held for name, held in parts.items() if [part.name for part in held] != [name]}
        return cls(tuple(name for name, _ in model.named_parameters()), packs, ties)

    def file_names(self, live: str) -> list[str]:
        """What a live tensor is called in files."""
        return [part.name for part in self.parts[live]] if live in self.parts else [live]


def unpacked(opened: Opened, model: LiveModel) -> Opened:
    """A checkpoint that has live names, with the names of files; ties that it does not speak of are made known."""
    layout = _Places(opened.source)
    for tensor, fragments in opened.source.layout:
        # Moments of another shape than their parameter are of all that is packed in it, and keep its name.
        packs = tensor.name in model.parts and _extent(model.parts[tensor.name]) == tensor.shape
        for part in model.parts[tensor.name] if packs else (Part.whole(tensor.name, tensor.shape),):
            owner = _owner(opened, model, part.name, tensor)
            logical = replace(tensor, name=owner or part.name, shape=part.shape)
            # What is tied is a replica of its owner: it has another rank, and must be equal.
            apart = (
                1 + max((f.rank for f in opened.source.layout.fragments[owner, tensor.role]), default=0) if owner else 0
            )
            for fragment in fragments:
                for piece in _inside(part, fragment, tensor):
                    layout.add(logical, replace(piece, rank=piece.rank + apart), tensor)
    ties = {tied: owner for tied, owner in model.ties.items() if (owner, "parameter") in layout.layout.tensors}
    metadata = _renamed(opened.metadata, lambda name: model.file_names(name))
    metadata["aliases"] = {**ties, **opened.metadata.get("aliases", {})}
    return replace(opened, source=layout, metadata=metadata)


def _owner(opened: Opened, model: LiveModel, name: str, tensor: LogicalTensor) -> str | None:
    """Whose replica a tensor is that the model ties, and the checkpoint stored by itself."""
    owner = model.ties.get(name)
    return owner if owner is not None and (owner, tensor.role) in opened.source.layout.tensors else None


def packed(opened: Opened, model: LiveModel) -> tuple[Opened, list[str]]:
    """A checkpoint that has the names of files, with live names; and what cannot be packed.

    Raises CheckpointError for a parameter that is not of the model's shape.
    """
    homes = {part.name: (live, part) for live, parts in model.parts.items() for part in parts}
    layout, lost = _Places(opened.source), []
    for tensor, fragments in opened.source.layout:
        live, part = homes.get(tensor.name, (tensor.name, Part.whole(tensor.name, tensor.shape)))
        if part.shape != tensor.shape:
            if tensor.role not in ("parameter", "master"):
                lost.append(f"{tensor.role} of {tensor.name}: of shape {tensor.shape}, cannot be packed into {live}")
                continue
            raise CheckpointError(
                f"{tensor.name} ({tensor.role}): of shape {tensor.shape}, the model wants {part.shape}"
            )
        shape = tensor.shape if live == tensor.name else _extent(model.parts[live])
        for fragment in fragments:
            layout.add(replace(tensor, name=live, shape=shape), _outside(part, fragment), tensor)
    metadata = _renamed(opened.metadata, lambda name: [homes[name][0] if name in homes else name])
    stored = {name for name, _ in layout.layout.tensors}
    ties = {tied: owner for tied, owner in model.ties.items() if owner in stored and tied not in stored}
    metadata["aliases"] = {**ties, **opened.metadata.get("aliases", {})}
    return replace(opened, source=layout, metadata=metadata), lost


class _Places:
    """A source under other names: each fragment knows which tensor it was of."""

    def __init__(self, source: Source) -> None:
        self.layout, self._source = Layout(), source
        self._origins: list[LogicalTensor] = []
        self._numbers: dict[LogicalTensor, int] = {}

    def add(self, tensor: LogicalTensor, fragment: Fragment, origin: LogicalTensor) -> None:
        if origin not in self._numbers:
            self._numbers[origin] = len(self._origins)
            self._origins.append(origin)
        self.layout.add(tensor, replace(fragment, storage=f"{self._numbers[origin]}:{fragment.storage}"))

    def read(self, tensor: LogicalTensor, fragment: Fragment) -> np.ndarray:
        number, _, storage = fragment.storage.partition(":")
        return self._source.read(self._origins[int(number)], replace(fragment, storage=storage))

    def release(self) -> None:
        release(self._source)


def _extent(parts: Iterable[Part]) -> tuple[int, ...]:
    """The shape of a live tensor, from what is packed in it."""
    lengths: list[int] = []
    for part in parts:
        lengths = lengths or [0] * len(part.offset)
        for d, offset in enumerate(part.offset):
            along = part.shape[part.dims.index(d)] if d in part.dims else 1
            lengths[d] = max(lengths[d], offset + along)
    return tuple(lengths)


def _inside(part: Part, fragment: Fragment, live: LogicalTensor) -> Iterator[Fragment]:
    """What of a part lies in a fragment of its live tensor."""
    extent = [1] * len(live.shape)
    for dim, n in zip(part.dims, part.shape, strict=True):
        extent[dim] = n
    common = fragment.box.intersect(Box(part.offset, tuple(extent))) if math.prod(live.shape) else fragment.box
    if common is not None:
        held = fragment.narrow(common)
        box = Box(
            tuple(common.offset[d] - part.offset[d] for d in part.dims), tuple(common.length[d] for d in part.dims)
        )
        yield replace(held, box=box, strides=tuple(held.strides[d] for d in part.dims))


def _outside(part: Part, fragment: Fragment) -> Fragment:
    """A fragment of a part, as one of its live tensor."""
    offset, length, strides = list(part.offset), [1] * len(part.offset), [1] * len(part.offset)
    for d, at, n, step in zip(part.dims, fragment.box.offset, fragment.box.length, fragment.strides, strict=True):
        offset[d], length[d], strides[d] = part.offset[d] + at, n, step
    return replace(fragment, box=Box(tuple(offset), tuple(length)), strides=tuple(strides))


def _renamed(metadata: Mapping[str, Any], names: Callable[[str], list[str]]) -> dict[str, Any]:
    """Metadata whose optimizer speaks of other names; each stands once."""
    optimizer = dict(metadata.get("optimizer") or {})
    if optimizer:
        optimizer["groups"] = [
            {**group, "tensors": list(dict.fromkeys(new for name in group["tensors"] for new in names(name)))}
            for group in optimizer.get("groups", [])
        ]
        optimizer["steps"] = {new: step for name, step in optimizer.get("steps", {}).items() for new in names(name)}
    return {**metadata, "optimizer": optimizer}
