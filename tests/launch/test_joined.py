"""Launches on a cluster that runs already: separate `ray start` processes, which the runs leave as they were."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.launch.cluster import RayCluster
from tests.launch.runs import Run, alive, environment, write_job
from trainrt.checkpoint.inspect import inspect
from trainrt.launch.cluster import free_port
from trainrt.launch.guard import descendants

HELPER = """
import torch

def nll(model, batch):
    logits = model(batch["input_ids"]).logits
    labels = batch["labels"]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return losses, (labels >= 0).sum()
"""
MODULE = """
from pathlib import Path

import my_helper
from trainrt import Pipeline

def loss(model, batch):
    if Path(BOOM).exists():
        raise ValueError("the user's mistake")
    return my_helper.nll(model, batch)

print("module from", __file__)
pipeline = Pipeline(loss=loss)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    with RayCluster(tmp_path_factory.mktemp("ray")).running(nodes=2) as made:
        yield made


@pytest.fixture
def address(cluster: RayCluster) -> str:
    return cluster.address


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A job whose module, with a helper beside it, lies in the job's directory and nowhere else."""
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "my_helper.py").write_text(HELPER)
    (folder / "my_module.py").write_text(MODULE.replace("BOOM", repr(str(tmp_path / "boom"))))
    return write_job(folder / "job.toml", run={"pipeline": "my_module:pipeline", "steps": 400})


def test_the_users_module_travels_and_its_exception_is_told_once(address: str, job: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", job, "--address", address).launch()
    try:
        run.until_step(5)
        sources = [line for line in run.text.splitlines() if "module from" in line and line.startswith("[rank ")]
        assert len(sources) == 1 and sources[0].startswith(("[rank 0 n0]", "[rank 1 n1]"))
        assert str(job.parent) not in sources[0], "workers import what was sent, not what lies on this disk"
        run.kill("worker", "n1", 1)
        assert run.incident(0)["restored_from"] == "memory"
        (tmp_path / "boom").touch()
        assert run.wait() == 1
    finally:
        run.end()
    assert run.text.count("the user's mistake") == 1
    last = run.text.splitlines()[-1]
    assert "n0" in last and "ValueError: the user's mistake (my_module.py:9 in loss)" in last
    assert "Traceback (most recent call last)" in (run.directory / "logs" / "rank-00000.log").read_text()
    assert "Traceback" not in run.text
    kinds = [(incident["kind"], incident["action"]) for incident in run.lines("incidents")]
    assert kinds == [("worker_exit", "restart"), ("user_error", "stop")]
    assert run.leftovers() == []


@pytest.mark.campaign
def test_a_detached_run_is_watched_and_stopped_and_gives_its_nodes_back(
    address: str, job: Path, tmp_path: Path
) -> None:
    run = Run(tmp_path / "run", job, "--address", address).launch("--detach")
    assert run.wait() == 0
    driver = run.pids("driver")[None, None]
    assert alive(driver)
    status = subprocess.run(
        [sys.executable, "-m", "trainrt.cli", "status", str(run.directory), "--json"],
        env=environment(), capture_output=True, check=True,
    )  # fmt: skip
    assert json.loads(status.stdout)["state"] == "running"
    subprocess.run([sys.executable, "-m", "trainrt.cli", "stop", str(run.directory)], env=environment(), check=True)
    run.until(lambda: not alive(driver), "the end of the driver")
    status = run.document("status")
    assert status["state"] == "interrupted"
    assert (run.directory / "checkpoints" / f"step-{status['step']:08d}" / "COMMIT").exists()
    assert run.leftovers() == []


@pytest.mark.campaign
def test_stop_ends_what_a_dead_driver_left(address: str, job: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", job, "--address", address).launch()
    try:
        run.until_step(2)
        processes = [entry["pid"] for entry in run.document("cluster")["processes"]]
        run.signal(signal.SIGKILL)
        run.wait()
        subprocess.run([sys.executable, "-m", "trainrt.cli", "stop", str(run.directory)], env=environment(), check=True)
        run.until(lambda: not any(alive(pid) for pid in processes), "the end of agents and stores")
        run.until(lambda: run.leftovers() == [], "nothing left")
    finally:
        run.end()


def test_a_cluster_without_room_or_without_an_answer_is_named(address: str, job: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", job, "--address", f"127.0.0.1:{free_port()}").launch()
    assert run.wait() == 2
    assert "cluster.address" in run.text and "Traceback" not in run.text


def lose(cluster: RayCluster, run: Run, node: subprocess.Popen[bytes], *, left: int) -> dict[str, Any]:
    """SIGKILL a node, the run's store on it too; returns the incident, after protection is full again."""
    before = len(run.lines("incidents"))
    name = next(name for name, _ in run.pids("agent") if run.pids("agent")[name, None] in descendants(node.pid))
    os.kill(run.pids("store")[name, None], signal.SIGKILL)
    cluster.kill(node)
    incident = run.until(lambda: run.lines("incidents")[before:], f"{name} is lost")[0]
    assert run.document("status")["world_size"] == left and run.document("status")["protection"] == "degraded"
    return incident


@pytest.mark.campaign
def test_a_job_loses_nodes_and_gets_others_and_ends_as_if_undisturbed(cluster: RayCluster, tmp_path: Path) -> None:
    """4 -> 3 -> 2 -> 4 ranks with `run.deterministic`, bit for bit a run on one."""
    keys: dict[str, Any] = {"optimizer": {"warmup_steps": 2, "schedule": "constant"}, "checkpoint": {"every": 0}}
    nodes = {"nodes": 4, "workers_per_node": 1, "device": "cpu"}
    mesh = {"mode": "explicit", "fsdp": 4}
    sections = {"run": {"steps": 100000, "deterministic": True}, "cluster": nodes, "parallel": mesh, **keys}
    run = Run(tmp_path / "run", write_job(tmp_path / "job.toml", **sections), "--address", cluster.address)
    third, fourth = cluster.add(), cluster.add()
    run.launch()
    try:
        run.until_step(5)
        assert run.document("status")["world_size"] == 4
        for node, left in ((third, 3), (fourth, 2)):
            lost = lose(cluster, run, node, left=left)
            assert (lost["kind"], lost["action"], lost["restored_from"]) == ("node_loss", "shrink", "parity")
            assert lost["steps_lost"] <= 1
            run.until(lambda: run.document("status")["step"] > lost["step"] + 5, "it trains on")  # noqa: B023
        cluster.add()
        cluster.add()
        again = {"state": "running", "world_size": 4, "protection": "full"}
        run.until(lambda: again.items() <= run.document("status").items(), "it has grown and is protected")
        grown = [incident for incident in run.lines("incidents") if incident["action"] == "grow"]
        assert {(i["steps_lost"], i["restored_from"]) for i in grown} == {(0, "memory")}
        run.until_step(run.document("status")["step"] + 5)
        run.signal(signal.SIGTERM)
        assert run.wait() == 75, run.text
    finally:
        run.end()
    ours = run.lines("metrics")
    assert [line["step"] for line in ours] == list(range(1, len(ours) + 1)), "each step stands once"
    assert {line["world_size"] for line in ours} == {4, 3, 2}

    single = {"nodes": 1, "workers_per_node": 1, "device": "cpu"}
    sections = {"run": {"steps": len(ours), "deterministic": True}, "cluster": single, "snapshot": {"every": 0}, **keys}
    reference = Run(tmp_path / "reference", write_job(tmp_path / "reference.toml", **sections)).launch()
    assert reference.wait() == 0, reference.text
    same = ("step", "loss", "grad_norm", "samples_digest")
    theirs = reference.lines("metrics")
    assert [[line[key] for key in same] for line in ours] == [[line[key] for key in same] for line in theirs]
    assert final_digests(run, len(ours)) == final_digests(reference, len(ours))


def final_digests(run: Run, step: int) -> dict[tuple[str, str], str]:
    tensors = inspect(run.directory / "checkpoints" / f"step-{step:08d}")["tensors"]
    return {(tensor["name"], tensor["role"]): tensor["digest"] for tensor in tensors}
