"""The manifest of a universal checkpoint: what is in it, where, and how to tell that it is whole.

    step-00000100/COMMIT          SHA-256 of manifest.json, in hex; written last
    step-00000100/manifest.json   this document
    step-00000100/model/          a Hugging Face model directory
    step-00000100/optimizer/      one series of safetensors files per role

Every byte of every file is covered once: a file made of tensors by the xxh3 of its header region and
of each chunk (its own xxh3 is that of those digests, in order); any other file by the xxh3 of its bytes.
"""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any

import xxhash

from trainrt.errors import CheckpointError
from trainrt.parallel.layout import LogicalTensor

SCHEMA = "trainrt-universal/1"
PADDING = 8


@dataclass(frozen=True, slots=True)
class Chunk:
    """A contiguous range of a file with a checksum of its own. `stored` bytes at `offset` stand for `length`."""

    offset: int
    length: int
    stored: int
    codec: str
    xxh3: str


def safetensors_header(tensors: list[LogicalTensor]) -> tuple[bytes, dict[str, int]]:
    """The header region of a file that holds these tensors back to back, and each one's offset in the file.

    https://github.com/huggingface/safetensors#format
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": SAFETENSORS_DTYPE[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.bytes],
        }
        at += tensor.bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % PADDING)
    header = struct.pack("<Q", len(text)) + text
    begin = {tensor.name: len(header) + entries[tensor.name]["data_offsets"][0] for tensor in tensors}
    return header, begin


SAFETENSORS_DTYPE = {
    "float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


def file_digest(header: bytes, chunks: list[Chunk]) -> str:
    """The digest of a file of tensors: over the digests of its header region and its chunks, by offset."""
    parts = [xxhash.xxh3_64_hexdigest(header), *(c.xxh3 for c in sorted(chunks, key=lambda c: c.offset))]
    return xxhash.xxh3_64_hexdigest("".join(parts).encode())


def tensor_entry(tensor: LogicalTensor, file: str, chunks: list[Chunk]) -> dict[str, Any]:
    return {
        "name": tensor.name, "role": tensor.role, "dtype": tensor.dtype, "shape": list(tensor.shape), "alias_of": None,
        "file": file, "chunks": [asdict(chunk) for chunk in sorted(chunks, key=lambda chunk: chunk.offset)],
    }  # fmt: skip


def alias_entry(name: str, owner: LogicalTensor) -> dict[str, Any]:
    return {
        "name": name, "role": owner.role, "dtype": owner.dtype, "shape": list(owner.shape), "alias_of": owner.name,
        "file": None, "chunks": [],
    }  # fmt: skip


def strict_json(data: bytes, what: str) -> Any:
    """Parse JSON and refuse an object that names a key twice. Raises CheckpointError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{what}: the key {twice!r} stands twice in one object")
        return made

    try:
        return json.loads(data, object_pairs_hook=unique)
    except RecursionError as error:
        raise CheckpointError(f"{what}: no JSON: nested too deeply") from error
    except ValueError as error:
        raise CheckpointError(f"{what}: no JSON: {error}") from error


def json_object(data: bytes, what: str) -> dict[str, Any]:
    """An object of strict JSON. Raises CheckpointError for any other value."""
    held = strict_json(data, what)
    if not isinstance(held, dict):
        raise CheckpointError(f"{what}: is no JSON object")
    return held


def check_name(name: str, says: str = "manifest.json") -> None:
    """A file name in a checkpoint must stay inside of it. Raises CheckpointError with who `says` it."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in name or "\0" in name:
        raise CheckpointError(f"{says} names the file {name!r}; allowed: a relative path inside the checkpoint")
