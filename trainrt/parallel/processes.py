"""Ranks of this machine, each a process of a module: the caller itself stays free of process groups."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def run_ranks(module: str, folder: Path, ranks: int, *arguments: str, seconds: float) -> None:
    """Run `python -m module FOLDER ARGUMENTS RANK` for every rank, with logs in the folder, and wait for all.

    Raises TimeoutError; how a rank ended is to be seen by what it left in the folder.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    processes = []
    for rank in range(ranks):
        # A file, not a pipe: a rank that says much must not wait for one that is read later.
        with _log(folder, rank).open("wb") as file:
            command = [sys.executable, "-m", module, str(folder), *arguments, str(rank)]
            processes.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment))
    try:
        for process in processes:
            process.wait(seconds)
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"no end within {seconds} s") from error
    finally:
        for process in processes:
            process.kill()
            process.wait()


def last_word(folder: Path, ranks: int) -> str:
    """The last line of the first rank that said anything."""
    for rank in range(ranks):
        lines: Sequence[str] = _log(folder, rank).read_text(errors="replace").strip().splitlines()
        if lines:
            return lines[-1]
    return "no word"


def _log(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.log"
