"""The Ray head is killed: an embedded cluster is started anew by itself, a joined one when its owner brings it back."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.cluster import RayCluster
from tests.launch.runs import Run, write_job
from trainrt.launch.cluster import free_port
from trainrt.launch.guard import command
from trainrt.launch.head import HeadWatch


def kill_head(port: int) -> None:
    """SIGKILL the global control service, and nothing beside it."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    (server,) = (pid for pid in pids if f"--gcs_server_port={port}" in command(pid))
    os.kill(server, signal.SIGKILL)


@pytest.mark.campaign
def test_an_embedded_cluster_is_started_anew_and_no_step_is_lost(tmp_path: Path) -> None:
    job = write_job(tmp_path / "job.toml", run={"steps": 150}, checkpoint={"every": 0})
    run = Run(tmp_path / "run", job).launch()
    assert run.process is not None
    try:
        run.until_step(10)
        kill_head(int(run.port))
        incident = run.incident(0)
        assert (incident["kind"], incident["action"], incident["restored_from"]) == ("node_loss", "restart", "memory")
        assert "the Ray head" in incident["message"] and incident["steps_lost"] <= 1
        assert run.pids("driver") == {(None, None): run.process.pid}, "the command goes on in its process"
        assert run.wait() == 0, run.text
    finally:
        run.end()
    assert [line["step"] for line in run.lines("metrics")] == list(range(1, 151))
    assert len(run.lines("incidents")) == 1, "one fault, one incident"
    assert run.leftovers() == []


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[RayCluster]:
    with RayCluster(tmp_path).running(nodes=2) as made:
        yield made


@pytest.mark.campaign
def test_a_joined_cluster_may_be_started_anew_on_the_same_hosts(cluster: RayCluster, tmp_path: Path) -> None:
    job = write_job(tmp_path / "job.toml", run={"steps": 100000}, checkpoint={"every": 0})
    run = Run(tmp_path / "run", job, "--address", cluster.address).launch()
    try:
        run.until_step(10)
        kill_head(cluster.port)
        assert run.wait() == 1
        assert "the Ray head" in run.text and "goes on from memory" in run.text
        status, stores = run.document("status"), set(run.pids("store").values())
        assert status["state"] == "failed" and status["step"] >= 10
        for node in cluster.nodes:
            cluster.kill(node, but=stores)
        cluster.nodes.clear()
        cluster.add()
        cluster.add()
        run.launch()
        incident = run.incident(0)
        assert (incident["kind"], incident["restored_from"]) == ("node_loss", "memory")
        assert incident["step"] == status["step"] and incident["steps_lost"] <= 1
        run.signal(signal.SIGTERM)
        assert run.wait() == 75, run.text
    finally:
        run.end()
    steps = [line["step"] for line in run.lines("metrics")]
    assert steps == list(range(1, len(steps) + 1)), "each step stands once"
    assert run.leftovers() == []


def test_a_head_that_answers_is_not_given_up() -> None:
    import socket
    import time

    with socket.create_server(("127.0.0.1", 0)) as server:
        lost: list[float] = []
        watch = HeadWatch(f"127.0.0.1:{server.getsockname()[1]}", lost=lost.append)
        time.sleep(2.5)
        watch.close()
    assert lost == []
    watch = HeadWatch(f"127.0.0.1:{free_port()}", lost=lost.append)
    time.sleep(3)
    assert len(lost) == 1 and 1.5 < lost[0] < 3
