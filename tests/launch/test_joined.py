"""Launches on a cluster that runs already: separate `ray start` processes, which the runs leave as they were."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.runs import Run, alive, environment, write_job
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
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Two nodes of separate `ray start --block` processes, without authentication, as by hand."""
    port = free_port()
    scratch = tmp_path_factory.mktemp("ray")
    common = ["--block", "--disable-usage-stats", "--dashboard-agent-listen-port", "0", "--num-cpus", "2"]
    common += ["--object-store-memory", str(80 * 2**20), "--node-ip-address", "127.0.0.1"]
    head = ["--head", "--port", str(port), "--include-dashboard", "false", "--ray-client-server-port", str(free_port())]
    places = [head, ["--address", f"127.0.0.1:{port}"]]
    short = Path(f"/tmp/joined-{os.getpid()}")
    nodes = []
    for index, place in enumerate(places):
        with (scratch / f"{index}.log").open("w") as log:
            words = [sys.executable, "-m", "ray.scripts.scripts", "start", *place, *common, "--temp-dir", str(short)]
            started = subprocess.Popen(
                words,
                env={**environment(), "RAY_AUTH_MODE": "disabled"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            nodes.append(started)
        time.sleep(2)
    os.environ["RAY_AUTH_MODE"] = "disabled"
    yield f"127.0.0.1:{port}"
    del os.environ["RAY_AUTH_MODE"]
    for node in nodes:
        below = descendants(node.pid)
        for pid in [*below, node.pid]:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        node.wait()
    subprocess.run(["rm", "-rf", str(short)], check=True)


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
