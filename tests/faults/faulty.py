"""Runs that die on order: a user's module whose ranks kill themselves at a chosen place, and helpers to kill the rest.

An order is a file `{place}-{rank}` in a folder; the rank that finds its own removes it and ends by SIGKILL there.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.launch.runs import Run, alive, write_job
from trainrt.checkpoint.inspect import inspect

MODULE = """
import os
import signal
import threading
import time
from pathlib import Path

import torch.distributed as dist

from trainrt import Pipeline
from trainrt.training import loop
from trainrt.training.engines.native import NativeEngine
from trainrt.training.objectives import cross_entropy_sum
from trainrt.training.state import Snapshotter

ORDERS = Path({orders!r})


def ordered(place):
    path = ORDERS / f"{{place}}-{{dist.get_rank()}}"
    if path.exists():
        path.unlink()
        return True
    return False


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def at_start(owner, name, place):
    inner = getattr(owner, name)

    def outer(*arguments, **named):
        if ordered(place):
            die()
        return inner(*arguments, **named)

    setattr(owner, name, outer)


def half_way(owner, name, place, seconds):
    inner = getattr(owner, name)

    def outer(*arguments, **named):
        if ordered(place):
            threading.Timer(seconds, die).start()
        return inner(*arguments, **named)

    setattr(owner, name, outer)


def torn_copy(self, buffer, *arguments, **named):
    if ordered("copy"):
        buffer[: buffer.size // 2] = 77
        die()
    return copy_rest(self, buffer, *arguments, **named)


copy_rest = Snapshotter.copy_rest
Snapshotter.copy_rest = torn_copy
at_start(loop, "report", "report")
at_start(NativeEngine, "_update", "optimizer")
half_way(NativeEngine, "_gather", "collective", 0.001)


def loss(model, batch):
    if ordered("forward"):
        die()
    total, weight = cross_entropy_sum(model(batch["input_ids"]).logits, batch["labels"])
    return (total * float("nan") if ordered("nan") else total), weight


pipeline = Pipeline(loss=loss)
"""
CLOCK = """
import os
import time
from pathlib import Path

set_by, wall = Path({clock!r}), time.time


def shifted():
    return wall() + float(set_by.read_text())


time.time = shifted
"""
ENDLESS = 100000


def faulty_job(folder: Path, *, steps: int, **sections: dict[str, Any]) -> Path:
    """A job whose ranks look for orders, and which is otherwise the same with other clusters and snapshots."""
    (folder / "orders").mkdir(exist_ok=True)
    (folder / "faulty.py").write_text(MODULE.format(orders=str(folder / "orders")))
    return write_job(
        folder / f"job-{steps}.toml",
        run={"steps": steps, "pipeline": "faulty:pipeline"},
        optimizer={"schedule": "constant", "warmup_steps": 2, "non_finite": "rollback"},
        **sections,
    )


class FaultyRun(Run):
    """A run of several nodes with one worker each, and what can be killed of it."""

    def __init__(
        self, folder: Path, *options: str, nodes: int, spares: int, m: int, steps: int = ENDLESS,
        mesh: dict[str, int] | None = None, checkpoints: int = 0,
    ) -> None:  # fmt: skip
        sections = {
            "snapshot": {"parity_shards": m},
            "checkpoint": {"every": checkpoints},
            "parallel": {} if mesh is None else {"mode": "explicit", **mesh},
            "cluster": {"nodes": nodes, "workers_per_node": 1, "spare_nodes": spares, "driver_grace_seconds": 60},
        }
        super().__init__(folder / f"run-{steps}", faulty_job(folder, steps=steps, **sections), *options)
        self._clock = folder / "clock" / "set_by"
        self._clock.parent.mkdir(exist_ok=True)
        (self._clock.parent / "sitecustomize.py").write_text(CLOCK.format(clock=str(self._clock)))
        self.set_clock(0)

    def set_clock(self, seconds: float) -> None:
        """Shift the wall clock of every Python process of this run, against the machine's."""
        new = self._clock.with_suffix(".new")
        new.write_text(str(seconds))
        new.replace(self._clock)

    def environment(self) -> dict[str, str]:
        found = super().environment()
        return {**found, "PYTHONPATH": os.pathsep.join([str(self._clock.parent), found["PYTHONPATH"]])}

    def order(self, place: str, rank: int) -> None:
        (self.directory.parent / "orders" / f"{place}-{rank}").touch()

    def seat(self, rank: int) -> str:
        """The node on which a rank runs now."""
        return next(node for node, held in self.pids("worker") if held == rank)

    def kill_node(self, *nodes: str) -> None:
        """SIGKILL all that runs on nodes, stores and raylets too, before anybody can react."""
        entries = self.document("cluster")["processes"]
        order = ("store", "agent", "worker", "raylet")
        for role in order:
            for entry in entries:
                if entry["node"] in nodes and entry["role"] == role:
                    # A worker may have gone with its agent.
                    with suppress(ProcessLookupError):
                        os.kill(entry["pid"], signal.SIGKILL)

    def rot(self, node: str, kind: str) -> None:
        """Flip a bit in the middle of every slot (of `rank`s or `parity`) on a node. Nobody may be writing there."""
        run_id = self.document("status")["run_id"]
        slots = list(Path(f"/dev/shm/trainrt-{run_id}/{node}").glob(f"{kind}*-slot-*"))
        assert slots
        for path in slots:
            with path.open("r+b") as file:
                file.seek(path.stat().st_size // 2)
                byte = file.read(1)[0]
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte ^ 0x10]))

    def settled(self, *, protection: str = "full") -> None:
        """Wait until all ranks run, steps are completed and the protection is as it should be."""

        def all_alive() -> bool:
            workers = self.pids("worker").values()
            return len(workers) == self.document("status")["world_size"] and all(map(alive, workers))

        self.until(lambda: self.document("status")["protection"] == protection, f"protection {protection}")
        self.until(all_alive, "all workers")

    def fault(self, *, settle: str = "full") -> tuple[int, int]:
        """To be called before a fault: waits for full protection; the number of incidents and a step."""
        self.settled(protection=settle)
        self.until_step(self.step + 3)
        return len(self.lines("incidents")), self.step


def final(run: Run) -> dict[tuple[str, str], str]:
    """Digests of the state with which a run ended."""
    (path,) = sorted((run.directory / "checkpoints").glob("step-*"))[-1:]
    return {(tensor["name"], tensor["role"]): tensor["digest"] for tensor in inspect(path)["tensors"]}


def losses(run: Run) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in run.lines("metrics")}


def compare_with_undisturbed(run: FaultyRun) -> None:
    """The same ranks in the same mesh on one node, with nothing killed and no snapshots, to the same step."""
    step = run.document("status")["step"]
    assert [line["step"] for line in run.lines("metrics")] == list(range(1, step + 1)), "each step stands once"
    mesh = run.document("plan")["mesh"]
    job = faulty_job(
        run.directory.parent, steps=step, snapshot={"every": 0}, checkpoint={"every": 0},
        parallel={"mode": "explicit", **mesh},
        cluster={"nodes": 1, "workers_per_node": run.document("plan")["world_size"]},
    )  # fmt: skip
    other = Run(run.directory.parent / f"run-{step}", job).launch()
    assert other.wait(seconds=1200) == 0, other.text
    assert other.lines("incidents") == []
    assert losses(run) == losses(other), "the losses differ from those of an undisturbed run"
    assert final(run) == final(other), "the final state differs from that of an undisturbed run"


def expect(incident: dict[str, Any], **facts: Any) -> None:
    """One fault, one incident, as it should be; at most one completed step is done again."""
    found = {key: incident[key] for key in facts}
    assert found == facts, incident
    assert incident["steps_lost"] <= 1, incident
