"""What lies in a directory of torch.distributed.checkpoint that is to be written: items, and `.metadata` that speaks of them."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterable, Iterator, Sequence
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

from trainrt.checkpoint.targets.array import TargetArray
from trainrt.checkpoint.targets.files import TargetFile
from trainrt.checkpoint.targets.skeleton import Skeleton
from trainrt.checkpoint.writer import FILE_BYTES
from trainrt.parallel.layout import Box

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


def directory(items: Iterable[Item]) -> tuple[list[TargetFile], bytes]:
    """The files of items, and `.metadata`."""
    metadata = Metadata({}, planner_data={}, storage_data={}, version=CURRENT_DCP_VERSION)
    files = []
    for number, (held, archives) in enumerate(_files(items)):
        file = TargetFile(f"__{number}_0.distcp", tuple(archives))
        files.append(file)
        for item, offset, archive in zip(held, file.offsets, archives, strict=True):
            _describe(metadata, item, _StorageInfo(file.name, offset, archive.size))
    return files, pickle.dumps(metadata)


def _files(items: Iterable[Item]) -> Iterator[tuple[list[Item], list[Skeleton]]]:
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


def cut(array: TargetArray, entries: Sequence[str]) -> Iterator[Item]:
    """Rows of an array, as many as an item may hold."""
    whole = array.shape, array.dtype
    count = array.shape[0] if array.shape else 1
    step = max(1, ITEM_BYTES * count // max(array.bytes, 1))
    for first in range(0, max(count, 1), step):
        rest, rows = array.shape[1:], min(step, count - first)
        box = Box((first, *(0,) * len(rest)), (rows, *rest)) if array.shape else Box((), ())
        pieces = [(piece, tensor) for patch, tensor in array.pieces for piece in patch.inside(box)]
        part = TargetArray(
            array.name, array.role, array.dtype, box.length, tuple(pieces) if math.prod(box.length) else ()
        )
        yield Item(part, tuple(entries), box, whole)


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
