"""Links between hosts that become slow while a real run goes on over them: three hosts, whose state is sharded.

Sharded, because what protects it then goes from host to host in every step, and stores measure that. Needs root.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.diagnostics.injected import Injected
from tests.launch.cluster import RayCluster
from tests.launch.hosts import Hosts, can_make_hosts

pytestmark = pytest.mark.campaign

NODES = 3
SLOW, USUAL = 60.0, 10000.0
"""Mbit/s."""
MODEL = {
    "layers": 1, "hidden_size": 128, "heads": 2, "kv_heads": 1, "intermediate_size": 256, "max_position": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    if not can_make_hosts():
        pytest.skip("network namespaces need root")
    with Hosts() as hosts:
        yield hosts
    assert hosts.left() == []


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, hosts: Hosts) -> Iterator[Injected]:
    folder = tmp_path_factory.mktemp("links")
    with RayCluster(folder, hosts=hosts).running(nodes=NODES) as cluster:
        run = Injected.of(
            folder, "--address", cluster.address, cluster={"nodes": NODES}, model={"config": MODEL},
            data={"global_batch": NODES}, parallel={"mode": "explicit", "fsdp": NODES}, checkpoint={"every": 0},
        )  # fmt: skip
        run.launch()
        try:
            run.until_step(70)
            yield run
        finally:
            run.end()


def node_on(run: Injected, hosts: Hosts, host: int) -> str:
    return next(node for (node, _), pid in run.pids("worker").items() if hosts.host_of(pid) == host)


def of_network(run: Injected) -> dict[str, dict[str, Any]]:
    return {
        verdict["cause"]: verdict for verdict in run.said if verdict["cause"] in ("slow_link", "slow_nic", "congestion")
    }


def test_a_link_that_is_slow_in_one_direction_is_named_with_both_ends(run: Injected, hosts: Hosts) -> None:
    assert not {"slow_link", "slow_nic"} & set(of_network(run)), "negative control"
    since, ends = run.step, {node_on(run, hosts, 1), node_on(run, hosts, 2)}
    hosts.limit_to(1, 2, SLOW)
    try:
        verdict = run.verdict("slow_link")
        assert {culprit["host"] for culprit in verdict["culprits"]} == ends and verdict["action"] == "check_network"
        print(f"\nafter {run.document('diagnosis')['last_step'] - since} steps: {verdict['sentence']}")
        status, found = run.diagnose()
        assert status == 0 and "slow_link" in {verdict["cause"] for verdict in found["verdicts"]}
        assert not [verdict for verdict in found["verdicts"] if verdict["action"] == "evict"]
    finally:
        hosts.unlimit_to(1, 2)
    run.until(lambda: "slow_link" not in of_network(run), f"no slow link any more: {run.said}")


def test_where_all_links_become_slow_no_host_is_blamed(run: Injected, hosts: Hosts) -> None:
    since = run.step
    for host in range(NODES):
        hosts.limit(host, SLOW)
    try:
        verdict = run.verdict("congestion")
        assert (verdict["culprits"], verdict["action"]) == ([], "wait")
        print(f"\nafter {run.document('diagnosis')['last_step'] - since} steps: {verdict['sentence']}")
        assert "slow_nic" not in of_network(run)
    finally:
        for host in range(NODES):
            hosts.limit(host, USUAL)
    run.until(lambda: "congestion" not in of_network(run), f"no congestion any more: {run.said}")
