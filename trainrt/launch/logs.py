"""Workers' logs on the driver's terminal: each line once, with rank and node.

The monitor tails `RUN_DIR/logs/rank-*.log`, which all hosts share. The same line from several ranks is
shown for the first of them. A traceback is held back until its error has been reported, so that a
user's exception is seen once: the driver's message names it, the log keeps its traceback.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

PERIOD_SECONDS = 0.1
SAME_LINE_SECONDS = 5.0
HOLD_SECONDS = 1.5
TRACEBACK = "Traceback (most recent call last):"


@dataclass(slots=True)
class Tail:
    """The unread part of one log."""

    path: Path
    rank: int
    offset: int
    partial: bytes = b""
    held: list[str] = field(default_factory=list)
    held_since: float = 0.0
    closed: bool = False

    def read(self) -> list[str]:
        """The whole lines since the last read."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                data = file.read()
        except OSError:
            return []
        self.offset += len(data)
        *lines, self.partial = (self.partial + data).split(b"\n")
        return [line.decode(errors="replace").rstrip("\r") for line in lines]


class LogMonitor:
    """A thread that prints what is new in the logs. `node_of` says where a rank is."""

    def __init__(self, logs: Path, *, write: Callable[[str], None], node_of: Callable[[int], str | None]) -> None:
        self._logs, self._write, self._node_of = logs, write, node_of
        self._tails: dict[Path, Tail] = {}
        self._shown: dict[str, tuple[float, int]] = {}
        self._reported: list[str] = []
        self._lock = threading.Lock()
        self._over = threading.Event()
        # What an earlier driver left in the logs has been shown by it.
        self._scan(from_end=True)
        self._thread = threading.Thread(target=self._run, name="logs", daemon=True)
        self._thread.start()

    def report(self, message: str) -> None:
        """An error has been shown by the driver: tracebacks that end with it need not be."""
        with self._lock:
            self._reported.append(message)

    def close(self) -> None:
        """Print what is left and stop."""
        self._over.set()
        self._thread.join()
        with self._lock:
            self._turn(final=True)

    def _run(self) -> None:
        while not self._over.wait(PERIOD_SECONDS):
            with self._lock:
                self._turn()

    def _scan(self, *, from_end: bool = False) -> None:
        for path in self._logs.glob("rank-*.log"):
            if path not in self._tails:
                rank = path.stem.removeprefix("rank-")
                if rank.isdigit():
                    self._tails[path] = Tail(path, int(rank), path.stat().st_size if from_end else 0)

    def _turn(self, *, final: bool = False) -> None:
        self._scan()
        for tail in sorted(self._tails.values(), key=lambda tail: tail.rank):
            for line in tail.read():
                self._take(tail, line)
            if tail.held and (final or time.monotonic() - tail.held_since > HOLD_SECONDS):
                self._release(tail)

    def _take(self, tail: Tail, line: str) -> None:
        """Print a line, or hold it where it is part of a traceback (chained ones included)."""
        if line.strip() == TRACEBACK:
            if not tail.held:
                tail.held_since = time.monotonic()
            tail.held.append(line)
            tail.closed = False
        elif tail.held and (not tail.closed or not line.strip() or _chains(line)):
            tail.held.append(line)
            if line.strip() and not line.startswith(" "):
                tail.closed = not _chains(line)
        else:
            if tail.held:
                self._release(tail)
            self._print(tail.rank, line)

    def _release(self, tail: Tail) -> None:
        """The traceback is whole: print it unless the driver has reported its error."""
        text = "\n".join(tail.held)
        if not any(message in text for message in self._reported):
            for line in tail.held:
                self._print(tail.rank, line)
        tail.held = []

    def _print(self, rank: int, line: str) -> None:
        at = time.monotonic()
        when, by = self._shown.get(line, (-SAME_LINE_SECONDS, rank))
        if by != rank and at - when < SAME_LINE_SECONDS:
            return
        self._shown[line] = (at, rank)
        if len(self._shown) > 10000:
            self._shown = {k: v for k, v in self._shown.items() if at - v[0] < SAME_LINE_SECONDS}
        node = self._node_of(rank)
        self._write(f"[rank {rank}{f' {node}' if node else ''}] {line}")


def _chains(line: str) -> bool:
    return line.startswith(("During handling of the above exception", "The above exception was the direct cause"))
