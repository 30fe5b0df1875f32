"""`trainrt convert`: any format to any other, in units that are journalled, by several processes.

A unit is a range of one file of the target: gathered from wherever the source holds it, written in its place, and noted with its
digest in the journal. After SIGKILL at any moment the same command goes on behind the units that are noted, and compares those
first. The target appears under its name when everything is there, or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial as partial_of
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from trainrt.checkpoint.formats import open_any
from trainrt.checkpoint.formats.opened import Opened, release
from trainrt.checkpoint.inspect import verify
from trainrt.checkpoint.jobs import run_jobs
from trainrt.checkpoint.journal import Journal, Noted
from trainrt.checkpoint.mapping.description import Description
from trainrt.checkpoint.reader import read_range
from trainrt.checkpoint.replicas import Replicas
from trainrt.checkpoint.writer import (
    MODEL_ROLES,
    ChunkPlan,
    WritePlan,
    final_name,
    finish,
    gather,
    partial,
    prepare,
    write_range,
)
from trainrt.errors import CheckpointError, ConfigError, nearest

TARGETS = ("universal", "hf")
JOB_BYTES = 160 << 20
"""What a job takes beside the interpreter: a unit as it is read, gathered and written, and what is mapped of the source."""
BASE_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class Conversion:
    """What is to be done: the target's files and units, and what it has no place for."""

    opened: Opened
    target: Path
    format: str
    plan: WritePlan
    lost: tuple[str, ...]

    @property
    def work(self) -> Path:
        return self.target.parent / f".{self.target.name}.converting"

    @property
    def bytes(self) -> int:
        return sum(chunk.length for chunk in self.plan.chunks)

    def fingerprint(self) -> str:
        """Of the plan, the source's files and how they are read: another one is another conversion."""
        files = [
            (str(path.relative_to(self.opened.path)), path.stat().st_size, path.stat().st_mtime_ns)
            for path in sorted(self.opened.path.rglob("*"))
            if path.is_file()
        ]
        units = [(chunk.file, chunk.offset, chunk.length) for chunk in self.plan.chunks]
        layout = self.opened.source.layout.to_json()
        return hashlib.sha256(json.dumps([self.format, files, layout, units]).encode()).hexdigest()


def convert(
    source: str | Path, target: str | Path, *, to: str, mapping: str | Path | None = None,
    model_config: str | Path | None = None, average: bool = False,
    jobs: int | None = None, memory_bytes: int = 2 << 30, dry_run: bool = False, restart: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:  # fmt: skip
    """Convert a checkpoint. Returns the document of `--json`; see the module for what survives a kill.

    Raises ConfigError for wrong arguments and CheckpointError for a source that is damaged or replicas that differ.
    """
    if to not in TARGETS:
        raise ConfigError(f"--to {to}: allowed: {', '.join(TARGETS)}{nearest(to, TARGETS)}")
    began = time.perf_counter()
    work = plan_conversion(Path(source), Path(target), to=to, mapping=mapping, model_config=model_config)
    count = jobs_for(memory_bytes, jobs)
    document = {
        "source_format": work.opened.format, "recognised_by": work.opened.why, "target_format": to,
        "tensors": len({(chunk.name, chunk.role) for chunk in work.plan.chunks}), "units": len(work.plan.chunks),
        "jobs": count, "peak_memory_bytes": BASE_BYTES + count * JOB_BYTES, "lost": list(work.lost),
    }  # fmt: skip
    if dry_run:
        return {**document, "bytes_read": 0, "bytes_written": 0, "bytes_to_write": work.bytes, "seconds": 0.0}
    replicas = Replicas(work.opened, average=average)
    if work.target.exists():
        compare(work, replicas)
        shutil.rmtree(work.work, ignore_errors=True)
        written = 0
    else:
        written = _carry_out(work, replicas, jobs=count, restart=restart, progress=progress)
    return {**document, "bytes_read": work.bytes, "bytes_written": written, "seconds": time.perf_counter() - began}


def plan_conversion(
    source: Path, target: Path, *, to: str, mapping: str | Path | None = None, model_config: str | Path | None = None
) -> Conversion:
    """Open the source and plan the target's files."""
    config = None
    if model_config is not None:
        file = Path(model_config) / "config.json" if Path(model_config).is_dir() else Path(model_config)
        try:
            config = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"--model-config {model_config}: {error}") from error
    described = Description.load(Path(mapping)) if mapping is not None else None
    opened = open_any(source, model_config=config, mapping=described)
    layout, lost = opened.source.layout, [f"{name}: not understood" for name in opened.unknown]
    if to == "hf":
        kept = layout.only(lambda tensor, _: tensor.role in MODEL_ROLES)
        roles = sorted({role for _, role in layout.tensors} - set(MODEL_ROLES))
        lost += [f"{role}: a Hugging Face model has no place for it" for role in roles]
        if not opened.metadata["model_config"]:
            lost.append("config.json: not known (--model-config gives it)")
        layout = kept
    if not layout.tensors:
        raise CheckpointError(f"{source}: holds no tensors")
    metadata = {"step": 0, "run_id": "", **opened.metadata}
    plan = WritePlan.build(layout, metadata, writers=["convert"], writer_of_rank={})
    return Conversion(opened, target.absolute(), to, plan, tuple(lost))


def jobs_for(memory_bytes: int, asked: int | None) -> int:
    """How many processes work at once. Raises ConfigError where not even one has room."""
    most = (memory_bytes - BASE_BYTES) // JOB_BYTES
    if most < 1:
        raise ConfigError(f"--memory {memory_bytes}: at least {BASE_BYTES + JOB_BYTES} bytes are needed")
    wanted = asked if asked is not None else len(os.sched_getaffinity(0))
    if wanted < 1:
        raise ConfigError(f"--jobs {wanted}: at least 1")
    return min(wanted, most)


def _carry_out(
    work: Conversion, replicas: Replicas, *, jobs: int, restart: bool, progress: Callable[[int, int], None]
) -> int:
    """Write what is not there yet, then make it visible. Returns the bytes written."""
    if restart:
        shutil.rmtree(work.work, ignore_errors=True)
    folder = partial(work.work, work.plan.step)
    journal = Journal(work.work / "journal.jsonl", work.fingerprint())
    done = journal.begin()
    made = work.work / final_name(work.plan.step)
    if (made / "COMMIT").exists():
        # All was there but the name.
        _publish(work, made)
        return 0
    if not folder.exists() or not done:
        prepare(work.plan, work.work)
        done = journal.restart()
    left = [chunk for chunk in work.plan.chunks if not _is_written(chunk, folder, done)]
    total = len(work.plan.chunks)
    progress(total - len(left), total)
    shares = [left[number::jobs] for number in range(jobs)]
    run_jobs(
        [partial_of(_write_units, share, work, replicas, journal, folder) for share in shares],
        poll=lambda: progress(len(journal.read()), total),
    )
    noted = journal.read()
    results = [{"file": file, "offset": offset, "xxh3": facts["output"]} for (file, offset), facts in noted.items()]
    _publish(work, finish(work.plan, work.work, results))
    progress(total, total)
    return sum(chunk.length for chunk in left)


def _write_units(chunks: list[ChunkPlan], work: Conversion, replicas: Replicas, journal: Journal, folder: Path) -> None:
    """One job's share, in a process of its own."""
    for chunk, data in _gathered(chunks, work, replicas):
        with (folder / chunk.file).open("r+b", buffering=0) as file:
            write_range(file.fileno(), chunk.offset, data)
        digest = xxhash.xxh3_64_hexdigest(data)
        journal.note(chunk.file, chunk.offset, source=digest, output=digest)


def _gathered(chunks: list[ChunkPlan], work: Conversion, replicas: Replicas) -> Iterator[tuple[ChunkPlan, np.ndarray]]:
    """The bytes of each unit, with its replicas compared."""
    for chunk in chunks:
        tensor = work.plan.tensors[chunk.name, chunk.role]
        data = gather(tensor, chunk.start, chunk.stop, work.opened.source, "convert")
        yield chunk, replicas.checked(tensor, chunk.start, chunk.stop, data)
        release(work.opened.source)


def _is_written(chunk: ChunkPlan, folder: Path, done: Noted) -> bool:
    """Whether a unit is noted, and what it wrote before the interruption is still there."""
    noted = done.get((chunk.file, chunk.offset))
    if noted is None:
        return False
    return xxhash.xxh3_64_hexdigest(read_range(folder / chunk.file, chunk.offset, chunk.length)) == noted["output"]


def _publish(work: Conversion, made: Path) -> None:
    """Give the target its name, at once. A model whose config is not known has no config.json, rather than an empty one."""
    if work.format == "hf" and not work.opened.metadata["model_config"]:
        (made / "model" / "config.json").unlink(missing_ok=True)
    os.replace(made / "model" if work.format == "hf" else made, work.target)
    shutil.rmtree(work.work)


def compare(work: Conversion, replicas: Replicas) -> None:
    """Whether a target that is there is what this conversion would make. Raises ConfigError where it is not."""
    problems = verify(work.target)["problems"] if (work.target / "manifest.json").exists() else []
    if problems:
        raise ConfigError(
            f"{work.target}: is there already, and damaged: {problems[0]['file']}: {problems[0]['message']}"
        )
    for chunk, data in _gathered(list(work.plan.chunks), work, replicas):
        path = work.target / (chunk.file.removeprefix("model/") if work.format == "hf" else chunk.file)
        try:
            same = np.array_equal(read_range(path, chunk.offset, chunk.length), data)
        except (OSError, CheckpointError):
            same = False
        if not same:
            raise ConfigError(
                f"{work.target}: is there already, and is not what this conversion makes ({chunk.name}, {chunk.role}); "
                "give another target, or remove it"
            )
