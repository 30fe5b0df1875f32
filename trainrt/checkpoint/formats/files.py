"""Files of other frameworks as a Source: their bytes are mapped, and checked before the first use where they have checksums."""

from __future__ import annotations

import bisect
import mmap
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from zlib_ng import zlib_ng

from trainrt.checkpoint.formats import torch_file
from trainrt.errors import CheckpointError
from trainrt.parallel.layout import Fragment, Layout, LogicalTensor

PIECE_BYTES = 16 << 20
Record = tuple[int, int, int]


class FileSource:
    """A layout whose storages are files. May be forked; `release` gives back the memory of what was read.

    `records`: (offset, bytes, CRC-32) of what has a checksum in a file; by default those of a file of `torch.save`.
    """

    def __init__(self, layout: Layout, records: Mapping[str, list[Record]] | None = None) -> None:
        self.layout, self._records = layout, dict(records or {})
        self._maps: dict[str, MappedFile] = {}

    def read(self, tensor: LogicalTensor, fragment: Fragment) -> np.ndarray:
        """A view of the mapped file. Raises CheckpointError where its checksum does not hold."""
        if fragment.storage not in self._maps:
            path = Path(fragment.storage)
            known = self._records.get(fragment.storage)
            if known is None:
                known = torch_file.records(path) if torch_file.is_archive(path) else None
            self._maps[fragment.storage] = MappedFile(path, known)
        held = self._maps[fragment.storage]
        extent = sum((n - 1) * s for n, s in zip(fragment.box.length, fragment.strides, strict=True))
        first = fragment.base + fragment.start * tensor.item_bytes
        if fragment.box.elements:
            held.check(first, first + (extent + 1) * tensor.item_bytes)
        return fragment.view(held.data, tensor.item_bytes)

    def release(self) -> None:
        for held in self._maps.values():
            held.release()


class MappedFile:
    """One file, and which of its records were found sound."""

    def __init__(self, path: Path, records: list[Record] | None) -> None:
        """`records`: None for a file that has no checksums."""
        self.path = path
        with path.open("rb") as file:
            self._map = (
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.fstat(file.fileno()).st_size else None
            )
        self.data = np.frombuffer(self._map, np.uint8) if self._map is not None else np.empty(0, np.uint8)
        self._records = None if records is None else sorted(records)
        self._starts = [start for start, _, _ in self._records or ()]
        self._sound: set[int] = set()

    def check(self, first: int, last: int) -> None:
        """Compare the checksum of the record that a range lies in, once."""
        if last > self.data.size:
            raise CheckpointError(f"{self.path}: ends at {self.data.size}, bytes up to {last} were expected")
        if self._records is None:
            return
        number = bisect.bisect_right(self._starts, first) - 1
        start, size, crc = self._records[number] if number >= 0 else (0, 0, 0)
        if last > start + size:
            raise CheckpointError(f"{self.path}: bytes {first} to {last} are not the data of one tensor")
        if number not in self._sound:
            if self._crc(start, size) != crc:
                raise CheckpointError(f"{self.path}: the data at {start} does not match its checksum: it is damaged")
            self._sound.add(number)

    def _crc(self, start: int, size: int) -> int:
        """In pieces, whose memory is given back: a record may be larger than the memory there is."""
        crc = 0
        for at in range(start, start + size, PIECE_BYTES):
            crc = zlib_ng.crc32(self.data[at : min(at + PIECE_BYTES, start + size)], crc)
            if size > PIECE_BYTES:
                self.release()
        return crc

    def release(self) -> None:
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)
