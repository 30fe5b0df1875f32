"""What a conversion writes: files whose sizes are known beforehand, filled unit by unit, and made whole at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from trainrt.parallel.layout import Layout

Written = Mapping[tuple[str, int], str]
"""(file, offset) of a unit to the checksum of what stands there."""


class Unit(Protocol):
    """`length` bytes at `offset` of `file`: a part of one array (`name`, `role`)."""

    @property
    def name(self) -> str: ...
    @property
    def role(self) -> str: ...
    @property
    def file(self) -> str: ...
    @property
    def offset(self) -> int: ...
    @property
    def length(self) -> int: ...


class Target(Protocol):
    """A checkpoint of some format that is to be written below a folder for work in progress."""

    @property
    def units(self) -> Sequence[Unit]: ...

    def layout(self, unit: Unit) -> Layout:
        """What lies in a unit, in the storage `targets.array.UNIT` of rank -1; what nothing lies in is zeros."""
        ...

    def checksum(self, data: np.ndarray) -> str:
        """The checksum of a unit's bytes that the format keeps."""
        ...

    def folder(self, work: Path) -> Path:
        """Where the files are while they are written."""
        ...

    def prepare(self, work: Path) -> None:
        """All files at full size, with everything but the units. Raises CheckpointError where there is no room."""
        ...

    def finish(self, work: Path, written: Written) -> Path:
        """Add the checksums, make everything durable. Returns what is to get the target's name. May be done again."""
        ...

    def place(self, unit: Unit) -> str:
        """The unit's file as it is called in the finished target."""
        ...

    def problem(self, path: Path) -> str | None:
        """What is wrong with a finished target that stands there, apart from its units; None if nothing is."""
        ...
