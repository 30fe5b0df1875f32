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


class RayCluster:
    """Nodes of separate `ray start --block` processes, without authentication, as by hand."""

    def __init__(self, scratch: Path) -> None:
        self.port, self.scratch = free_port(), scratch
        self.short = Path(f"/tmp/joined-{os.getpid()}")
        self.nodes: list[subprocess.Popen[bytes]] = []

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def add(self) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        words += ["--dashboard-agent-listen-port", "0", "--num-cpus", "2", "--temp-dir", str(self.short)]
        words += ["--object-store-memory", str(80 * 2**20), "--node-ip-address", "127.0.0.1"]
        head = ["--head", "--port", str(self.port), "--include-dashboard", "false"]
        head += ["--ray-client-server-port", str(free_port())]
        words += ["--address", self.address] if self.nodes else head
        environ = {**environment(), "RAY_AUTH_MODE": "disabled"}
        with (self.scratch / f"{len(self.nodes)}.log").open("w") as log:
            self.nodes.append(subprocess.Popen(words, env=environ, stdout=log, stderr=log, start_new_session=True))
        time.sleep(2)
        return self.nodes[-1]

    def kill(self, node: subprocess.Popen[bytes]) -> None:
        """SIGKILL all processes of a node, those of runs too."""
        for pid in [*descendants(node.pid), node.pid]:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        node.wait()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    made = RayCluster(tmp_path_factory.mktemp("ray"))
    made.add()
    made.add()
    os.environ["RAY_AUTH_MODE"] = "disabled"
    yield made
    del os.environ["RAY_AUTH_MODE"]
    for node in made.nodes:
        made.kill(node)
    subprocess.run(["rm", "-rf", str(made.short)], check=True)


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


def test_a_job_shrinks_when_a_node_is_lost_and_grows_when_one_comes(cluster: RayCluster, tmp_path: Path) -> None:
    job = write_job(tmp_path / "job.toml", run={"steps": 100000}, checkpoint={"every": 0})
    run = Run(tmp_path / "run", job, "--address", cluster.address).launch()
    second = cluster.nodes[1]
    try:
        run.until_step(5)
        assert run.document("status")["world_size"] == 2
        # Not the head's node: its cluster would go with it.
        name = next(node for node, _ in run.pids("agent") if run.pids("agent")[node, None] in descendants(second.pid))
        os.kill(run.pids("store")[name, None], signal.SIGKILL)
        cluster.kill(second)
        lost = run.until(lambda: [i for i in run.lines("incidents") if i["kind"] == "node_loss"], "a node is lost")[0]
        assert (lost["action"], lost["restored_from"]) == ("shrink", "parity") and lost["steps_lost"] <= 1
        assert run.document("status")["world_size"] == 1 and run.document("status")["protection"] == "degraded"
        cluster.add()
        grown = run.until(lambda: [i for i in run.lines("incidents") if i["action"] == "grow"], "it grows again")[0]
        assert (grown["nodes"], grown["steps_lost"], grown["restored_from"]) == (["n2"], 0, "memory")
        run.until(lambda: run.document("status")["protection"] == "full", "full protection")
        assert run.document("status")["world_size"] == 2 and len(run.pids("worker")) == 2
    finally:
        run.signal(signal.SIGTERM)
        run.end()
    steps = [line["step"] for line in run.lines("metrics")]
    assert steps == list(range(1, len(steps) + 1)), "each step stands once"
