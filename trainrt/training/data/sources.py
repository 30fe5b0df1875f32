"""Where documents come from: the standard library's sources, a file, a directory, or a glob."""

from __future__ import annotations

import glob
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from trainrt.errors import DataError

SUFFIXES = (".txt", ".py", ".jsonl")
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3", "ensurepip"}


def files_of(source: str) -> list[Path]:
    """The files of data.source in a fixed order. Raises DataError where there is none."""
    if source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        found = list(_modules_below(root))
    elif Path(source).is_dir():
        found = [path for path in Path(source).rglob("*") if path.suffix in SUFFIXES and path.is_file()]
    else:
        found = [path for path in map(Path, glob.glob(source, recursive=True)) if path.is_file()]
    if not found:
        raise DataError(
            f'data.source = "{source}" holds no documents; allowed: "stdlib", a file, a directory or a glob of '
            f"{', '.join(SUFFIXES)} files"
        )
    return sorted(found)


def _modules_below(root: Path) -> Iterator[Path]:
    """Python files, without entering the folders that are left out: every rank walks this at its start."""
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in LEFT_OUT]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def documents_of(path: Path) -> Iterator[bytes]:
    """The documents of a file: each line's "text" (or the line, if it is a string) of JSONL, else the whole file."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"data.source: {path}: {error.strerror}") from error
    if path.suffix != ".jsonl":
        if content:
            yield content
        return
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise DataError(f"data.source: {path}:{number}: no JSON: {error}") from error
        text = entry.get("text") if isinstance(entry, dict) else entry
        if not isinstance(text, str):
            raise DataError(f'data.source: {path}:{number}: allowed: an object with a "text", or a string')
        if text:
            yield text.encode()
