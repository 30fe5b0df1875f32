"""Slots: shared memory that a trainer writes and its store reads.

Each is a file of fixed size, allocated before it is mapped, so that a full /dev/shm is an answer and not
a SIGBUS. Mappings are kept: a new one pays for its pages again.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np
import xxhash

BLOCK_BYTES = 1 << 20


def shared_folder(run_id: str, node: str) -> Path:
    """Where a store's socket and slots lie: found by run id."""
    return Path(f"/dev/shm/trainrt-{run_id}") / node


def create_slot(path: Path, size: int) -> bool:
    """Allocate a slot's file at its full size. False where there is no room (nothing is left behind)."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, max(size, 1))
    except OSError:
        path.unlink(missing_ok=True)
        return False
    finally:
        os.close(fd)
    return True


def map_slot(path: str | Path, size: int) -> np.ndarray:
    """A slot as flat uint8, shared with every process that maps it."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        return np.frombuffer(mmap.mmap(fd, max(size, 1)), np.uint8)[:size]
    finally:
        os.close(fd)


def hash_blocks(data: np.ndarray) -> list[int]:
    """xxh3-64 of each block of 1 MiB."""
    return [xxhash.xxh3_64_intdigest(data[at : at + BLOCK_BYTES]) for at in range(0, data.nbytes, BLOCK_BYTES)]
