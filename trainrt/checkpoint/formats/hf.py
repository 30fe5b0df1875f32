"""Hugging Face model directories: safetensors files, one or several with an index, and config.json."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from trainrt.checkpoint.formats.files import FileSource
from trainrt.checkpoint.formats.opened import Opened
from trainrt.checkpoint.formats.place import inside, no_link
from trainrt.checkpoint.manifest import SAFETENSORS_DTYPE, json_object
from trainrt.checkpoint.mapping.rules import Rule, StoredArray, compile_reading
from trainrt.errors import CheckpointError
from trainrt.parallel.layout import ITEM_BYTES

NAME = "hf"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MOST_HEADER_BYTES = 100 << 20
KEYS = ("dtype", "shape", "data_offsets")
DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPE.items()}


def recognise(path: Path) -> str | None:
    """Why this is a Hugging Face model directory, or None."""
    return next((name for name in (INDEX, SINGLE) if (path / name).is_file()), None)


def open_checkpoint(path: Path, *, model_config: Mapping[str, Any] | None = None) -> Opened:
    """Raises CheckpointError for a file that is missing, damaged, or not what the index says."""
    why = recognise(path)
    if why is None:
        raise CheckpointError(f"{path}: neither {INDEX} nor {SINGLE} is here")
    arrays = list(_arrays(path))
    layout, _, _ = compile_reading([Rule(array.name, json.dumps(array.name)) for array in arrays], arrays, variables={})
    config = read_config(path / "config.json") or dict(model_config or {})
    return Opened(NAME, why, path, FileSource(layout), {"step": 0, "aliases": {}, "model_config": config})


def read_config(file: Path) -> dict[str, Any]:
    """A model's config.json; empty where there is none. Raises CheckpointError for one that cannot be read."""
    try:
        return json_object(no_link(file).read_bytes(), str(file)) if file.exists() else {}
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from error


def _arrays(path: Path) -> Iterator[StoredArray]:
    if not (path / INDEX).is_file():
        yield from safetensors_arrays(path / SINGLE)
        return
    where = json_object(no_link(path / INDEX).read_bytes(), f"{path / INDEX}").get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise CheckpointError(f"{path / INDEX}: weight_map is no table of names and files")
    for file in sorted(set(where.values())):
        held = {array.name: array for array in safetensors_arrays(inside(path, file, path / INDEX))}
        wanted = {name for name, home in where.items() if home == file}
        if wanted != set(held):
            odd = sorted(wanted ^ set(held))[0]
            raise CheckpointError(f"{path / file}: {odd} is in the index or in the file, and not in both")
        yield from held.values()


def safetensors_arrays(path: Path, *, at: Mapping[str, int] | None = None) -> list[StoredArray]:
    """The tensors of a safetensors file. Raises CheckpointError for a header that overlaps, overreaches or contradicts itself."""
    try:
        size = no_link(path).stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MOST_HEADER_BYTES, size - 8):
                raise CheckpointError(f"{path}: its header would have {length} bytes, the file has {size}")
            header = json_object(file.read(length), str(path))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    begin = 8 + length
    entries = [_entry(path, name, entry) for name, entry in header.items() if name != "__metadata__"]
    arrays, end = [], 0
    for first, last, name, dtype, shape in sorted(entries):
        if first != end or last - first != math.prod(shape) * ITEM_BYTES[dtype] or begin + last > size:
            raise CheckpointError(
                f"{path}: {name}: bytes {first} to {last} overlap, leave a gap, or are not {shape} of {dtype}"
            )
        arrays.append(StoredArray(name, "parameter", dtype, shape, str(path), begin + first, at=at or {}))
        end = last
    if begin + end != size:
        raise CheckpointError(f"{path}: has {size} bytes, its header accounts for {begin + end}")
    return arrays


def _entry(path: Path, name: str, entry: Any) -> tuple[int, int, str, str, tuple[int, ...]]:
    """Where a tensor is, its name, dtype and shape, of what a header says of it."""
    dtype, shape, where = (entry.get(key) if isinstance(entry, dict) else None for key in KEYS)
    if not _sizes(shape) or not _sizes(where) or len(where) != 2:
        raise CheckpointError(f"{path}: {name}: {json.dumps(entry)[:100]} is not {', '.join(KEYS)} of a tensor")
    if dtype not in DTYPES:
        raise CheckpointError(f"{path}: {name}: dtype {dtype!r}; allowed: {', '.join(sorted(DTYPES))}")
    return where[0], where[1], name, DTYPES[dtype], tuple(shape)


def _sizes(held: Any) -> TypeGuard[list[int]]:
    return isinstance(held, list) and all(type(n) is int and n >= 0 for n in held)
