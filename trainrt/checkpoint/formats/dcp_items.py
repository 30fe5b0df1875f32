"""What lies in a directory of torch.distributed.checkpoint: `.metadata`, and the items of `__R_N.distcp` that it speaks of.

Each item of a .distcp file is a file of `torch.save` in itself. `.metadata` is a pickle, and is read by an unpickler that builds
the classes of that format as stand-ins, torch.Size, dtypes and plain containers, and nothing else.
"""

from __future__ import annotations

import pickle
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from trainrt.checkpoint.formats import torch_file
from trainrt.checkpoint.formats.files import FileSource, Record
from trainrt.checkpoint.formats.place import inside, no_link
from trainrt.checkpoint.mapping.rules import Part, Parts, StoredArray
from trainrt.errors import CheckpointError
from trainrt.parallel.layout import Box, Layout

METADATA = ".metadata"
FORMAT = "torch.distributed.checkpoint"
MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"
STAND_INS = {
    (f"{FORMAT}.metadata", name)
    for name in (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "_MEM_FORMAT_ENCODING",
    )
} | {(f"{FORMAT}.filesystem", "_StorageInfo")} | {
    (f"{FORMAT}.planner", name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")
} | {(MEGATRON, name) for name in ("MCoreMetadata", "MCoreSavePlan")}  # fmt: skip
VALUES: dict[tuple[str, str], Any] = {
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): lambda name: name,
    ("pathlib", "PosixPath"): lambda *parts: "/".join(parts),
    ("pathlib", "PurePosixPath"): lambda *parts: "/".join(parts),
    ("collections", "OrderedDict"): dict,
    **{("torch", name): getattr(torch, name) for name in (
        "float64", "float32", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8", "bool",
    )},
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in VALUES:
            return VALUES[module, name]
        if (module, name) in STAND_INS:
            return type(name, (torch_file.StandIn,), {"__hash__": _hash, "__eq__": _equal})
        raise CheckpointError(f"refused: it would build {module}.{name}, which has no place in {METADATA}")

    def persistent_load(self, pid: Any) -> Any:
        raise CheckpointError("refused: it refers to something outside of itself")


def _hash(held: torch_file.StandIn) -> int:
    return id(held)


def _equal(one: torch_file.StandIn, other: object) -> bool:
    return one is other


def _read_metadata(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            return _Unpickler(file).load()
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except Exception as error:
        raise CheckpointError(f"{path}: no metadata of a distributed checkpoint: {error}") from error


class Items:
    """The tensors and objects of one directory. Raises CheckpointError for what is missing, refused or damaged."""

    def __init__(self, path: Path) -> None:
        self._path = path
        metadata = _read_metadata(no_link(path / METADATA))
        self.tensors = {
            k: e for k, e in metadata.state_dict_metadata.items() if type(e).__name__ == "TensorStorageMetadata"
        }
        self.objects = [
            k for k, e in metadata.state_dict_metadata.items() if type(e).__name__ == "BytesStorageMetadata"
        ]
        self._items: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        for index, info in metadata.storage_data.items():
            self._items[index.fqn].append((index, info))
        self._records: dict[str, list[Record]] = defaultdict(list)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.tensors[key].size)

    def dtype(self, key: str) -> str:
        return str(self.tensors[key].properties.state[0]).removeprefix("torch.")

    def array(self, key: str, name: str, role: str) -> StoredArray:
        """A tensor, under another name, with each of its items as a part of it."""
        return StoredArray(name, role, self.dtype(key), self.shape(key), "", parts=Parts(self._parts(key)))

    def _parts(self, key: str) -> list[Part]:
        found = []
        chunks = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in self.tensors[key].chunks}
        for index, info in self._items[key]:
            offset = tuple(index.offset) if index.offset is not None else (0,) * len(self.shape(key))
            if offset not in chunks:
                raise CheckpointError(f"{self._path}: {key}: no chunk of it begins at {offset}")
            ends = [start + length for start, length in zip(offset, chunks[offset], strict=True)]
            if min(offset, default=0) < 0 or any(a > b for a, b in zip(ends, self.shape(key), strict=True)):
                raise CheckpointError(f"{self._path / METADATA}: {key}: the chunk at {offset} reaches outside of it")
            file, place = self._place(info)
            tensor = torch_file.load(file, part=place)
            if tuple(tensor.shape) != chunks[offset]:
                raise CheckpointError(
                    f"{file}: {key} at {offset} has the shape {tuple(tensor.shape)}, not {chunks[offset]}"
                )
            self._records[str(file)] += torch_file.records(file, part=place)
            array = torch_file.array_of(tensor, file, key, "", within=place[0])
            found.append(Part(Box(offset, chunks[offset]), array))
        return found

    def value(self, key: str) -> Any:
        """An object that is a plain value."""
        _, info = self._items[key][0]
        file, place = self._place(info)
        return torch_file.load_plain(file, part=place)

    def _place(self, info: Any) -> tuple[Path, tuple[int, int]]:
        """The file of an item, and where in it."""
        path = inside(self._path, str(info.relative_path), self._path / METADATA)
        if not path.is_file():
            raise CheckpointError(f"{path}: is missing")
        return path, (int(info.offset), int(info.length))

    def source(self, layout: Layout) -> FileSource:
        """The bytes of a layout of these arrays."""
        return FileSource(layout, self._records)
