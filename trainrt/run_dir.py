"""The run directory: every file a run leaves for people and tools (docs/reference/run_directory.md).

One writer per file: the driver writes everything but `logs/` and `events/` (each rank its own),
`experts.json` and
`strategies.json` (rank 0) and `checkpoints/` (the stores). Readers may come at any moment, so documents are replaced
atomically and lines are appended whole.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainrt.errors import RunDirError


class RunDir:
    """Paths, reads and writes of one run directory."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        self.config = self.path / "config.toml"
        self.plan = self.path / "plan.json"
        self.status = self.path / "status.json"
        self.cluster = self.path / "cluster.json"
        self.metrics = self.path / "metrics.jsonl"
        self.incidents = self.path / "incidents.jsonl"
        self.experts = self.path / "experts.json"
        self.strategies = self.path / "strategies.json"
        self.diagnosis = self.path / "diagnosis.json"
        self.events = self.path / "events"
        self.summaries = self.events / "summaries.bin"
        self.seats = self.events / "seats.jsonl"
        self.links = self.events / "links.jsonl"
        # Written by whoever wants the events of steps to come: {"first": step, "last": step}.
        self.window = self.events / "window"
        self.checkpoints = self.path / "checkpoints"
        self.logs = self.path / "logs"
        self.stop_request = self.path / "stop"
        self.evict_request = self.path / "evict"
        # Rank 0 writes each metrics line here before it reports it, so that none goes with its node.
        self.metrics_journal = self.path / ".metrics.jsonl"
        self._lock_fd: int | None = None

    def __str__(self) -> str:
        return str(self.path)

    def create(self) -> None:
        """Make the directory and its folders. Raises RunDirError where that is not possible."""
        try:
            for folder in (self.path, self.events, self.checkpoints, self.logs):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunDirError(f"run.directory = {self.path}: {error.strerror}") from error

    def log(self, rank: int) -> Path:
        return self.logs / f"rank-{rank:05d}.log"

    def stack_dump(self, rank: int) -> Path:
        """Where a rank writes its stacks when it is sent SIGUSR1."""
        return self.path / ".cluster" / f"stacks-{rank:05d}"

    def stacks(self, incarnation: int) -> Path:
        """The stacks of all ranks when one of this incarnation hung."""
        return self.logs / f"stacks-{incarnation}.txt"

    def events_of(self, rank: int) -> Path:
        return self.events / f"rank-{rank:05d}.jsonl"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}"

    # The lock: held by the driver for as long as the run is live; death frees it.

    def lock(self) -> None:
        """Take the directory for this process. Raises RunDirError while another driver holds it."""
        fd = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(fd, 64, 0).decode(errors="replace").strip()
            os.close(fd)
            raise RunDirError(
                f"run.directory = {self.path} is in use by a live run (driver process {holder or 'unknown'}); "
                "stop it with `trainrt stop`, or choose another --run-dir"
            ) from error
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
        self._lock_fd = fd

    def unlock(self) -> None:
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def locked(self) -> bool:
        """Whether a live driver holds the directory."""
        try:
            fd = os.open(self.path / ".lock", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    # Documents and lines.

    def read_status(self) -> dict[str, Any] | None:
        return read_json(self.status)

    def read_cluster(self) -> dict[str, Any] | None:
        return read_json(self.cluster)

    def read_metrics(self) -> list[dict[str, Any]]:
        return list(read_lines(self.metrics))

    def read_incidents(self) -> list[dict[str, Any]]:
        return list(read_lines(self.incidents))

    def take_journal(self) -> int:
        """Append the metrics lines that were journalled but never arrived, and clear the journal.

        Of a step that was journalled twice (before its snapshot and after), the later line counts.
        Only while no worker runs. Returns the newest step of all metrics lines.
        """
        arrived = {(line["step"], line["incarnation"]) for line in read_lines(self.metrics)}
        journalled = {(line["step"], line["incarnation"]): line for line in read_lines(self.metrics_journal)}
        for key, line in journalled.items():
            if key not in arrived:
                arrived.add(key)
                append_line(self.metrics, line)
        self.metrics_journal.unlink(missing_ok=True)
        return max((step for step, _ in arrived), default=0)

    def compact_metrics(self) -> None:
        """Keep, of the lines that were replayed, the one of the highest incarnation per step."""
        latest: dict[int, dict[str, Any]] = {}
        for line in read_lines(self.metrics):
            held = latest.get(line["step"])
            if held is None or line["incarnation"] >= held["incarnation"]:
                latest[line["step"]] = line
        replace(self.metrics, "".join(json.dumps(latest[step]) + "\n" for step in sorted(latest)))


def read_text(path: Path) -> str:
    """Empty where there is no such file."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def read_json(path: Path) -> dict[str, Any] | None:
    """The document at `path`, or None where there is none."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a JSONL file; what a killed writer left torn is left out."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return
    for line in text.splitlines(keepends=True):
        if line.endswith("\n") and line.strip():
            with suppress(json.JSONDecodeError):
                yield json.loads(line)


def replace(path: Path, text: str) -> None:
    """Replace a file atomically: a reader sees the old text or the new one, never a part."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text)
    os.replace(scratch, path)


def write_json(path: Path, document: dict[str, Any]) -> None:
    replace(path, json.dumps(document, indent=1) + "\n")


def append_line(path: Path, document: dict[str, Any]) -> None:
    """Append one line in one write. A torn last line of a killed writer is closed first."""
    line = json.dumps(document).encode() + b"\n"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        size = os.fstat(fd).st_size
        if size and os.pread(fd, 1, size - 1) != b"\n":
            line = b"\n" + line
        os.write(fd, line)
    finally:
        os.close(fd)


def now() -> float:
    """Seconds since the epoch, as written in every file of the run directory."""
    return time.time()
