"""Ranks that neither end nor go on are found from outside, named, ended, and the job goes on from memory.

One run of three ranks is hung in one way after the other, by orders that its loss function finds in a folder.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.launch.runs import Run, write_job
from trainrt.launch.guard import command, descendants

MODULE = """
import ctypes
import time
from pathlib import Path

import torch
import torch.distributed as dist

from trainrt import Pipeline
from trainrt.training.objectives import cross_entropy_sum

ORDERS = Path({orders!r})


def hold_the_gil():
    ctypes.PyDLL(None).sleep(600)


def stay_away():
    time.sleep(600)


def wait_for_nothing():
    dist.recv(torch.zeros(1), src=(dist.get_rank() + 1) % dist.get_world_size())


def obey():
    for order in (hold_the_gil, stay_away, wait_for_nothing):
        path = ORDERS / f"{{order.__name__}}-{{dist.get_rank()}}"
        if path.exists():
            path.unlink()
            order()
    if (ORDERS / f"always-{{dist.get_rank()}}").exists():
        stay_away()
    # All ranks see the order in the same step, or none does.
    together = torch.tensor(int((ORDERS / "together").exists()))
    dist.all_reduce(together, op=dist.ReduceOp.MIN)
    if together:
        (ORDERS / "together").unlink(missing_ok=True)
        wait_for_nothing()


def loss(model, batch):
    obey()
    return cross_entropy_sum(model(batch["input_ids"]).logits, batch["labels"])


pipeline = Pipeline(loss=loss)
"""
ALLOWED_SECONDS = 3.0
SLOW_MACHINE_SECONDS = 2.0


class Hung(Run):
    """A run that takes orders."""

    def order(self, name: str) -> dict[str, Any]:
        """Have some rank hang; the incident that follows."""
        seen = len(self.lines("incidents"))
        self.until_step(self.step + 12)
        (self.directory.parent / "orders" / name).touch()
        return self.incident(seen)

    def everything(self) -> set[int]:
        """The pids of all processes of this run, Ray's too."""
        words = (self.document("status")["run_id"], str(self.directory))
        roots = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc")))
                 if pid != os.getpid() and any(word in " ".join(command(pid)) for word in words)]  # fmt: skip
        return {*roots, *(below for root in roots for below in descendants(root))} - {os.getpid()}

    def stacks(self, incident: dict[str, Any]) -> str:
        """The page of stacks that the incident's message names."""
        found = re.search(r"stacks: (\S+)$", incident["message"])
        assert found is not None, incident["message"]
        return Path(found[1]).read_text()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hung]:
    folder = tmp_path_factory.mktemp("hangs")
    (folder / "orders").mkdir()
    (folder / "hanging.py").write_text(MODULE.format(orders=str(folder / "orders")))
    job = write_job(
        folder / "job.toml", run={"steps": 100000, "pipeline": "hanging:pipeline"}, cluster={"workers_per_node": 3, "nodes": 1},
    )  # fmt: skip
    run = Hung(folder / "run", job)
    run.launch()
    try:
        run.until_step(5)
        yield run
    finally:
        run.end()


def check(incident: dict[str, Any], *ranks: int) -> None:
    print(incident["detected_seconds"], incident["recovered_seconds"], incident["message"])
    assert (incident["kind"], incident["ranks"], incident["action"]) == ("worker_hang", list(ranks), "restart")
    assert incident["restored_from"] == "memory" and incident["steps_lost"] <= 1
    assert incident["recovered_seconds"] > 0
    assert incident["detected_seconds"] < ALLOWED_SECONDS + SLOW_MACHINE_SECONDS


def test_a_stopped_worker_is_ended_and_its_peers_keep_their_processes(run: Hung) -> None:
    run.until_step(run.step + 12)
    seen, before = len(run.lines("incidents")), run.pids("worker")
    os.kill(before["n0", 1], signal.SIGSTOP)
    incident = run.incident(seen)
    check(incident, 1)
    assert "stopped (SIGSTOP)" in incident["message"]
    run.until(lambda: len(run.pids("worker")) == 3, "three workers")
    after = run.pids("worker")
    assert after["n0", 0] == before["n0", 0] and after["n0", 2] == before["n0", 2]
    assert after["n0", 1] != before["n0", 1]


def test_a_worker_stopped_for_a_moment_is_left_alone(run: Hung) -> None:
    seen, before, step = len(run.lines("incidents")), run.pids("worker"), run.step
    os.kill(before["n0", 1], signal.SIGSTOP)
    time.sleep(1.0)
    os.kill(before["n0", 1], signal.SIGCONT)
    run.until_step(step + 20)
    assert len(run.lines("incidents")) == seen and run.pids("worker") == before


def test_a_paused_machine_is_no_hang(run: Hung) -> None:
    seen, before, step = len(run.lines("incidents")), run.pids("worker"), run.step
    everything = run.everything()
    assert everything >= {entry["pid"] for entry in run.document("cluster")["processes"]}
    for number, seconds in ((signal.SIGSTOP, 4.0), (signal.SIGCONT, 0.0)):
        for pid in everything:
            os.kill(pid, number)
        time.sleep(seconds)
    run.until_step(step + 20)
    assert len(run.lines("incidents")) == seen and run.pids("worker") == before


def test_a_held_gil_does_not_blind_anybody(run: Hung) -> None:
    incident = run.order("hold_the_gil-2")
    check(incident, 2)
    assert "hold_the_gil (hanging.py:" in incident["message"] and "2 ranks wait in" in incident["message"]
    text = run.stacks(incident)
    assert "rank 2: culprit" in text and "ranks 0, 1: waits" in text and "[py-spy]" in text


def test_a_rank_that_never_enters_a_collective_is_named(run: Hung) -> None:
    incident = run.order("stay_away-0")
    check(incident, 0)
    assert "stay_away (hanging.py:" in incident["message"]
    assert (
        "rank 0 (n0) missing from all_reduce(int64 1)" in incident["message"]
        and "waits at obey (hang" in incident["message"]
    )
    document = run.document("diagnosis")
    assert document["state"] == "hung" and document["verdicts"][0]["action"] == "evict"
    assert [one["rank"] for one in document["verdicts"][0]["culprits"]] == [0]


def test_a_rank_alone_in_another_collective_is_the_minority(run: Hung) -> None:
    incident = run.order("wait_for_nothing-1")
    check(incident, 1)
    assert "alone in" in incident["message"] and "recv" in incident["message"]


def test_where_all_wait_in_the_same_collective_all_are_restarted(run: Hung) -> None:
    before = run.pids("worker")
    incident = run.order("together")
    check(incident, 0, 1, 2)
    assert "deadlocked" in incident["message"]
    run.until(lambda: len(run.pids("worker")) == 3, "three workers")
    assert not set(run.pids("worker").values()) & set(before.values())


def test_a_stopped_store_is_no_hang_of_the_workers(run: Hung) -> None:
    seen, workers, store = len(run.lines("incidents")), run.pids("worker"), run.pids("store")["n0", None]
    os.kill(store, signal.SIGSTOP)
    incident = run.incident(seen)
    assert (incident["kind"], incident["nodes"]) == ("store_loss", ["n0"])
    run.until_step(run.step + 5)
    assert run.pids("worker") == workers and run.pids("store")["n0", None] != store


@pytest.mark.campaign
def test_the_same_hang_at_the_same_step_stops_the_job(run: Hung) -> None:
    incident = run.order("always-1")
    assert (incident["kind"], incident["ranks"], incident["action"]) == ("worker_hang", [1], "stop")
    assert run.wait() == 1
    status = run.document("status")
    assert status["state"] == "failed" and "twice at the same step" in status["message"]
    assert "stay_away (hanging.py:" in status["message"]
    assert run.leftovers() == []
