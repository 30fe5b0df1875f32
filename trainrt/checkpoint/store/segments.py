"""A node's data as the erasure code sees it: its ranks' slots one after the other, cut into k segments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from trainrt.checkpoint.store.group import segment_bytes

BUCKET_BYTES = 4 << 20
"""What is asked for, coded and stored at a time: coding starts when the first of it is copied."""

Range = Callable[[int, int], np.ndarray]


class NodeData:
    """Pieces of given lengths, each read through a function of (start, stop), as one row of bytes."""

    def __init__(self, pieces: Sequence[tuple[int, Range]]) -> None:
        self._pieces = pieces
        self.bytes = sum(length for length, _ in pieces)

    def spans(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(piece, start, stop) within the pieces of a range of the whole; what is beyond the end is left out."""
        base = 0
        for number, (length, _) in enumerate(self._pieces):
            first, last = max(start, base), min(stop, base + length)
            if first < last:
                yield number, first - base, last - base
            base += length

    def read(self, start: int, stop: int) -> np.ndarray:
        """The bytes of a range, not copied where they lie in one piece; shorter where the data ends."""
        found = [self._pieces[piece][1](a, b) for piece, a, b in self.spans(start, stop)]
        if len(found) == 1:
            return found[0]
        return np.concatenate(found) if found else np.empty(0, np.uint8)

    def write(self, start: int, data: np.ndarray) -> None:
        """Put bytes at a place; what is beyond the end is left out."""
        at = 0
        for piece, a, b in self.spans(start, start + data.size):
            self._pieces[piece][1](a, b)[:] = data[at : at + b - a]
            at += b - a

    def segment(self, number: int, k: int, offset: int, length: int) -> tuple[int, int]:
        """The range of the whole that is bytes [offset, offset + length) of a segment."""
        size = segment_bytes(self.bytes, k)
        start = number * size + min(offset, size)
        return start, number * size + min(offset + length, size)


def cut(data: np.ndarray) -> Range:
    """Ranges of plain memory."""
    return lambda start, stop: data[start:stop]


def padded(payload: memoryview | np.ndarray, length: int) -> np.ndarray | None:
    """A received range as a shard of the code: filled up with zeros, aligned; None where it is empty."""
    got = np.frombuffer(payload, np.uint8)
    if not got.size:
        return None
    if got.size == length and got.ctypes.data % 8 == 0:
        return got
    shard = np.zeros(length, np.uint8)
    shard[: got.size] = got
    return shard


def buckets(length: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of the buckets of a segment."""
    for offset in range(0, length, BUCKET_BYTES):
        yield offset, min(BUCKET_BYTES, length - offset)
