"""Real launches for tests: the command as a process, its run directory, its workers' pids."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainrt.config import JobConfig, to_toml
from trainrt.run_dir import RunDir


def write_job(folder: Path, config: JobConfig) -> Path:
    """The config as a file of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "job.toml"
    path.write_text(to_toml(config))
    return path


@contextmanager
def launched(job: Path, run_dir: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """`trainrt launch` as a process; ended at the end, with everything it started."""
    command = [sys.executable, "-m", "trainrt.cli", "launch", str(job), "--run-dir", str(run_dir), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=job.parent)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()


def finish(process: subprocess.Popen[str], *, timeout: float = 180) -> str:
    """Wait for a launch; its output."""
    output, _ = process.communicate(timeout=timeout)
    return output


def wait_for(condition: Callable[[], Any], what: str, *, timeout: float = 90) -> Any:
    """The first true value of a condition, polled."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"no {what} within {timeout} s")


def wait_step(run_dir: RunDir, step: int) -> None:
    """Until the metrics hold a step."""
    wait_for(lambda: any(line["step"] >= step for line in run_dir.read_metrics()), f"step {step}")


def pid_of(run_dir: RunDir, role: str, rank: int | None = None, node: str | None = None) -> int:
    """The pid of one process of a run, by cluster.json."""
    for process in (run_dir.read_cluster() or {"processes": []})["processes"]:
        if process["role"] == role and rank in (None, process["rank"]) and node in (None, process["node"]):
            return int(process["pid"])
    raise AssertionError(f"no {role} of rank {rank} on {node} in cluster.json")


def kill(run_dir: RunDir, role: str, rank: int | None = None, node: str | None = None) -> int:
    """SIGKILL one process of a run."""
    pid = pid_of(run_dir, role, rank, node)
    os.kill(pid, signal.SIGKILL)
    return pid


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def pids(run_dir: RunDir) -> list[int]:
    return [int(process["pid"]) for process in (run_dir.read_cluster() or {"processes": []})["processes"]]
