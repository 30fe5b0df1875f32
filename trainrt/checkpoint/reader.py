"""Reading a universal checkpoint: nothing is used before its checksum was checked."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from trainrt.checkpoint import planes
from trainrt.checkpoint.form import check_form
from trainrt.checkpoint.manifest import PADDING, SAFETENSORS_DTYPE, SCHEMA, Chunk, check_name, file_digest, json_object
from trainrt.errors import CheckpointError
from trainrt.parallel.layout import Box, Fragment, Key, Layout, LogicalTensor, contiguous_strides, flat_range


@dataclass(frozen=True, slots=True)
class Piece:
    """A chunk and what it holds: the elements of the tensor's C order from `start` on."""

    tensor: LogicalTensor
    file: str
    chunk: Chunk
    start: int

    @property
    def stop(self) -> int:
        return self.start + self.chunk.length // self.tensor.item_bytes


class Universal:
    """A checkpoint: a Source whose layout is "everything in one piece".

    `open` checks COMMIT, the manifest and every header and small file; each chunk is checked when it
    is read, and its bytes are used from that same read. `pieces` are its chunks in the order of the
    files, `bytes_read` what was read of them.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path, self.manifest = path, manifest
        self.layout = Layout()
        self.bytes_read = 0
        self._cached: tuple[Piece, np.ndarray] | None = None
        self._pieces: dict[Key, list[Piece]] = {}
        for entry in manifest["tensors"]:
            tensor = LogicalTensor(entry["name"], entry["role"], entry["dtype"], tuple(entry["shape"]))
            if entry["alias_of"] is None:
                self._pieces[tensor.key] = list(pieces_of(entry))
                self.layout.add(tensor, Fragment(0, Box.whole(tensor.shape), "file", contiguous_strides(tensor.shape)))
        held = (piece for pieces in self._pieces.values() for piece in pieces)
        self.pieces = sorted(held, key=lambda piece: (piece.file, piece.chunk.offset))

    @classmethod
    def open(cls, path: Path) -> Universal:
        """Open and check all but the chunks. Raises CheckpointError with what is wrong."""
        manifest = read_manifest(path)
        for problem in structure_problems(path, manifest):
            raise CheckpointError(f"{path}: {problem['file']}: {problem['message']}")
        return cls(path, manifest)

    def model_config(self) -> dict[str, Any]:
        """config.json of the model, whose checksum was compared when this was opened."""
        path = self.path / "model" / "config.json"
        return json_object(path.read_bytes(), str(path))

    def in_chunks(self) -> Layout:
        """The same state cut into its chunks: the storage of a fragment is the number of its piece."""
        layout = Layout()
        for tensor in self.layout.tensors.values():
            layout.add(tensor)
        for number, piece in enumerate(self.pieces):
            for box, at in flat_range(piece.tensor.shape, piece.start, piece.stop):
                layout.add(piece.tensor, Fragment(0, box, str(number), contiguous_strides(box.length), at))
        return layout

    def read(self, tensor: LogicalTensor, fragment: Fragment) -> np.ndarray:
        """A box of a tensor. Only the chunks it touches are read, each verified before use."""
        if not fragment.box.elements:
            return np.empty(fragment.box.length, f"u{tensor.item_bytes}")
        extent = sum((n - 1) * s for n, s in zip(fragment.box.length, fragment.strides, strict=True))
        last = fragment.start + extent
        touched = [piece for piece in self._pieces[tensor.key] if piece.start <= last and piece.stop > fragment.start]
        data = [self._chunk(piece) for piece in touched]
        shifted = Fragment(0, fragment.box, "", fragment.strides, fragment.start - touched[0].start)
        return shifted.view(np.concatenate(data) if len(data) > 1 else data[0], tensor.item_bytes)

    def _chunk(self, piece: Piece) -> np.ndarray:
        if self._cached is None or self._cached[0] != piece:
            self._cached = (piece, self.read_pieces([piece])[0])
        return self._cached[1]

    def read_pieces(self, pieces: Sequence[Piece]) -> list[np.ndarray]:
        """The bytes of pieces that are neighbours in their file: one read, each verified. Raises CheckpointError."""
        first, last = pieces[0].chunk, pieces[-1].chunk
        data = read_range(self.path / pieces[0].file, first.offset, last.offset + last.stored - first.offset)
        self.bytes_read += data.nbytes
        chunks = []
        for piece in pieces:
            at = piece.chunk.offset - first.offset
            stored = data[at : at + piece.chunk.stored]
            if xxhash.xxh3_64_hexdigest(stored) != piece.chunk.xxh3:
                raise CheckpointError(
                    f"{self.path}: {piece.file}: {piece.tensor.name} ({piece.tensor.role}) is damaged: "
                    f"the chunk at {piece.chunk.offset} does not match its checksum"
                )
            chunks.append(self._decoded(piece, stored))
        return chunks

    def _decoded(self, piece: Piece, stored: np.ndarray) -> np.ndarray:
        if piece.chunk.codec == "none":
            return stored
        try:
            if piece.chunk.codec != planes.CODEC:
                raise CheckpointError(f"codec {piece.chunk.codec!r}; allowed: 'none', {planes.CODEC!r}")
            return planes.decode(stored, piece.chunk.length, piece.tensor.item_bytes)
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {piece.file}: {piece.tensor.name}: {error}") from error


def pieces_of(entry: dict[str, Any]) -> Iterator[Piece]:
    """The chunks of a tensor's entry in the manifest, in the tensor's order."""
    tensor = LogicalTensor(entry["name"], entry["role"], entry["dtype"], tuple(entry["shape"]))
    start = 0
    for facts in entry["chunks"]:
        piece = Piece(tensor, entry["file"], Chunk(**facts), start)
        yield piece
        start = piece.stop


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest, checked against COMMIT and the schema. Raises CheckpointError."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory")
    for name in ("COMMIT", "manifest.json"):
        if (path / name).is_symlink():
            raise CheckpointError(f"{path}: {name}: is a symbolic link")
    try:
        commit = (path / "COMMIT").read_bytes()
        text = (path / "manifest.json").read_bytes()
    except FileNotFoundError as error:
        name = Path(error.filename).name
        reason = "it was never finished" if name == "COMMIT" and (path / "manifest.json").exists() else "none of ours"
        raise CheckpointError(f"{path}: no {name}: not a trainrt universal checkpoint ({reason})") from error
    if commit != hashlib.sha256(text).hexdigest().encode() + b"\n":
        raise CheckpointError(f"{path}: manifest.json does not match COMMIT: one of them is damaged")
    manifest = json_object(text, f"{path}/manifest.json")
    if manifest.get("schema") != SCHEMA:
        raise CheckpointError(f"{path}: schema {manifest.get('schema')!r} is not known; allowed: {SCHEMA!r}")
    check_form(manifest, f"{path}: manifest.json")
    for file in manifest["files"]:
        check_name(file)
    return manifest


def structure_problems(path: Path, manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What is wrong with the files, short of the chunks' bytes: missing, extra, size, header, small file."""
    files: dict[str, Any] = manifest["files"]
    present = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file() or p.is_symlink()}
    for extra in sorted(present - set(files) - {"COMMIT", "manifest.json"}):
        yield _problem(extra, None, "extra", "is not in the manifest")
    chunks: dict[str, list[Chunk]] = {}
    for entry in manifest["tensors"]:
        if entry["alias_of"] is None:
            chunks.setdefault(entry["file"], []).extend(Chunk(**chunk) for chunk in entry["chunks"])
    for file, facts in files.items():
        place = path / file
        if place.is_symlink():
            yield _problem(file, None, "symlink", "is a symbolic link")
        elif not place.is_file():
            yield _problem(file, None, "missing", "is missing")
        elif place.stat().st_size != facts["bytes"]:
            yield _problem(
                file, None, "truncated", f"has {place.stat().st_size} bytes, the manifest says {facts['bytes']}"
            )
        elif facts["header_bytes"] is None:
            if xxhash.xxh3_64_hexdigest(place.read_bytes()) != facts["xxh3"]:
                yield _problem(file, None, "checksum", "does not match its checksum")
        else:
            yield from _header_problems(place, file, facts, chunks.get(file, []), manifest)


def _header_problems(
    place: Path, file: str, facts: dict[str, Any], chunks: list[Chunk], manifest: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    header = read_range(place, 0, facts["header_bytes"]).tobytes()
    if file_digest(header, chunks) != facts["xxh3"]:
        yield _problem(file, None, "checksum", "its header does not match its checksum")
        return
    # Compressed chunks stand by themselves, without a header.
    if header and (int.from_bytes(header[:8], "little") + 8 != len(header) or len(header) % PADDING):
        yield _problem(file, None, "header", "its header length is not what the manifest says")
        return
    at = facts["header_bytes"]
    for chunk in sorted(chunks, key=lambda chunk: chunk.offset):
        if chunk.offset != at:
            yield _problem(file, None, "coverage", f"bytes {at} to {chunk.offset} are covered by no chunk, or by two")
            return
        at += chunk.stored
    if at != facts["bytes"]:
        yield _problem(file, None, "coverage", f"bytes {at} to {facts['bytes']} are covered by no chunk")
    if header:
        try:
            entries = json_object(header[8:], file)
        except CheckpointError as error:
            yield _problem(file, None, "header", str(error))
            return
        entries.pop("__metadata__", None)
        for entry in manifest["tensors"]:
            if entry["file"] == file and not _lies_so(entries.pop(entry["name"], None), entry, len(header)):
                yield _problem(file, entry["name"], "header", "the file's header and the manifest disagree")
        for name in entries:
            yield _problem(file, name, "header", "is in the file's header, and not in the manifest")


def _lies_so(named: Any, entry: dict[str, Any], begin: int) -> bool:
    """Whether a header says of a tensor what the manifest says, and its chunks are that range of the file."""
    if not isinstance(named, dict) or (named.get("dtype"), named.get("shape")) != (
        SAFETENSORS_DTYPE[entry["dtype"]], entry["shape"],
    ):  # fmt: skip
        return False
    first, at = entry["chunks"][0]["offset"] - begin if entry["chunks"] else None, begin
    offsets = named.get("data_offsets")
    if first is None:
        return isinstance(offsets, list) and len(offsets) == 2 and offsets[0] == offsets[1]
    at += first
    for chunk in entry["chunks"]:
        if chunk["offset"] != at:
            return False
        at += chunk["length"]
    return bool(offsets == [first, at - begin])


def chunk_problems(path: Path, manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Read every chunk and compare its checksum."""
    for entry in manifest["tensors"]:
        for chunk in entry["chunks"]:
            try:
                data = read_range(path / entry["file"], chunk["offset"], chunk["stored"])
            except (OSError, CheckpointError) as error:
                yield _problem(entry["file"], entry["name"], "truncated", str(error))
                continue
            if xxhash.xxh3_64_hexdigest(data) != chunk["xxh3"]:
                message = f"the chunk at {chunk['offset']} does not match its checksum"
                yield _problem(entry["file"], entry["name"], "checksum", message)


def read_range(path: Path, offset: int, length: int) -> np.ndarray:
    """Bytes of a file, no more than once. Raises CheckpointError where the file is shorter."""
    data = np.empty(length, np.uint8)
    view, at = memoryview(data), offset  # type: ignore[arg-type]
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        while view:
            read = os.preadv(fd, [view], at)
            if read == 0:
                raise CheckpointError(f"{path}: ends at {at}, {length} bytes from {offset} were expected")
            view, at = view[read:], at + read
    finally:
        os.close(fd)
    return data


def _problem(file: str, tensor: str | None, kind: str, message: str) -> dict[str, Any]:
    return {"file": file, "tensor": tensor, "kind": kind, "message": message}
