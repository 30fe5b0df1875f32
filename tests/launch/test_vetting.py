"""Nodes that fail their self-check get no ranks, before a start and after an incident; and what is decided without a cluster."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import job
from tests.launch.cluster import cluster_of_hosts
from tests.launch.runs import Run, write_job
from tests.reference import validate
from trainrt.launch.cluster import Site
from trainrt.launch.fleet import Fleet
from trainrt.launch.vetting import Vetting

# A run whose nodes fail.


def fill_shared_memory(node: subprocess.Popen[bytes]) -> None:
    """Take all that is left of a host's /dev/shm."""
    root = Path(f"/proc/{node.pid}/root/dev/shm")
    free = os.statvfs(root)
    with (root / "filler").open("wb") as filler:
        os.posix_fallocate(filler.fileno(), 0, free.f_bavail * free.f_bsize)


def test_a_node_without_shared_memory_gets_no_ranks(tmp_path: Path) -> None:
    with cluster_of_hosts(tmp_path, nodes=3, shared_memory="256m") as (hosts, cluster):
        fill_shared_memory(cluster.nodes[1])
        path = write_job(tmp_path / "job.toml", cluster={"nodes": 2, "spare_nodes": 1, "workers_per_node": 1})
        run = Run(tmp_path / "run", path, "--address", cluster.address).launch()
        try:
            run.until_step(5)
            assert {node for node, _ in run.pids("worker")} == {"n0", "n2"}, run.text
            incident = run.incident(0)
            validate("incident", incident)
            assert (incident["kind"], incident["nodes"], incident["action"]) == ("node_loss", ["n1"], "replace")
            assert hosts.address_of(1) in incident["message"] and "shared_memory_free" in incident["message"]
        finally:
            run.end()
        assert "node n1 is left out" in run.text


@pytest.mark.campaign
def test_a_node_that_fails_after_an_incident_is_not_seated_again(tmp_path: Path) -> None:
    with cluster_of_hosts(tmp_path, nodes=3, shared_memory="256m") as (_, cluster):
        path = write_job(tmp_path / "job.toml", cluster={"nodes": 3, "workers_per_node": 1}, run={"steps": 100000})
        run = Run(tmp_path / "run", path, "--address", cluster.address).launch()
        try:
            run.until_step(5)
            os.kill(run.pids("worker")["n1", 1], signal.SIGSTOP)
            assert (run.incident(0)["kind"], run.incident(0)["action"]) == ("worker_hang", "restart")
            run.until_step(run.step + 5)
            fill_shared_memory(cluster.nodes[1])
            os.kill(run.pids("worker")["n1", 1], signal.SIGSTOP)
            incident = run.incident(1)
            assert (incident["kind"], incident["nodes"], incident["action"]) == ("worker_hang", ["n1"], "shrink")
            assert "shared_memory_free" in incident["message"]
            run.until_step(run.step + 5)
            assert {node for node, _ in run.pids("worker")} == {"n0", "n2"}, run.text
        finally:
            run.end()


# Deciding, without a cluster.


class Answers(Fleet):
    """Agents that answer at once, each time the next of their answers, and then the last again."""

    def __init__(self, **answers: list[dict[str, float] | None]) -> None:
        self._given = answers
        self.asked: list[tuple[str, str]] = []
        self.sites = {node: Site(node, node, f"host of {node}") for node in answers}

    @property
    def nodes(self) -> list[str]:
        return list(self._given)

    def ask(self, node: str, method: str, *given: Any) -> Any:
        self.asked.append((node, given[0]))
        answers = self._given[node]
        return answers.pop(0) if len(answers) > 1 else answers[0]

    def answer(self, reference: Any, *, seconds: float) -> Any:
        return reference


GOOD, SLOW, FULL = ({"compute": 100.0, "shared_memory_free": 1e9}, {"compute": 20.0}, {"shared_memory_free": 0.0})


def vet(fleet: Answers, *, mesh: dict[str, int] | None = None, **cluster: Any) -> Any:
    nodes = {"nodes": len(fleet.nodes), "workers_per_node": 1, **cluster}
    parallel = {"mode": "auto"} if mesh is None else {"mode": "explicit", **mesh}
    vetting = Vetting(fleet, job(cluster=nodes, parallel=parallel), device="cpu")
    vetting.begin(fleet.nodes)
    return vetting.result(fleet.nodes)


def test_nodes_that_are_well_are_all_seated() -> None:
    assert vet(Answers(n0=[GOOD], n1=[GOOD], n2=[GOOD])).unfit == {}


def test_a_node_that_is_slow_twice_is_unfit_and_one_that_was_slow_once_is_not() -> None:
    assert list(vet(Answers(n0=[GOOD], n1=[SLOW], n2=[GOOD])).unfit) == ["n1"]
    assert vet(Answers(n0=[GOOD], n1=[SLOW, GOOD], n2=[GOOD])).unfit == {}
    assert vet(Answers(n0=[GOOD], n1=[SLOW, None], n2=[GOOD])).unfit == {}, "the second answer was late"


def test_a_slow_gpu_needs_no_second_look() -> None:
    good = {f"device_compute:{index}": 6e5 for index in range(4)}
    fleet = Answers(n0=[good], n1=[{**good, "device_compute:2": 1e5}], n2=[good])
    assert list(vet(fleet).unfit) == ["n1"] and len(fleet.asked) == 3


def test_a_node_that_does_not_answer_or_answers_nothing_is_seated() -> None:
    found = vet(Answers(n0=[GOOD], n1=[None], n2=[{}]))
    assert found.unfit == {} and found.remark == ""


def test_where_every_node_fails_none_is_unfit_and_it_is_said() -> None:
    found = vet(Answers(n0=[FULL], n1=[FULL], n2=[FULL]))
    assert found.unfit == {} and "every node that was checked fails" in found.remark


def test_a_node_that_no_mesh_can_do_without_stays_and_it_is_said() -> None:
    fleet = Answers(n0=[GOOD], n1=[FULL])
    found = vet(fleet, mesh={"tp": 2})
    assert found.unfit == {} and "no mesh fits" in found.remark
    assert list(vet(Answers(n0=[GOOD], n1=[FULL]), mesh={"fsdp": 2}).unfit) == ["n1"], "fsdp can shrink"


def test_nodes_of_one_host_are_measured_once_and_after_an_incident_not_at_all() -> None:
    fleet = Answers(n0=[GOOD], n1=[GOOD])
    fleet.sites = {node: Site(node, node, "here") for node in fleet.nodes}
    vetting = Vetting(fleet, job(), device="cpu")
    vetting.begin(fleet.nodes)
    assert fleet.asked == [("n0", "cpu")]
    vetting.result(fleet.nodes)
    vetting.begin_again(fleet.nodes)
    assert len(fleet.asked) == 1


def test_it_can_be_turned_off() -> None:
    fleet = Answers(n0=[FULL], n1=[GOOD])
    vetting = Vetting(fleet, job(diagnostics={"selfcheck": False}), device="cpu")
    vetting.begin(fleet.nodes)
    vetting.begin_again(fleet.nodes)
    assert fleet.asked == [] and vetting.result(fleet.nodes).unfit == {}
