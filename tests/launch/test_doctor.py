"""`trainrt doctor` on real clusters, and runs whose nodes fail their self-checks."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.launch.cluster import RayCluster, cluster_of_hosts
from tests.launch.hosts import Hosts
from tests.launch.runs import environment
from tests.reference import validate
from trainrt.errors import ConfigError
from trainrt.launch.cluster import free_port
from trainrt.launch.doctor import doctor, table
from trainrt.launch.rounds import neighbours, pair_rounds, tournament


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
