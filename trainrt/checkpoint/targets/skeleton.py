"""What `torch.save` would write of a state, without its tensors' data: the bytes around them, and where they belong.

torch.save itself makes the file, of fake tensors and with their data skipped, so it is a file of this torch in all its structure.
A state is made of plain values, dicts and lists, arrays of the target in place of tensors, small real tensors, and objects of a
framework by name, which are written without importing it.
"""

from __future__ import annotations

import struct
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from trainrt.checkpoint.formats import torch_file
from trainrt.checkpoint.targets import foreign
from trainrt.checkpoint.targets.array import TargetArray

DESCRIPTOR = b"PK\x07\x08"
ENTRY_BYTES, ENTRY_CRC, ENTRY_LENGTHS = 46, 16, slice(28, 34)
"""Of an entry of the central directory: its fixed part, its CRC-32, the lengths of what follows it (PKWARE's APPNOTE, 4.3.12)."""
HEADER_CRC = 14


@dataclass(frozen=True, slots=True)
class Record:
    """The data of one tensor: its bytes' place in the file, the places of its CRC-32, and what belongs there."""

    offset: int
    length: int
    checksums: tuple[int, int]
    holds: TargetArray | Tensor


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A file's size, its bytes outside of the tensors' data, and the records of that data."""

    size: int
    around: tuple[tuple[int, bytes], ...]
    records: tuple[Record, ...]

    @classmethod
    def of(cls, state: Any) -> Skeleton:
        """What torch.save makes of a state."""
        leaves: dict[int, tuple[TargetArray | Tensor, Tensor]] = {}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "archive"
            with FakeTensorMode(), torch.serialization.skip_data(materialize_fake_tensors=True):
                torch.save(_faked(state, leaves), path, pickle_module=foreign)
            size = path.stat().st_size
            records = tuple(_records(path, [leaf for leaf, _ in leaves.values()]))
            return cls(size, tuple(_around(path, size, records)), records)


def _faked(state: Any, leaves: dict[int, tuple[TargetArray | Tensor, Tensor]]) -> Any:
    """The state with fake tensors. Leaves are noted in the order in which a pickler meets them, each once."""
    if isinstance(state, (TargetArray, Tensor)):
        if id(state) not in leaves:
            dtype = getattr(torch, state.dtype) if isinstance(state, TargetArray) else state.dtype
            leaves[id(state)] = state, torch.empty(tuple(state.shape), dtype=dtype)
        return leaves[id(state)][1]
    if isinstance(state, dict):
        return type(state)((key, _faked(value, leaves)) for key, value in state.items())
    if isinstance(state, (list, tuple)) and not isinstance(state, torch.Size):
        return type(state)(_faked(value, leaves) for value in state)
    return state


def _records(path: Path, leaves: list[TargetArray | Tensor]) -> Iterator[Record]:
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        entry_at = archive.start_dir
        lengths = {offset: length for offset, length, _ in torch_file.records(path)}
        for entry in archive.infolist():
            file.seek(entry_at)
            head = file.read(ENTRY_BYTES)
            central = entry_at + ENTRY_CRC
            entry_at += ENTRY_BYTES + sum(struct.unpack("<HHH", head[ENTRY_LENGTHS]))
            _, in_data, number = entry.filename.rpartition("/data/")
            if not in_data:
                continue
            offset = torch_file.data_offset(file, entry)
            length = lengths[offset]
            file.seek(offset + length)
            local = offset + length + 4 if file.read(4) == DESCRIPTOR else entry.header_offset + HEADER_CRC
            yield Record(offset, length, (local, central), leaves[int(number)])


def _around(path: Path, size: int, records: tuple[Record, ...]) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of all that is no tensor's data."""
    at = 0
    with path.open("rb") as file:
        for record in sorted(records, key=lambda record: record.offset):
            file.seek(at)
            yield at, file.read(record.offset - at)
            at = record.offset + record.length
        file.seek(at)
        yield at, file.read(size - at)
