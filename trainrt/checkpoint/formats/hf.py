"""Hugging Face model directories: safetensors files, one or several with an index, and config.json."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainrt.checkpoint.formats.files import FileSource
from trainrt.checkpoint.formats.opened import Opened
from trainrt.checkpoint.manifest import SAFETENSORS_DTYPE, strict_json
from trainrt.checkpoint.mapping.rules import Rule, StoredArray, compile_reading
from trainrt.errors import CheckpointError
from trainrt.parallel.layout import ITEM_BYTES

NAME = "hf"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MOST_HEADER_BYTES = 100 << 20
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
    config_file = path / "config.json"
    config = (
        strict_json(config_file.read_bytes(), str(config_file)) if config_file.is_file() else dict(model_config or {})
    )
    return Opened(NAME, why, path, FileSource(layout), {"step": 0, "aliases": {}, "model_config": config})


def _arrays(path: Path) -> Iterator[StoredArray]:
    if not (path / INDEX).is_file():
        yield from safetensors_arrays(path / SINGLE)
        return
    where = strict_json((path / INDEX).read_bytes(), f"{path / INDEX}")["weight_map"]
    for file in sorted(set(where.values())):
        if Path(file).name != file or (path / file).is_symlink():
            raise CheckpointError(f"{path / INDEX}: names the file {file!r}; allowed: a file of this directory")
        held = {array.name: array for array in safetensors_arrays(path / file)}
        wanted = {name for name, home in where.items() if home == file}
        if wanted != set(held):
            odd = sorted(wanted ^ set(held))[0]
            raise CheckpointError(f"{path / file}: {odd} is in the index or in the file, and not in both")
        yield from held.values()


def safetensors_arrays(path: Path, *, at: Mapping[str, int] | None = None) -> list[StoredArray]:
    """The tensors of a safetensors file. Raises CheckpointError for a header that overlaps, overreaches or contradicts itself."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MOST_HEADER_BYTES, size - 8):
                raise CheckpointError(f"{path}: its header would have {length} bytes, the file has {size}")
            header = strict_json(file.read(length), str(path))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    arrays, end = [], 0
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    for name, entry in sorted(entries.items(), key=lambda held: tuple(held[1]["data_offsets"])):
        first, last = entry["data_offsets"]
        dtype, shape = DTYPES.get(entry["dtype"]), tuple(entry["shape"])
        if dtype is None:
            raise CheckpointError(f"{path}: {name}: dtype {entry['dtype']!r}; allowed: {', '.join(sorted(DTYPES))}")
        elements = 1
        for n in shape:
            elements *= n
        if first != end or last - first != elements * ITEM_BYTES[dtype] or 8 + length + last > size:
            raise CheckpointError(
                f"{path}: {name}: bytes {first} to {last} overlap, leave a gap, or are not {shape} of {dtype}"
            )
        arrays.append(StoredArray(name, "parameter", dtype, shape, str(path), 8 + length + first, at=at or {}))
        end = last
    if 8 + length + end != size:
        raise CheckpointError(f"{path}: has {size} bytes, its header accounts for {8 + length + end}")
    return arrays
