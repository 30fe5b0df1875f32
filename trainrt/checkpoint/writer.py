"""Writing a universal checkpoint: planned once, written by many, made visible by one.

The plan cuts every tensor into chunks, each a contiguous range of one file with one writer, who
gathers its slices (from its own memory or from others), hashes and writes it in one piece. Nothing
stands under the final name before COMMIT does.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

import trainrt
from trainrt.checkpoint import planes
from trainrt.checkpoint.manifest import SCHEMA, Chunk, alias_entry, file_digest, safetensors_header, tensor_entry
from trainrt.checkpoint.source import Source, gathered
from trainrt.errors import CheckpointError
from trainrt.parallel.layout import Fragment, Key, Layout, LogicalTensor, contiguous_strides, flat_range

CHUNK_BYTES = 16 << 20
FILE_BYTES = 4 << 30
PACKED = ".zst"
MODEL_ROLES = ("parameter", "buffer")
STEP_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """The elements [start, stop) of a tensor's C order, `length` bytes at `offset` of `file`, written by `writer`."""

    name: str
    role: str
    file: str
    offset: int
    length: int
    start: int
    stop: int
    writer: str


@dataclass(frozen=True, slots=True)
class WritePlan:
    """Everything the writers must agree on. `headers`: file to its header region; `sizes`: file to its bytes."""

    metadata: dict[str, Any]
    tensors: dict[Key, LogicalTensor]
    headers: dict[str, bytes]
    sizes: dict[str, int]
    chunks: tuple[ChunkPlan, ...]

    @classmethod
    def build(
        cls, layout: Layout, metadata: dict[str, Any], *, writers: Sequence[str], writer_of_rank: Mapping[int, str],
        max_file_bytes: int = FILE_BYTES, compress: bool = False,
    ) -> WritePlan:  # fmt: skip
        """Plan files, headers and chunks. A chunk goes to the writer that holds most of it, then to the least loaded.

        `compress`: all but the model, whose files are Hugging Face's. Nobody knows then how long a chunk will be, so each writer
        has files of its own, in which its chunks follow one another; sizes and offsets are the most that they may come to.
        """
        headers: dict[str, bytes] = {}
        sizes: dict[str, int] = {}
        chunks: list[ChunkPlan] = []
        load: dict[str, int] = dict.fromkeys(writers, 0)
        for series, tensors in _series(layout, metadata.get("aliases", {})).items():
            if compress and not series.startswith("model/"):
                for chunk in _packed(series, tensors, layout, writer_of_rank, load):
                    headers[chunk.file] = b""
                    tensor = layout.tensors[chunk.name, chunk.role]
                    sizes[chunk.file] = chunk.offset + planes.most_bytes(chunk.length, tensor.item_bytes)
                    chunks.append(chunk)
                continue
            groups = _files(tensors, max_file_bytes)
            for number, group in enumerate(groups, 1):
                file = f"{series}-{number:05d}-of-{len(groups):05d}.safetensors"
                headers[file], begin = safetensors_header(group)
                sizes[file] = len(headers[file]) + sum(tensor.bytes for tensor in group)
                for tensor in group:
                    chunks += _chunks(tensor, file, begin[tensor.name], layout, writer_of_rank, load)
        return cls(metadata, dict(layout.tensors), headers, sizes, tuple(chunks))

    @property
    def step(self) -> int:
        return int(self.metadata["step"])

    def to_json(self) -> dict[str, Any]:
        return {
            "metadata": self.metadata,
            "tensors": [asdict(tensor) for tensor in self.tensors.values()],
            "headers": {file: header.decode("latin-1") for file, header in self.headers.items()},
            "sizes": self.sizes,
            "chunks": [asdict(chunk) for chunk in self.chunks],
        }

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> WritePlan:
        tensors = [LogicalTensor(**{**entry, "shape": tuple(entry["shape"])}) for entry in document["tensors"]]
        return cls(
            document["metadata"],
            {tensor.key: tensor for tensor in tensors},
            {file: header.encode("latin-1") for file, header in document["headers"].items()},
            document["sizes"],
            tuple(ChunkPlan(**entry) for entry in document["chunks"]),
        )


def _series(layout: Layout, aliases: Mapping[str, str]) -> dict[str, list[LogicalTensor]]:
    """File series to the tensors in it; a tied tensor is stored under its owner's name only."""
    series: dict[str, list[LogicalTensor]] = defaultdict(list)
    for tensor in layout.tensors.values():
        if tensor.name not in aliases:
            series["model/model" if tensor.role in MODEL_ROLES else f"optimizer/{tensor.role}"].append(tensor)
    return series


def _files(tensors: list[LogicalTensor], most: int) -> list[list[LogicalTensor]]:
    """Wide dtypes first, so that every tensor starts aligned; then cut by size."""
    groups: list[list[LogicalTensor]] = [[]]
    held = 0
    for tensor in sorted(tensors, key=lambda tensor: (-tensor.item_bytes, tensor.name)):
        if groups[-1] and held + tensor.bytes > most:
            groups.append([])
            held = 0
        groups[-1].append(tensor)
        held += tensor.bytes
    return groups


def _packed(
    series: str, tensors: list[LogicalTensor], layout: Layout, writer_of_rank: Mapping[int, str], load: dict[str, int]
) -> list[ChunkPlan]:
    """The chunks of a compressed series, in a file a writer; all of a tensor's in the same."""
    ordered = sorted(tensors, key=lambda tensor: tensor.name)
    homes = {t.name: _keenest(t, 0, t.bytes // t.item_bytes, layout, writer_of_rank, load) for t in ordered}
    writers = sorted(set(homes.values()))
    ends = dict.fromkeys(writers, 0)
    placed = []
    for tensor in ordered:
        writer = homes[tensor.name]
        file = f"{series}-{writers.index(writer) + 1:05d}-of-{len(writers):05d}{PACKED}"
        for start, stop in _ranges(tensor):
            length = (stop - start) * tensor.item_bytes
            placed.append(ChunkPlan(tensor.name, tensor.role, file, ends[writer], length, start, stop, writer))
            ends[writer] += planes.most_bytes(length, tensor.item_bytes)
    return placed


def _chunks(
    tensor: LogicalTensor,
    file: str,
    begin: int,
    layout: Layout,
    writer_of_rank: Mapping[int, str],
    load: dict[str, int],
) -> list[ChunkPlan]:
    made = []
    for start, stop in _ranges(tensor):
        writer = _keenest(tensor, start, stop, layout, writer_of_rank, load)
        offset, length = begin + start * tensor.item_bytes, (stop - start) * tensor.item_bytes
        made.append(ChunkPlan(tensor.name, tensor.role, file, offset, length, start, stop, writer))
    return made


def _ranges(tensor: LogicalTensor) -> Iterator[tuple[int, int]]:
    """The elements of each chunk."""
    elements, step = tensor.bytes // tensor.item_bytes, max(1, CHUNK_BYTES // tensor.item_bytes)
    return ((start, min(elements, start + step)) for start in range(0, elements, step))


def _keenest(
    tensor: LogicalTensor,
    start: int,
    stop: int,
    layout: Layout,
    writer_of_rank: Mapping[int, str],
    load: dict[str, int],
) -> str:
    """Who holds most of the elements [start, stop), then who has least to write; it is added to that."""
    held: dict[str, int] = defaultdict(int)
    for box, _ in flat_range(tensor.shape, start, stop):
        for fragment in layout.fragments[tensor.key]:
            common = box.intersect(fragment.box)
            writer = writer_of_rank.get(fragment.rank)
            if common is not None and writer in load:
                held[writer] += common.elements
    most = max(held.values(), default=0)
    writer = min((name for name in load if held[name] == most), key=lambda name: load[name])
    load[writer] += (stop - start) * tensor.item_bytes
    return writer


def final_name(step: int) -> str:
    """What a checkpoint is called when it is whole."""
    return f"step-{step:08d}"


def partial(directory: Path, step: int) -> Path:
    """Where a checkpoint of a directory is written before it has its name."""
    return directory / f".{final_name(step)}.partial"


def prepare(plan: WritePlan, directory: Path) -> None:
    """Make the partial folder with every file at its full size, headers and config written.

    Raises CheckpointError where there is no room: before a byte of state is written.
    """
    folder = partial(directory, plan.step)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        (folder / "model").mkdir(parents=True)
        (folder / "optimizer").mkdir()
        for file, size in plan.sizes.items():
            with (folder / file).open("wb") as out:
                os.posix_fallocate(out.fileno(), 0, size)
                out.write(plan.headers[file])
        for file, content in _small_files(plan).items():
            (folder / file).write_bytes(content)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise not_written(directory, sum(plan.sizes.values()), error) from error


def not_written(directory: Path, needed: int, error: OSError) -> CheckpointError:
    """Why files could not be made at their full size."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    what = f"no room for a checkpoint of {needed} bytes" if full else "cannot be written to"
    return CheckpointError(f"{directory}: {what}: {error.strerror}")


def _small_files(plan: WritePlan) -> dict[str, bytes]:
    """config.json and the index of the model's files: what makes model/ a Hugging Face directory."""
    where = {chunk.name: chunk.file for chunk in plan.chunks if chunk.role in MODEL_ROLES}
    index = {
        "metadata": {
            "total_size": sum(plan.tensors[c.name, c.role].bytes for c in _firsts(plan) if c.role in MODEL_ROLES)
        },
        "weight_map": {name: file.removeprefix("model/") for name, file in sorted(where.items())},
    }
    files = {"model/model.safetensors.index.json": index, "model/config.json": plan.metadata.get("model_config", {})}
    return {file: json.dumps(document, indent=2).encode() + b"\n" for file, document in files.items()}


def _firsts(plan: WritePlan) -> list[ChunkPlan]:
    return [chunk for chunk in plan.chunks if chunk.start == 0]


def write_part(plan: WritePlan, directory: Path, writer: str, source: Source) -> list[dict[str, Any]]:
    """Write this writer's chunks: gather, compress, hash, write, sync. Returns what `finish` wants to know of each."""
    folder = partial(directory, plan.step)
    results: list[dict[str, Any]] = []
    files: dict[str, int] = {}
    ends: dict[str, int] = {}
    try:
        for chunk in plan.chunks:
            if chunk.writer != writer:
                continue
            if chunk.file not in files:
                files[chunk.file] = os.open(folder / chunk.file, os.O_WRONLY | os.O_CLOEXEC)
            tensor = plan.tensors[chunk.name, chunk.role]
            data, at = gather(tensor, chunk.start, chunk.stop, source, writer), chunk.offset
            if chunk.file.endswith(PACKED):
                data, at = planes.encode(data, tensor.item_bytes), ends.get(chunk.file, 0)
                ends[chunk.file] = at + data.nbytes
            write_range(files[chunk.file], at, data)
            digest = xxhash.xxh3_64_hexdigest(data)
            results.append(
                {"file": chunk.file, "offset": chunk.offset, "xxh3": digest, "at": at, "stored": data.nbytes}
            )
        for file, end in ends.items():
            os.ftruncate(files[file], end)
        for fd in files.values():
            os.fsync(fd)
    except OSError as error:
        raise CheckpointError(f"{folder}: {error.strerror}") from error
    finally:
        for fd in files.values():
            os.close(fd)
    return results


def write_range(fd: int, offset: int, data: np.ndarray) -> None:
    """Bytes at a place of a file, all of them."""
    view = memoryview(data)  # type: ignore[arg-type]
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def gather(tensor: LogicalTensor, start: int, stop: int, source: Source, writer: str) -> np.ndarray:
    """The elements [start, stop) of a tensor's C order, from wherever the source holds them: flat uint8."""
    return gathered(chunk_layout(tensor, start, stop, writer), (stop - start) * tensor.item_bytes, source)


def chunk_layout(tensor: LogicalTensor, start: int, stop: int, storage: str) -> Layout:
    """The elements [start, stop) of a tensor's C order, as they stand in a storage of rank -1."""
    layout = Layout()
    for box, at in flat_range(tensor.shape, start, stop):
        layout.add(tensor, Fragment(-1, box, storage, contiguous_strides(box.length), start=at))
    return layout


def finish(plan: WritePlan, directory: Path, results: Sequence[Mapping[str, Any]]) -> Path:
    """Manifest, COMMIT, then the final name; each made durable before the next. Raises if a chunk is missing."""
    folder = partial(directory, plan.step)
    done = {(result["file"], result["offset"]): result for result in results}
    entries: dict[Key, list[Chunk]] = defaultdict(list)
    by_file: dict[str, list[Chunk]] = defaultdict(list)
    where: dict[Key, str] = {}
    for chunk in plan.chunks:
        if (chunk.file, chunk.offset) not in done:
            raise CheckpointError(
                f"{folder}: nobody wrote {chunk.name} ({chunk.role}) at {chunk.offset} of {chunk.file}"
            )
        written = _written(chunk, done[chunk.file, chunk.offset])
        entries[chunk.name, chunk.role].append(written)
        by_file[chunk.file].append(written)
        where[chunk.name, chunk.role] = chunk.file
    manifest = _manifest(plan, entries, by_file, where)
    text = json.dumps(manifest, indent=1).encode() + b"\n"
    _write_durable(folder / "manifest.json", text)
    for sub in ("model", "optimizer"):
        for path in (folder / sub).iterdir():
            sync(path)
        sync(folder / sub)
    _write_durable(folder / "COMMIT", hashlib.sha256(text).hexdigest().encode() + b"\n")
    sync(folder)
    final = directory / final_name(plan.step)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(folder, final)
    sync(directory)
    return final


def _written(chunk: ChunkPlan, result: Mapping[str, Any]) -> Chunk:
    if not chunk.file.endswith(PACKED):
        return Chunk(chunk.offset, chunk.length, chunk.length, "none", result["xxh3"])
    return Chunk(result["at"], chunk.length, result["stored"], planes.CODEC, result["xxh3"])


def _manifest(
    plan: WritePlan, entries: Mapping[Key, list[Chunk]], by_file: Mapping[str, list[Chunk]], where: Mapping[Key, str]
) -> dict[str, Any]:
    files = {
        file: {
            "bytes": sum(chunk.stored for chunk in by_file[file]) if file.endswith(PACKED) else size,
            "xxh3": file_digest(plan.headers[file], by_file[file]),
            "header_bytes": len(plan.headers[file]),
        }
        for file, size in plan.sizes.items()
    }
    for file, content in _small_files(plan).items():
        files[file] = {"bytes": len(content), "xxh3": xxhash.xxh3_64_hexdigest(content), "header_bytes": None}
    tensors = []
    aliases: Mapping[str, str] = plan.metadata.get("aliases", {})
    for key, tensor in plan.tensors.items():
        if tensor.name in aliases:
            continue
        # A tensor without elements has no chunk; it stands in the header of the first file of its series.
        tensors.append(tensor_entry(tensor, where.get(key) or _home(plan, tensor), entries.get(key, [])))
    owners = {tensor.name: tensor for tensor in plan.tensors.values() if tensor.role == "parameter"}
    tensors += [alias_entry(name, owners[owner]) for name, owner in aliases.items()]
    kept = ("step", "optimizer", "scheduler", "data", "rng", "config", "plan_sha256")
    return {
        "schema": SCHEMA,
        "writer": f"trainrt {trainrt.__version__}",
        "run_id": plan.metadata.get("run_id", ""),
        **{key: plan.metadata.get(key, {}) for key in kept},
        "mixtures": plan.metadata.get("mixtures", []),
        "files": files,
        "tensors": tensors,
    }


def _home(plan: WritePlan, tensor: LogicalTensor) -> str:
    """The file whose header names a tensor."""
    prefix = "model/" if tensor.role in MODEL_ROLES else f"optimizer/{tensor.role}-"
    mark = json.dumps(tensor.name).encode() + b":"
    return next(
        file
        for file, header in plan.headers.items()
        if file.startswith(prefix) and (mark in header or file.endswith(PACKED))
    )


def _write_durable(path: Path, content: bytes) -> None:
    with path.open("wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())


def sync(path: Path) -> None:
    """Make a file, or the entries of a directory, durable."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write(plan: WritePlan, directory: Path, source: Source) -> Path:
    """Write a whole checkpoint from one process."""
    prepare(plan, directory)
    writers = sorted({chunk.writer for chunk in plan.chunks})
    return finish(plan, directory, [r for writer in writers for r in write_part(plan, directory, writer, source)])


def complete(directory: Path) -> list[Path]:
    """The complete checkpoints of a directory, oldest first."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if STEP_NAME.fullmatch(path.name) and (path / "COMMIT").exists()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def newest(directory: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    return next(reversed(complete(directory)), None)


def prune(directory: Path, keep: int) -> None:
    """Remove the oldest complete checkpoints beyond `keep`, COMMIT first, and what was never finished."""
    for path in complete(directory)[:-keep]:
        (path / "COMMIT").unlink()
        shutil.rmtree(path)
    for path in directory.glob(".step-*.partial"):
        shutil.rmtree(path, ignore_errors=True)
