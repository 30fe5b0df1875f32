"""torch.distributed.checkpoint, as `torch.distributed.checkpoint.state_dict` names things. What is in it: see formats.dcp.

A model in low precision is written by its masters: whoever trains with FSDP2 in mixed precision keeps float32 parameters, and a
model in low precision rounds what it loads. What DCP has no place for (that dtype, ties, the step) stands in an entry of ours,
which torch passes over.
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from trainrt.checkpoint.formats.dcp import OURS
from trainrt.checkpoint.formats.dcp_items import METADATA
from trainrt.checkpoint.formats.opened import Opened
from trainrt.checkpoint.live import LiveModel
from trainrt.checkpoint.mapping.expression import Patch
from trainrt.checkpoint.targets.array import TargetArray
from trainrt.checkpoint.targets.files import FilesTarget, TargetFile
from trainrt.checkpoint.targets.skeleton import Skeleton
from trainrt.checkpoint.targets.target import Target
from trainrt.checkpoint.targets.training import Training
from trainrt.checkpoint.writer import FILE_BYTES
from trainrt.parallel.layout import Box, LogicalTensor

ITEM_BYTES = 64 << 20
"""A tensor is cut into items of this size: torch reads an item whole, whatever part of it is wanted."""


@dataclass(frozen=True, slots=True)
class Item:
    """An archive of a file, and the entries that it stands for: of tensors with the box's corner and shape."""

    state: Any
    entries: tuple[str, ...]
    box: Box | None = None
    tensor: tuple[tuple[int, ...], str] | None = None
    """Shape and dtype of the whole."""


def make(opened: Opened, model: LiveModel | None) -> tuple[Opened, Target, list[str]]:
    training = Training(opened, model)
    metadata = Metadata({}, planner_data={}, storage_data={}, version=CURRENT_DCP_VERSION)
    files = []
    for number, (items, archives) in enumerate(_files(_items(training))):
        file = TargetFile(f"__{number}_0.distcp", tuple(archives))
        files.append(file)
        for item, offset, archive in zip(items, file.offsets, archives, strict=True):
            _describe(metadata, item, _StorageInfo(file.name, offset, archive.size))
    return training.opened, FilesTarget(files, {METADATA: pickle.dumps(metadata)}), []


def _files(items: Iterator[Item]) -> Iterator[tuple[list[Item], list[Skeleton]]]:
    """Items and their archives, until a file is full."""
    held: list[Item] = []
    archives: list[Skeleton] = []
    for item in items:
        held.append(item)
        archives.append(Skeleton.of(item.state))
        if sum(archive.size for archive in archives) >= FILE_BYTES:
            yield held, archives
            held, archives = [], []
    if held:
        yield held, archives


def _items(training: Training) -> Iterator[Item]:
    tensors = training.tensors
    ties: dict[str, list[str]] = {}
    for tied, owner in training.aliases.items():
        ties.setdefault(owner, []).append(tied)
    for parameter in [*training.parameters, *training.buffers]:
        shown = tensors.get((parameter.name, "master"), parameter)
        yield from _cut(shown, [f"model.{name}" for name in (parameter.name, *ties.get(parameter.name, ()))])
    for name, role in tensors:
        if role in training.moments:
            yield from _cut(tensors[name, role], [f"optim.state.{name}.{role}"])
    for group in training.groups:
        if group.step is not None:
            steps = tuple(f"optim.state.{name}.step" for name in group.names)
            yield Item(torch.tensor(float(group.step)), steps, Box((), ()), ((), "float32"))
        for key, value in group.settings.items():
            yield Item(value, tuple(f"optim.param_groups.{name}.{key}" for name in group.names))
    yield Item(json.dumps(_ours(training)), (OURS,))


def _ours(training: Training) -> dict[str, Any]:
    """What the reader wants to know, and DCP has no place for."""
    kept = ("step", "scheduler", "data", "rng", "config", "model_config")
    metadata = {key: training.opened.metadata[key] for key in kept if key in training.opened.metadata}
    lowered = {t.name: t.dtype for t in training.parameters if (t.name, "master") in training.tensors}
    buffers = [tensor.name for tensor in training.buffers]
    return {"metadata": metadata, "aliases": training.aliases, "lowered": lowered, "buffers": buffers}


def _cut(tensor: LogicalTensor, entries: Sequence[str]) -> Iterator[Item]:
    """Rows of a tensor, as many as an item may hold."""
    whole = tensor.shape, tensor.dtype
    count = tensor.shape[0] if tensor.shape else 1
    step = max(1, ITEM_BYTES * count // max(tensor.bytes, 1))
    for first in range(0, max(count, 1), step):
        rest = tensor.shape[1:]
        rows = min(step, count - first)
        box = Box((first, *(0,) * len(rest)), (rows, *rest)) if tensor.shape else Box((), ())
        patch = Patch(tensor.name, box, (0,) * len(box.length), tuple(range(len(box.length))))
        pieces = ((patch, tensor),) if math.prod(box.length) else ()
        array = TargetArray(tensor.name, tensor.role, tensor.dtype, box.length, pieces)
        yield Item(array, tuple(entries), box, whole)


def _describe(metadata: Metadata, item: Item, place: _StorageInfo) -> None:
    """Note an item under all its entries."""
    for entry in item.entries:
        head, _, rest = entry.partition(".")
        metadata.planner_data[entry] = (head, rest) if rest else (head,)
        if item.box is None or item.tensor is None:
            metadata.state_dict_metadata[entry] = BytesStorageMetadata()
            metadata.storage_data[MetadataIndex(entry)] = place
            continue
        shape, dtype = item.tensor
        properties = TensorProperties(dtype=getattr(torch, dtype))
        known = metadata.state_dict_metadata.setdefault(entry, TensorStorageMetadata(properties, torch.Size(shape), []))
        assert isinstance(known, TensorStorageMetadata)  # fmt: skip
        known.chunks.append(ChunkStorageMetadata(torch.Size(item.box.offset), torch.Size(item.box.length)))
        index = MetadataIndex(entry, torch.Size(item.box.offset), len(known.chunks) - 1)
        metadata.storage_data[index] = place
