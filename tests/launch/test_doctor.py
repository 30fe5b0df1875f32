"""`trainrt doctor` on real clusters, and runs whose nodes fail their self-checks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import job
from tests.launch.cluster import RayCluster
from tests.launch.hosts import Hosts, can_make_hosts
from tests.launch.runs import Run, environment, write_job
from tests.reference import validate
from trainrt.errors import ConfigError
from trainrt.launch.cluster import Site, free_port
from trainrt.launch.doctor import doctor, table
from trainrt.launch.fleet import Fleet
from trainrt.launch.rounds import neighbours, pair_rounds, tournament
from trainrt.launch.vetting import Vetting


def run_doctor(*options: str, ok: bool | None = None) -> dict[str, Any]:
    """The document; `ok` as it must be, None where this machine's load may decide over what is not the test's matter."""
    command = [sys.executable, "-m", "trainrt.cli", "doctor", "--json", *options]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    document = json.loads(done.stdout)
    validate("doctor", document)
    assert document["ok"] is (done.returncode == 0) is (not document["findings"])
    assert ok is None or document["ok"] is ok, document["findings"]
    return document


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary files go, for this test alone; short, for sockets lie in it."""
    with tempfile.TemporaryDirectory(prefix="d", dir="/tmp") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


def processes_of(scratch: Path) -> list[str]:
    """Command lines that name it."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = entry.read_bytes().decode(errors="replace")
            if str(scratch) in words:
                found.append(words.replace("\0", " "))
    return found


# Rounds.


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 16])
def test_every_pair_meets_once_and_nobody_is_in_two_places(count: int) -> None:
    nodes = [f"n{index}" for index in range(count)]
    rounds, every = pair_rounds(nodes)
    met = [frozenset(pair) for pairs in rounds for pair in pairs]
    assert every and len(met) == len(set(met)) == count * (count - 1) // 2
    assert len(rounds) <= max(0, count - 1 + count % 2)
    for pairs in [*rounds, *neighbours(nodes)]:
        members = [node for pair in pairs for node in pair]
        assert len(members) == len(set(members))


def test_a_large_cluster_is_capped_and_every_node_has_neighbours_and_strangers() -> None:
    nodes = [f"n{index}" for index in range(101)]
    rounds, every = pair_rounds(nodes, most=8)
    assert not every and len(rounds) == 8 < len(tournament(nodes))
    partners: dict[str, set[str]] = {}
    for one, other in (pair for pairs in rounds for pair in pairs):
        partners.setdefault(one, set()).add(other)
        partners.setdefault(other, set()).add(one)
    assert min(map(len, partners.values())) >= 4
    assert all({nodes[index - 1], nodes[(index + 1) % 101]} <= partners[node] for index, node in enumerate(nodes))


# The command.


def test_a_doctor_of_this_machine(scratch: Path) -> None:
    document = run_doctor("--address", "local", "--nodes", "3", ok=True)
    assert [node["name"] for node in document["nodes"]] == ["n0", "n1", "n2"]
    for node in document["nodes"]:
        assert all(check["ok"] and check["value"] is not None for check in node["checks"].values())
        measured = (
            "compute",
            "memory",
            "shared_memory",
            "disk",
            "loopback",
            "clock_offset",
            "all_to_all",
            "all_reduce",
        )
        assert set(measured) <= node["checks"].keys()
    assert len(document["links"]) == 6
    assert [path.name for path in scratch.glob("trainrt-*")] == [] == processes_of(scratch)
    _, rows, lines = table(document)
    assert {row[0] for row in rows} == document["nodes"][0]["checks"].keys() and {row[-1] for row in rows} == {"-"}
    assert lines == ["nothing is unlike its peers"]


def test_wrong_input_is_named() -> None:
    with pytest.raises(ConfigError, match="--nodes 0; allowed"):
        doctor(nodes=0)
    command = [sys.executable, "-m", "trainrt.cli", "doctor", "--address", f"127.0.0.1:{free_port()}", "--json"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and "cluster.address" in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""


# Hosts with links of their own.


@contextmanager
def cluster_of_hosts(folder: Path, *, nodes: int, shared_memory: str = "") -> Iterator[tuple[Hosts, RayCluster]]:
    if not can_make_hosts():
        pytest.skip("network namespaces need root")
    with Hosts() as hosts, RayCluster(folder, hosts=hosts, shared_memory=shared_memory).running(nodes=nodes) as cluster:
        yield hosts, cluster
    assert hosts.left() == []


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hosts, RayCluster]]:
    """Three nodes whose links have a rate, so that what is measured is not a matter of this machine's cores."""
    with cluster_of_hosts(tmp_path_factory.mktemp("network"), nodes=3) as (hosts, cluster):
        yield hosts, cluster


@pytest.fixture(autouse=True)
def rates(request: pytest.FixtureRequest) -> None:
    if "network" in request.fixturenames:
        hosts, _ = request.getfixturevalue("network")
        hosts.limit(0, 200)
        for host in (1, 2):
            hosts.limit(host, 200)


def named(document: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """What was found of the network, by addresses."""
    addresses = {node["name"]: node["address"] for node in document["nodes"]}
    found = [finding for finding in document["findings"] if finding["kind"] in ("slow_nic", "slow_link")]
    return [(finding["kind"], [addresses[node] for node in finding["nodes"]]) for finding in found]


def test_a_slow_interface_is_named(network: tuple[Hosts, RayCluster]) -> None:
    hosts, cluster = network
    hosts.limit(2, 20)
    document = run_doctor("--address", cluster.address, ok=False)
    assert len(document["nodes"]) == 3
    assert named(document) == [("slow_nic", [hosts.address_of(2)])]


@pytest.mark.campaign
def test_a_slow_link_is_named(network: tuple[Hosts, RayCluster]) -> None:
    hosts, cluster = network
    hosts.limit_to(1, 2, 20)
    try:
        document = run_doctor("--address", cluster.address, ok=False)
    finally:
        hosts.unlimit_to(1, 2)
    assert named(document) == [("slow_link", [hosts.address_of(1), hosts.address_of(2)])]


@pytest.mark.campaign
def test_links_that_are_alike_are_not_named(network: tuple[Hosts, RayCluster]) -> None:
    _, cluster = network
    assert named(run_doctor("--address", cluster.address, "--nodes", "3")) == []


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
