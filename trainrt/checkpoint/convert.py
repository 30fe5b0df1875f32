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
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial as partial_of
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from trainrt.checkpoint.formats import open_any
from trainrt.checkpoint.formats.opened import Opened, release
from trainrt.checkpoint.jobs import run_jobs
from trainrt.checkpoint.journal import Journal, Noted
from trainrt.checkpoint.manifest import json_object
from trainrt.checkpoint.mapping.description import Description
from trainrt.checkpoint.reader import read_range
from trainrt.checkpoint.replicas import Replicas
from trainrt.checkpoint.source import gathered
from trainrt.checkpoint.targets import TARGETS, Shape, make_target
from trainrt.checkpoint.targets.target import Target, Unit
from trainrt.checkpoint.writer import sync, write_range
from trainrt.errors import CheckpointError, ConfigError, nearest

JOB_BYTES = 160 << 20
"""What a job takes beside the interpreter: a unit as it is read, gathered and written, and what is mapped of the source."""
BASE_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class Conversion:
    """What is to be done: the target's files and units, and what it has no place for."""

    opened: Opened
    path: Path
    format: str
    shape: Shape
    target: Target
    lost: tuple[str, ...]

    @property
    def work(self) -> Path:
        return self.path.parent / f".{self.path.name}.converting"

    @property
    def bytes(self) -> int:
        return sum(unit.length for unit in self.target.units)

    def source_files(self) -> list[tuple[str, int, int]]:
        """Name, size and time of the source's files: whether it is still what it was."""
        return [
            (str(path.relative_to(self.opened.path)), path.stat().st_size, path.stat().st_mtime_ns)
            for path in sorted(self.opened.path.rglob("*"))
            if path.is_file()
        ]

    def fingerprint(self) -> str:
        """Of the plan, the source's files and how they are read: another one is another conversion."""
        units = [(unit.file, unit.offset, unit.length) for unit in self.target.units]
        plan = [self.format, str(self.shape), self.source_files(), self.opened.source.layout.to_json(), units]
        return hashlib.sha256(json.dumps(plan).encode()).hexdigest()


def convert(
    source: str | Path, target: str | Path, *, to: str, shape: Shape | None = None, mapping: str | Path | None = None,
    model_config: str | Path | None = None, average: bool = False,
    jobs: int | None = None, memory_bytes: int = 2 << 30, dry_run: bool = False, restart: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:  # fmt: skip
    """Convert a checkpoint. Returns the document of `--json`; see the module for what survives a kill.

    `shape`: the mesh and the ranks that the target is cut for. Raises ConfigError for wrong arguments and CheckpointError for a
    source that is damaged or replicas that differ.
    """
    if to not in TARGETS:
        raise ConfigError(f"--to {to}: allowed: {', '.join(TARGETS)}{nearest(to, TARGETS)}")
    began = time.perf_counter()
    work = plan_conversion(
        Path(source), Path(target), to=to, shape=shape or Shape(), mapping=mapping, model_config=model_config
    )
    count = jobs_for(memory_bytes, jobs)
    document = {
        "source_format": work.opened.format, "recognised_by": work.opened.why, "target_format": to,
        "tensors": len({(unit.name, unit.role) for unit in work.target.units}), "units": len(work.target.units),
        "jobs": count, "peak_memory_bytes": BASE_BYTES + count * JOB_BYTES, "lost": list(work.lost),
    }  # fmt: skip
    if dry_run:
        return {**document, "bytes_read": 0, "bytes_written": 0, "bytes_to_write": work.bytes, "seconds": 0.0}
    replicas = Replicas(work.opened, average=average)
    if work.path.exists():
        compare(work, replicas)
        shutil.rmtree(work.work, ignore_errors=True)
        written = 0
    else:
        written = _carry_out(work, replicas, jobs=count, restart=restart, progress=progress)
    return {**document, "bytes_read": work.bytes, "bytes_written": written, "seconds": time.perf_counter() - began}


def plan_conversion(
    source: Path, path: Path, *, to: str, shape: Shape, mapping: str | Path | None = None,
    model_config: str | Path | None = None,
) -> Conversion:  # fmt: skip
    """Open the source and plan the target's files."""
    _check_apart(source, path)
    config = None
    if model_config is not None:
        file = Path(model_config) / "config.json" if Path(model_config).is_dir() else Path(model_config)
        try:
            config = json_object(file.read_bytes(), f"--model-config {file}")
        except OSError as error:
            raise ConfigError(f"--model-config {file}: {error.strerror}") from error
    described = Description.load(Path(mapping)) if mapping is not None else None
    opened = open_any(source, model_config=config, mapping=described)
    if not opened.source.layout.tensors:
        raise CheckpointError(f"{source}: holds no tensors")
    lost = [f"{name}: not understood" for name in opened.unknown]
    opened, target, unplaced = make_target(opened, to, shape)
    return Conversion(opened, path.absolute(), to, shape, target, (*lost, *unplaced))


def _check_apart(source: Path, path: Path) -> None:
    """What is written must not become a part of what is read. Raises ConfigError."""
    here, there = source.resolve(), path.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise ConfigError(f"DST {path}: and SRC {source}: one is inside of the other; give a target beside the source")


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
    target, journal = work.target, Journal(work.work / "journal.jsonl", work.fingerprint())
    source = work.source_files()
    done = journal.begin()
    if not target.folder(work.work).exists() or not done:
        try:
            target.prepare(work.work)
        except CheckpointError:
            shutil.rmtree(work.work, ignore_errors=True)
            raise
        done = journal.restart()
    folder = target.folder(work.work)
    left = [unit for unit in target.units if not _is_written(unit, target, folder, done)]
    total = len(target.units)
    progress(total - len(left), total)
    shares = [left[number::jobs] for number in range(jobs)]
    run_jobs(
        [partial_of(_write_units, share, work, replicas, journal, folder) for share in shares if share],
        poll=lambda: progress(len(journal.read()), total),
    )
    if work.source_files() != source:
        raise CheckpointError(f"{work.opened.path}: has changed while it was read; --restart begins anew")
    made = target.finish(work.work, {key: facts["output"] for key, facts in journal.read().items()})
    _publish(work, made)
    progress(total, total)
    return sum(unit.length for unit in left)


def _publish(work: Conversion, made: Path) -> None:
    """Give the target its name, at once."""
    os.replace(made, work.path)
    sync(work.path.parent)
    shutil.rmtree(work.work)


def _write_units(units: list[Unit], work: Conversion, replicas: Replicas, journal: Journal, folder: Path) -> None:
    """One job's share, in a process of its own."""
    for unit in units:
        data = _gathered(unit, work, replicas)
        with (folder / unit.file).open("r+b", buffering=0) as file:
            write_range(file.fileno(), unit.offset, data)
        journal.note(
            unit.file, unit.offset, source=xxhash.xxh3_64_hexdigest(data), output=work.target.checksum(data)
        )  # fmt: skip
        release(work.opened.source)


def _gathered(unit: Unit, work: Conversion, replicas: Replicas) -> np.ndarray:
    """The bytes of a unit, with its replicas compared."""
    wanted = work.target.layout(unit)
    return replicas.checked(wanted, gathered(wanted, unit.length, work.opened.source))


def _is_written(unit: Unit, target: Target, folder: Path, done: Noted) -> bool:
    """Whether a unit is noted, and what it wrote before the interruption is still there."""
    noted = done.get((unit.file, unit.offset))
    if noted is None:
        return False
    return target.checksum(read_range(folder / unit.file, unit.offset, unit.length)) == noted["output"]


def compare(work: Conversion, replicas: Replicas) -> None:
    """Whether a target that is there is what this conversion would make. Raises ConfigError where it is not."""
    otherwise = "give another target, or remove it"
    try:
        problem = work.target.problem(work.path)
    except CheckpointError as error:
        raise ConfigError(f"{work.path}: is there already, and is no checkpoint; {otherwise}") from error
    if problem is not None:
        raise ConfigError(f"{work.path}: is there already, and damaged: {problem}")
    for unit in work.target.units:
        try:
            held = read_range(work.path / work.target.place(unit), unit.offset, unit.length)
            same = np.array_equal(held, _gathered(unit, work, replicas))
            release(work.opened.source)
        except OSError:
            same = False
        if not same:
            raise ConfigError(
                f"{work.path}: is there already, and is not what this conversion makes ({unit.name}, {unit.role}); "
                f"{otherwise}"
            )
