"""torch.distributed.checkpoint: `.metadata` says which box of which tensor lies where in `__R_N.distcp`.

Each item of a .distcp file is a file of `torch.save` in itself. `.metadata` is a pickle, and is read by an unpickler that builds
the classes of that format as stand-ins, torch.Size, dtypes and plain containers, and nothing else.

Entries are taken as `torch.distributed.checkpoint.state_dict` names them: `{any}.state.{parameter}.{role}` is the optimizer's,
and `{any}.param_groups...` its settings; the rest is the model's, without a first word that all have in common.
"""

from __future__ import annotations

import pickle
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from trainrt.checkpoint.formats import torch_file
from trainrt.checkpoint.formats.files import FileSource, Record
from trainrt.checkpoint.formats.opened import Opened
from trainrt.checkpoint.source import read_whole
from trainrt.errors import CheckpointError
from trainrt.parallel.layout import Box, Fragment, Layout, LogicalTensor

NAME = "dcp"
METADATA = ".metadata"
STATE = re.compile(r"(?:\w+\.)?state\.(?P<name>.+)\.(?P<role>\w+)")
SETTINGS = re.compile(r"(?:\w+\.)?param_groups(?:\.(?P<name>.+)\.(?P<key>\w+))?")
FORMAT = "torch.distributed.checkpoint"
STAND_INS = {
    (f"{FORMAT}.metadata", name)
    for name in (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "_MEM_FORMAT_ENCODING",
    )
} | {(f"{FORMAT}.filesystem", "_StorageInfo")} | {
    (f"{FORMAT}.planner", name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")
}  # fmt: skip
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


def recognise(path: Path) -> str | None:
    """Why this is a distributed checkpoint of torch, or None."""
    return METADATA if (path / METADATA).is_file() else None


def open_checkpoint(path: Path, *, model_config: Mapping[str, Any] | None = None) -> Opened:
    """Raises CheckpointError for what is missing, refused or damaged."""
    try:
        with (path / METADATA).open("rb") as file:
            metadata = _Unpickler(file).load()
    except CheckpointError as error:
        raise CheckpointError(f"{path / METADATA}: {error}") from error
    except Exception as error:
        raise CheckpointError(f"{path / METADATA}: no metadata of a distributed checkpoint: {error}") from error
    return _Reader(path, metadata).open(dict(model_config or {}))


class _Reader:
    """One checkpoint on its way to a layout."""

    def __init__(self, path: Path, metadata: Any) -> None:
        self._path = path
        self._tensors = {
            k: e for k, e in metadata.state_dict_metadata.items() if type(e).__name__ == "TensorStorageMetadata"
        }
        self._objects = [
            k for k, e in metadata.state_dict_metadata.items() if type(e).__name__ == "BytesStorageMetadata"
        ]
        self._items: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        for index, info in metadata.storage_data.items():
            self._items[index.fqn].append((index, info))
        self._records: dict[str, list[Record]] = defaultdict(list)

    def open(self, model_config: dict[str, Any]) -> Opened:
        layout, steps = Layout(), set()
        unknown: list[str] = []
        names = self._names()
        for key, entry in self._tensors.items():
            name, role = names[key]
            size = tuple(entry.size)
            dtype = str(entry.properties.state[0]).removeprefix("torch.")
            if role == "step":
                steps.add(name)
            layout.add(LogicalTensor(name, role, dtype, size), *self._fragments(key, size))
        source = FileSource(layout, self._records)
        counts = {name: int(_scalar(source, layout.tensors[name, "step"])) for name in steps}
        for name in steps:
            del layout.tensors[name, "step"], layout.fragments[name, "step"]
        groups = self._groups(unknown)
        optimizer = {"name": "adamw", "groups": groups, "steps": counts} if counts or groups else {}
        step = max(counts.values(), default=0)
        metadata = {"step": step, "aliases": {}, "model_config": model_config, "optimizer": optimizer}
        return Opened(NAME, f"{METADATA}: {len(self._tensors)} tensors", self._path, source, metadata, unknown)

    def _names(self) -> dict[str, tuple[str, str]]:
        """Entry to (logical name, role)."""
        found: dict[str, tuple[str, str]] = {}
        rest = []
        for key in self._tensors:
            state = STATE.fullmatch(key)
            if state is not None:
                found[key] = state["name"], state["role"]
            else:
                rest.append(key)
        trained = {name for name, _ in found.values()}
        first = {key.partition(".")[0] for key in rest}
        common = f"{next(iter(first))}." if len(first) == 1 and all("." in key for key in rest) else ""
        if common and trained and all(name in set(rest) for name in trained):
            common = ""
        return found | {key: (key.removeprefix(common), "parameter") for key in rest}

    def _fragments(self, key: str, size: tuple[int, ...]) -> list[Fragment]:
        """Each item of a tensor as a box in a file."""
        found = []
        chunks = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in self._tensors[key].chunks}
        for index, info in self._items[key]:
            offset = tuple(index.offset) if index.offset is not None else (0,) * len(size)
            if offset not in chunks:
                raise CheckpointError(f"{self._path}: {key}: no chunk of it begins at {offset}")
            file = self._file(info)
            part = (int(info.offset), int(info.length))
            tensor = torch_file.load(file, part=part)
            if tuple(tensor.shape) != chunks[offset]:
                raise CheckpointError(
                    f"{file}: {key} at {offset} has the shape {tuple(tensor.shape)}, not {chunks[offset]}"
                )
            self._records[str(file)] += torch_file.records(file, part=part)
            array = torch_file.array_of(tensor, file, key, "")
            strides = array.strides if array.strides is not None else ()
            found.append(
                Fragment(0, Box(offset, chunks[offset]), str(file), strides, array.start, part[0] + array.base)
            )
        return found

    def _file(self, info: Any) -> Path:
        name = str(info.relative_path)
        place = PurePosixPath(name)
        path = self._path / name
        if place.is_absolute() or ".." in place.parts or path.is_symlink():
            raise CheckpointError(
                f"{self._path / METADATA}: names the file {name!r}; allowed: a file of this directory"
            )
        if not path.is_file():
            raise CheckpointError(f"{path}: is missing")
        return path

    def _groups(self, unknown: list[str]) -> list[dict[str, Any]]:
        """Groups of parameters with equal settings."""
        settings: dict[str, dict[str, Any]] = defaultdict(dict)
        for key in self._objects:
            match = SETTINGS.fullmatch(key)
            if match is None or match["name"] is None:
                unknown.append(key)
                continue
            _, info = self._items[key][0]
            value = torch_file.load_plain(self._file(info), part=(int(info.offset), int(info.length)))
            settings[match["name"]][match["key"]] = value
        groups: list[dict[str, Any]] = []
        for name, held in settings.items():
            same = next((group for group in groups if group["hyperparameters"] == held), None)
            if same is None:
                groups.append({"tensors": [name], "hyperparameters": held})
            else:
                same["tensors"].append(name)
        return groups


def _scalar(source: FileSource, tensor: LogicalTensor) -> float:
    return float(torch.from_numpy(read_whole(source, tensor)).view(getattr(torch, tensor.dtype))[0])
