"""Runs with faults on order: a process is slow for as long as a file with its pid says so, wherever its rank is later."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.launch.runs import Run, environment, write_job

MODULE = """
import gc
import os
import random
import time
from pathlib import Path

import torch

from trainrt import Pipeline
from trainrt.checkpoint.store.client import SnapshotClient
from trainrt.training.data import collate as usual
from trainrt.training.objectives import cross_entropy_sum
from trainrt.training.recorder import Recorder

ORDERS = Path({orders!r})
begun = {{}}


def ordered(place):
    try:
        return float((ORDERS / f"{{place}}-{{os.getpid()}}").read_text())
    except (FileNotFoundError, ValueError):
        return 0.0


def once(place):
    seconds = ordered(place)
    (ORDERS / f"{{place}}-{{os.getpid()}}").unlink(missing_ok=True)
    return seconds


def growing(place):
    # So many seconds a second since the order came.
    rate = ordered(place)
    since = begun.setdefault(place, time.monotonic()) if rate else begun.pop(place, 0.0)
    return rate * (time.monotonic() - since) if rate else 0.0


def longer(batch):
    ragged = int(ordered("ragged"))
    times = random.randint(1, ragged) if ragged else int(ordered("long"))
    return {{name: torch.cat([value] * times, dim=1) for name, value in batch.items()}} if times > 1 else batch


def collate(samples):
    time.sleep(ordered("data"))
    return longer(usual(samples))


def busy(seconds):
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def collect(seconds):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        gc.collect()


def loss(model, batch):
    time.sleep(ordered("compute") + once("stall") + growing("drift"))
    busy(ordered("busy"))
    collect(ordered("collect"))
    collect(once("collect_once"))
    return cross_entropy_sum(model(batch["input_ids"]).logits, batch["labels"])


def slow_storage(begin):
    def begin_later(self, step, *, checkpoint=False):
        time.sleep(ordered("snapshot") + (ordered("checkpoint") if checkpoint else 0.0))
        return begin(self, step, checkpoint=checkpoint)
    return begin_later


def other_records(record):
    def of_step(self, step, *, epoch):
        found = record(self, step, epoch=epoch + ordered("clock"))
        return None if ordered("mute") else found
    return of_step


SnapshotClient.begin = slow_storage(SnapshotClient.begin)
Recorder.step = other_records(Recorder.step)
pipeline = Pipeline(loss=loss, collate=collate)
"""


class Injected(Run):
    """A run that takes orders, of one rank a node unless the job says otherwise."""

    @classmethod
    def of(cls, folder: Path, *options: str, **sections: dict[str, Any]) -> Injected:
        (folder / "orders").mkdir()
        (folder / "injected.py").write_text(MODULE.format(orders=str(folder / "orders")))
        sections["run"] = {"steps": 100000, "pipeline": "injected:pipeline", **sections.get("run", {})}
        return cls(folder / "run", write_job(folder / "job.toml", **sections), *options)

    def order(self, place: str, pid: int, amount: float) -> Path:
        """Something of a process is other than usual. Remove the file to end it.

        Seconds a call: compute (asleep), busy, data, collect (garbage), snapshot, checkpoint; once: stall, collect_once. drift:
        seconds a second. long: times as long sequences; ragged: 1 to so many times,
        drawn for each microbatch. clock: seconds that it is ahead. mute: it tells nothing of its steps.
        """
        path = self.directory.parent / "orders" / f"{place}-{pid}"
        path.with_suffix(".new").write_text(str(amount))
        return path.with_suffix(".new").rename(path)

    @contextmanager
    def ordered(self, place: str, amount: float, *ranks: int) -> Iterator[None]:
        """The same of these ranks, for as long as this lasts."""
        pids = self.workers
        paths = [self.order(place, pids[rank], amount) for rank in ranks]
        try:
            yield
        finally:
            for path in paths:
                path.unlink(missing_ok=True)

    @property
    def workers(self) -> dict[int, int]:
        """The pid of each rank."""
        return {rank: pid for (_, rank), pid in self.pids("worker").items() if rank is not None}

    @property
    def said(self) -> list[dict[str, Any]]:
        """The verdicts of diagnosis.json."""
        return self.document("diagnosis").get("verdicts", [])

    def verdict(self, cause: str, as_wanted: Callable[[dict[str, Any]], bool] = lambda _: True) -> dict[str, Any]:
        """The verdict of this cause in diagnosis.json, waited for."""

        def found() -> dict[str, Any] | None:
            return next((verdict for verdict in self.said if verdict["cause"] == cause and as_wanted(verdict)), None)

        verdict: dict[str, Any] = self.until(found, f"a verdict {cause}; {json.dumps(self.document('diagnosis'))}")
        return verdict

    def diagnose(self) -> tuple[int, dict[str, Any]]:
        """The exit status of `trainrt diagnose`, and what it prints."""
        words = [sys.executable, "-m", "trainrt.cli", "diagnose", str(self.directory), "--json"]
        done = subprocess.run(words, capture_output=True, text=True, env=environment(), check=False)
        return done.returncode, json.loads(done.stdout or "{}")


@contextmanager
def pulses(pid: int, *, stopped: float, running: float) -> Iterator[None]:
    """Stop a process from outside again and again, as a quota of the CPU does."""
    over = threading.Event()

    def stop_and_go() -> None:
        while not over.wait(running):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(stopped)
            os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=stop_and_go)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
