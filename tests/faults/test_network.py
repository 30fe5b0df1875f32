"""Links between hosts fail in one run, which ends bit for bit like an undisturbed one."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import pytest

from tests.faults.faulty import FaultyRun, compare_with_undisturbed, expect
from tests.launch.cluster import RayCluster
from tests.launch.hosts import Hosts, can_make_hosts

pytestmark = pytest.mark.campaign

NODES, SPARES, PARITY = 3, 2, 1


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    if not can_make_hosts():
        pytest.skip("network namespaces need root")
    with Hosts() as hosts:
        yield hosts
    assert hosts.left() == []


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, hosts: Hosts) -> Iterator[FaultyRun]:
    folder = tmp_path_factory.mktemp("network")
    with RayCluster(folder, hosts=hosts).running(nodes=NODES + SPARES) as cluster:
        run = FaultyRun(folder, "--address", cluster.address, nodes=NODES, spares=SPARES, m=PARITY)
        run.launch()
        try:
            run.until_step(5)
            yield run
        finally:
            run.end()


def another_host(run: FaultyRun, hosts: Hosts) -> tuple[str, int]:
    """A node that trains, not on this machine, and its host."""
    places = {node: hosts.host_of(pid) for (node, _), pid in run.pids("worker").items()}
    return max(places.items(), key=lambda place: place[1])


def test_a_short_interruption_costs_time_only(run: FaultyRun, hosts: Hosts) -> None:
    seen, step = run.fault()
    _, host = another_host(run, hosts)
    hosts.cut(host)
    time.sleep(1)
    hosts.mend(host)
    run.until_step(step + 10)
    assert run.lines("incidents")[seen:] == []


def test_a_dead_link_is_a_lost_node(run: FaultyRun, hosts: Hosts) -> None:
    seen, _ = run.fault()
    node, host = another_host(run, hosts)
    hosts.cut(host)
    expect(run.incident(seen), kind="node_loss", nodes=[node], action="replace", restored_from="parity")


def test_a_link_that_is_dead_in_one_direction_is_a_lost_node(run: FaultyRun, hosts: Hosts) -> None:
    seen, _ = run.fault()
    node, host = another_host(run, hosts)
    hosts.silence(host)
    expect(run.incident(seen), kind="node_loss", nodes=[node], action="replace", restored_from="parity")


def test_the_end_is_bit_for_bit_that_of_an_undisturbed_run(run: FaultyRun) -> None:
    run.fault()
    run.signal(signal.SIGTERM)
    assert run.wait() == 75
    compare_with_undisturbed(run)
