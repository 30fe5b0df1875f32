"""A target of files that `torch.save` could have written, one or several in a file, and of plain files beside them."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from zlib_ng import zlib_ng

from trainrt.checkpoint.manifest import check_name
from trainrt.checkpoint.targets.array import TargetArray
from trainrt.checkpoint.targets.skeleton import Record, Skeleton
from trainrt.checkpoint.targets.target import Unit, Written
from trainrt.checkpoint.writer import CHUNK_BYTES, not_written, sync, write_range
from trainrt.parallel.layout import ITEM_BYTES, Layout

ALIGNMENT = 64
CRC_BYTES = 4


@dataclass(frozen=True, slots=True)
class TargetFile:
    """Archives of `torch.save` in a file, one behind the other."""

    name: str
    archives: tuple[Skeleton, ...]

    @property
    def offsets(self) -> list[int]:
        """Where each archive begins."""
        found, at = [], 0
        for archive in self.archives:
            found.append(at)
            at += -(-archive.size // ALIGNMENT) * ALIGNMENT
        return found

    @property
    def size(self) -> int:
        return self.offsets[-1] + self.archives[-1].size


@dataclass(frozen=True, slots=True)
class ArrayUnit:
    """The elements [start, stop) of an array. See targets.target.Unit."""

    file: str
    offset: int
    length: int
    array: TargetArray
    start: int
    stop: int

    @property
    def name(self) -> str:
        return self.array.name

    @property
    def role(self) -> str:
        return self.array.role


class FilesTarget:
    """See targets.target.Target."""

    def __init__(self, files: Sequence[TargetFile], plain: Mapping[str, bytes]) -> None:
        # Names of tensors become names of files in some formats.
        for name in [*plain, *(file.name for file in files)]:
            check_name(name, "a tensor of the source")
        self._files, self._plain = files, dict(plain)
        self._of_record: dict[tuple[str, int], list[ArrayUnit]] = {}
        for file in files:
            for begin, archive in zip(file.offsets, file.archives, strict=True):
                for record in archive.records:
                    if isinstance(record.holds, TargetArray):
                        place = begin + record.offset
                        self._of_record[file.name, place] = _units(file.name, place, record.holds)
        self.units: Sequence[ArrayUnit] = [unit for units in self._of_record.values() for unit in units]

    def layout(self, unit: Unit) -> Layout:
        assert isinstance(unit, ArrayUnit)
        return unit.array.layout(unit.start, unit.stop)

    def checksum(self, data: np.ndarray) -> str:
        return f"{zlib_ng.crc32(data):08x}"

    def folder(self, work: Path) -> Path:
        return work / "made"

    def place(self, unit: Unit) -> str:
        return unit.file

    def prepare(self, work: Path) -> None:
        folder = self.folder(work)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            for name in [*self._plain, *(file.name for file in self._files)]:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
            for name, content in self._plain.items():
                (folder / name).write_bytes(content)
            for file in self._files:
                with (folder / file.name).open("wb") as out:
                    os.posix_fallocate(out.fileno(), 0, file.size)
                    _write_around(out.fileno(), file)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise not_written(work.parent, sum(file.size for file in self._files), error) from error

    def finish(self, work: Path, written: Written) -> Path:
        folder = self.folder(work)
        for file in self._files:
            with (folder / file.name).open("r+b") as out:
                for begin, archive in zip(file.offsets, file.archives, strict=True):
                    for record in archive.records:
                        if isinstance(record.holds, TargetArray):
                            units = self._of_record[file.name, begin + record.offset]
                            crcs = [int(written[file.name, unit.offset], 16) for unit in units]
                            _write_checksum(out.fileno(), begin, record, _joined(crcs, units))
                os.fsync(out.fileno())
        for path in folder.rglob("*"):
            sync(path)
        sync(folder)
        return folder

    def problem(self, path: Path) -> str | None:
        for file in self._files:
            there = path / file.name
            if not there.is_file() or there.stat().st_size != file.size:
                return f"{file.name}: is not the file of {file.size} bytes that this conversion makes"
        differing = (n for n, content in self._plain.items() if not _same(path / n, content))
        name = next(differing, None)
        return None if name is None else f"{name}: is not what this conversion writes"


def _units(file: str, place: int, array: TargetArray) -> list[ArrayUnit]:
    item = ITEM_BYTES[array.dtype]
    step = max(1, CHUNK_BYTES // item)
    ranges = ((start, min(array.elements, start + step)) for start in range(0, array.elements, step))
    return [ArrayUnit(file, place + a * item, (b - a) * item, array, a, b) for a, b in ranges]


def _write_around(fd: int, file: TargetFile) -> None:
    for begin, archive in zip(file.offsets, file.archives, strict=True):
        for offset, content in archive.around:
            os.pwrite(fd, content, begin + offset)
        for record in archive.records:
            if isinstance(record.holds, Tensor):
                data = record.holds.detach().reshape(-1).contiguous().view(torch.uint8).numpy()
                write_range(fd, begin + record.offset, data)
                _write_checksum(fd, begin, record, zlib_ng.crc32(data))


def _write_checksum(fd: int, begin: int, record: Record, crc: int) -> None:
    for place in record.checksums:
        os.pwrite(fd, crc.to_bytes(CRC_BYTES, "little"), begin + place)


def _joined(crcs: Sequence[int], units: Sequence[ArrayUnit]) -> int:
    """The CRC-32 of what lies one behind the other."""
    pairs = zip(crcs, (unit.length for unit in units), strict=True)
    return functools.reduce(lambda crc, pair: zlib_ng.crc32_combine(crc, *pair), pairs, 0)


def _same(path: Path, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() == content
