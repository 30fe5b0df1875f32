"""Slots: shared memory that a trainer writes and its store reads.

Each is a file of fixed size, allocated before it is mapped, so that a full /dev/shm is an answer and not
a SIGBUS. Mappings are kept: a new one pays for its pages again.
"""

from __future__ import annotations

import mmap
import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import xxhash

BLOCK_BYTES = 1 << 20


def shared_folder(run_id: str, node: str) -> Path:
    """Where a store's socket and slots lie: found by run id."""
    return Path(f"/dev/shm/trainrt-{run_id}") / node


def memory_bytes(run_id: str) -> int:
    """Shared memory of this host that the run's stores can have: what is free, and what they have already."""
    held = sum(path.stat().st_blocks * 512 for path in Path(f"/dev/shm/trainrt-{run_id}").rglob("*") if path.is_file())
    return shutil.disk_usage("/dev/shm").free + held


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


class Slots:
    """A store's slots: made where there is room, used again, removed when nobody can use them.

    `owner` is what a slot is for: a rank, or parity; a slot is only given to the same owner at the same size again.
    """

    def __init__(self, folder: Path, node: str) -> None:
        self._folder, self._node = folder, node
        self._made = 0
        self._owners: dict[str, tuple[str, int]] = {}
        self._maps: dict[str, np.ndarray] = {}

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self._owners.values())

    def take(self, owner: str, size: int, *, used: Collection[str], spill: Path | None = None) -> str | None:
        """A slot that is not in use; in `spill` where shared memory is full. None where there is no room."""
        for slot, facts in self._owners.items():
            if slot not in used and facts == (owner, size):
                return slot
        for folder in filter(None, (self._folder, spill)):
            folder.mkdir(parents=True, exist_ok=True)
            self._made += 1
            path = folder / f"{owner}-slot-{self._node}-{self._made}"
            if create_slot(path, size):
                self._owners[str(path)] = (owner, size)
                return str(path)
        return None

    def map(self, slot: str) -> np.ndarray:
        if slot not in self._maps:
            self._maps[slot] = map_slot(slot, self._owners[slot][1])
        return self._maps[slot]

    def reclaim(self, *, used: Collection[str], wanted: Callable[[str, int], bool]) -> None:
        """Remove the slots that nothing is in and that no owner (owner, size) wants again."""
        for slot, facts in list(self._owners.items()):
            if slot not in used and not wanted(*facts):
                del self._owners[slot]
                self._maps.pop(slot, None)
                Path(slot).unlink(missing_ok=True)


def owner_of(rank: int) -> str:
    return f"rank-{rank:05d}"
