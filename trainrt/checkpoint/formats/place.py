"""Where the files of a checkpoint may be: inside of it, and not behind a link."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from trainrt.checkpoint.manifest import check_name
from trainrt.errors import CheckpointError


def inside(root: Path, name: str, says: Path | str) -> Path:
    """The file or directory that something in a checkpoint names. Raises CheckpointError for what is outside of it."""
    check_name(name, f"{says}")
    path = root
    for part in PurePosixPath(name).parts:
        path = path / part
        no_link(path)
    return path


def no_link(path: Path) -> Path:
    """The path itself. Raises CheckpointError for a symbolic link: what it leads to is no part of the checkpoint."""
    if path.is_symlink():
        raise CheckpointError(f"{path}: is a symbolic link; allowed: what lies in the checkpoint itself")
    return path
