"""Compressed chunks: the bytes of numbers by their significance, each such plane compressed with zstd where that pays.

In a plane of exponents neighbours resemble each other; in one of the last bits of a mantissa they do not, and it stays raw. A
chunk is independent of all others: for each plane eight bytes (how many are stored, with the highest bit set where they are a
zstd frame), then the planes, the most significant first.
"""

from __future__ import annotations

import struct

import numpy as np
import zstandard

from trainrt.errors import CheckpointError

CODEC = "zstd"
LEVEL = 1
PAYS = 0.97
"""A plane that does not shrink to this much stays as it is."""
COMPRESSED = 1 << 63


def encode(data: np.ndarray, item_bytes: int) -> np.ndarray:
    """Flat bytes of little-endian numbers of so many bytes each, as a chunk."""
    columns = data.reshape(-1, item_bytes)
    heads, bodies = [], []
    for significance in reversed(range(item_bytes)):
        plane = np.ascontiguousarray(columns[:, significance])
        packed = zstandard.ZstdCompressor(level=LEVEL).compress(plane.tobytes())
        pays = len(packed) < PAYS * plane.nbytes
        heads.append(struct.pack("<Q", len(packed) | COMPRESSED if pays else plane.nbytes))
        bodies.append(packed if pays else plane.tobytes())
    return np.frombuffer(b"".join(heads + bodies), np.uint8)


def most_bytes(length: int, item_bytes: int) -> int:
    """How long a chunk may become."""
    return length + 8 * item_bytes


def decode(stored: np.ndarray, length: int, item_bytes: int) -> np.ndarray:
    """The `length` bytes that a chunk stands for. Raises CheckpointError for anything that is not exactly that."""
    rows, at = length // item_bytes, 8 * item_bytes
    if stored.nbytes < at:
        raise CheckpointError(f"a compressed chunk of {stored.nbytes} bytes ends within its head")
    data = np.empty((rows, item_bytes), np.uint8)
    for number, (said,) in enumerate(struct.iter_unpack("<Q", stored[:at].tobytes())):
        size = said & ~COMPRESSED
        body = stored[at : at + size]
        if body.nbytes != size:
            raise CheckpointError(f"a compressed chunk ends at {stored.nbytes}, its planes go on")
        data[:, item_bytes - 1 - number] = _plane(body, rows) if said & COMPRESSED else _raw(body, rows)
        at += size
    if at != stored.nbytes:
        raise CheckpointError(f"a compressed chunk has {stored.nbytes} bytes, its planes {at}")
    return data.reshape(-1)


def _raw(body: np.ndarray, rows: int) -> np.ndarray:
    if body.nbytes != rows:
        raise CheckpointError(f"a plane has {body.nbytes} bytes for {rows} numbers")
    return body


def _plane(body: np.ndarray, rows: int) -> np.ndarray:
    """Never more than what it stands for is unpacked: a frame may claim any size."""
    frame = body.tobytes()
    try:
        said = zstandard.get_frame_parameters(frame).content_size
        if said != rows:
            raise CheckpointError(f"a compressed plane claims {said} bytes for {rows} numbers")
        return np.frombuffer(zstandard.ZstdDecompressor().decompress(frame, max_output_size=rows), np.uint8)
    except zstandard.ZstdError as error:
        raise CheckpointError(f"a compressed plane cannot be read: {error}") from error
