"""Launches in tests: the real command as a subprocess, its run directory, and the processes it names."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
PATIENCE_SECONDS = 90.0

SIZES = {"layers": 1, "hidden_size": 32, "heads": 2, "kv_heads": 1, "intermediate_size": 32, "max_position": 64}
TINY: dict[str, dict[str, Any]] = {
    "run": {"name": "tiny", "steps": 500},
    "model": {"config": SIZES},
    "moe": {"experts": 2, "top_k": 1},
    "data": {"sequence_length": 32, "global_batch": 4, "microbatch": 1},
    "optimizer": {"warmup_steps": 2},
    "evaluation": {"samples": 0},
    "cluster": {"nodes": 2, "workers_per_node": 1, "device": "cpu"},
    "diagnostics": {"dashboard": False},
}


def write_job(path: Path, **sections: dict[str, Any]) -> Path:
    """A job of one tiny model on a small corpus beside it; `sections` add to its tables."""
    import tomli_w

    corpus = path.parent / "corpus.txt"
    if not corpus.exists():
        corpus.write_text("".join(f"{n} times {n} is {n * n}.\n" for n in range(3000)))
    document = {name: {**values, **sections.get(name, {})} for name, values in TINY.items()}
    document.update({name: values for name, values in sections.items() if name not in TINY})
    document["data"].setdefault("source", "corpus.txt")
    path.write_text(tomli_w.dumps(document))
    return path


class Run:
    """One run directory and the launches into it."""

    def __init__(self, directory: Path, job: Path, *options: str) -> None:
        self.directory, self.job, self.options = directory, job, options
        self.process: subprocess.Popen[bytes] | None = None
        self.output = directory.with_suffix(".out")

    def launch(self, *options: str) -> Run:
        words = [sys.executable, "-m", "trainrt.cli", "launch", str(self.job), "--run-dir", str(self.directory)]
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                [*words, *self.options, *options], stdout=output, stderr=output, env=self.environment()
            )
        return self

    def environment(self) -> dict[str, str]:
        """Of the launch and all that it starts."""
        return environment()

    def wait(self, *, seconds: float = PATIENCE_SECONDS) -> int:
        assert self.process is not None
        return self.process.wait(seconds)

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    @property
    def text(self) -> str:
        return self.output.read_text()

    def document(self, name: str) -> dict[str, Any]:
        try:
            return json.loads((self.directory / f"{name}.json").read_text())
        except FileNotFoundError:
            return {}

    def lines(self, name: str) -> list[dict[str, Any]]:
        try:
            text = (self.directory / f"{name}.jsonl").read_text()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    @property
    def step(self) -> int:
        return max((line["step"] for line in self.lines("metrics")), default=0)

    def until(self, holds: Callable[[], Any], what: str) -> Any:
        """Wait for a fact of the run directory; the launch's output where it does not come."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            found = holds()
            if found:
                return found
            time.sleep(0.05)
        raise AssertionError(f"{what}: {self.document('status')}\n{self.text}")

    def until_step(self, step: int) -> None:
        self.until(lambda: self.step >= step, f"step {step}")

    def pids(self, role: str) -> dict[tuple[str, int | None], int]:
        processes = self.document("cluster")["processes"]
        return {(entry["node"], entry["rank"]): entry["pid"] for entry in processes if entry["role"] == role}

    @property
    def port(self) -> str:
        """The port of the Ray head."""
        return json.loads((self.directory / ".cluster" / "record.json").read_text())["address"].rpartition(":")[2]

    def kill(self, role: str, node: str, rank: int | None = None) -> None:
        os.kill(self.pids(role)[node, rank], signal.SIGKILL)

    def incident(self, number: int) -> dict[str, Any]:
        """The n-th incident, waited for."""
        return self.until(lambda: (self.lines("incidents")[number:] or [None])[0], f"incident {number}")

    def end(self) -> None:
        """Whatever the test left running."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            time.sleep(0.2)
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def processes(self) -> dict[int, str]:
        """Those that have this run's id or directory on their command line."""
        run_id = self.document("status")["run_id"]
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    words = (entry / "cmdline").read_bytes().decode(errors="replace")
                except OSError:
                    continue
                if run_id in words or str(self.directory) in words:
                    found[int(entry.name)] = words.replace("\0", " ")
        return found

    def leftovers(self) -> list[str]:
        """Processes and files outside of the run directory that belong to this run."""
        run_id = self.document("status")["run_id"]
        files = [str(path) for place in ("/dev/shm", "/tmp") for path in Path(place).glob(f"trainrt-{run_id}*")]
        return [*files, *self.processes().values()]


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "COLUMNS": "200"}


def alive(pid: int) -> bool:
    from trainrt.launch.guard import alive as check

    return check(pid)
