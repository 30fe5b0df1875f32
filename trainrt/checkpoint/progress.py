"""How far long work is: a bar with rate and remaining time on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import re
import sys
import time
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from trainrt.errors import ConfigError

LINE_SECONDS = 5.0
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?i?B?)", re.IGNORECASE)
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def memory_bytes(text: str) -> int:
    """Bytes of a size such as 2GiB or 500MB. Raises ConfigError for anything else."""
    found = SIZE.fullmatch(text.strip())
    if found is None:
        raise ConfigError(f"--memory {text}: allowed: a number with B, KB, MB, GB, KiB, MiB or GiB")
    return int(float(found[1]) * UNITS[found[2].upper().removesuffix("B")])


class Bar:
    """On stderr; stdout belongs to results."""

    def __init__(self, what: str, *, quiet: bool = False) -> None:
        self._what, self._quiet, self._told, self._began = what, quiet, 0.0, time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> Bar:
        if not self._quiet and sys.stderr.isatty():
            from rich.console import Console

            columns = (TextColumn(self._what), BarColumn(), TaskProgressColumn(show_speed=True), MofNCompleteColumn())
            self._bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
            self._task = self._bar.add_task(self._what, total=None)
            self._bar.start()
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, total: int) -> None:
        """So many units of so many are done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total)
        elif not self._quiet and (time.monotonic() - self._told > LINE_SECONDS or done == total):
            self._told = time.monotonic()
            seconds = self._told - self._began
            print(f"{self._what}: {done} of {total} units, {seconds:.0f} s", file=sys.stderr, flush=True)
