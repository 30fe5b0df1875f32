"""What a node measures of itself, and which node, device or link is named by its peers."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from trainrt.diagnostics import selfcheck
from trainrt.diagnostics.outliers import Link, Measured, best_of_nodes, judge, judge_links, shown

HEALTHY = {
    "compute": 100.0, "memory": 20.0, "shared_memory": 2.0, "shared_memory_free": float(1 << 30), "disk": 500.0,
    "loopback": 3.0, "clock_offset": 0.001, "network_send": 1.1, "network_receive": 1.1, "all_reduce": 0.5,
}  # fmt: skip


def cluster(count: int, *, spread: float = 0.1, **odd: dict[str, float]) -> dict[str, dict[str, float]]:
    """Healthy nodes n0, n1, ... that vary by `spread`; `odd` replaces values of some."""
    chance = random.Random(count)
    made = {
        f"n{index}": {name: value * chance.uniform(1 - spread, 1 + spread) for name, value in HEALTHY.items()}
        for index in range(count)
    }
    for node, values in odd.items():
        made[node].update(values)
    return made


def named(nodes: dict[str, dict[str, float]] | dict[str, Measured]) -> list[tuple[str, str]]:
    return [(node, name) for node, checks in judge(nodes).items() for name, value in checks.items() if not value.ok]


# Measuring.


def test_a_node_measures_itself_and_leaves_nothing(tmp_path: Path) -> None:
    before = set(os.listdir("/dev/shm"))
    found = selfcheck.run(selfcheck.FULL, tmp_path)
    assert found.keys() == {"compute", "memory", "shared_memory", "shared_memory_free", "disk", "loopback"}
    assert all(value > 0 for value in found.values())
    assert found["shared_memory_free"] == pytest.approx(shutil.disk_usage("/dev/shm").free, rel=0.2)
    assert list(tmp_path.iterdir()) == []
    assert {name for name in set(os.listdir("/dev/shm")) - before if name.startswith(".selfcheck")} == set()


def test_a_disk_that_takes_nothing_is_zero_and_what_cannot_be_measured_is_left_out(tmp_path: Path) -> None:
    assert selfcheck.measure(["disk"], tmp_path / "nowhere") == {"disk": 0.0}
    assert selfcheck.measure([], tmp_path) == {}


def test_a_process_that_fails_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck.sys, "executable", "/bin/false")
    assert selfcheck.run(selfcheck.SHORT, tmp_path) == {}
    monkeypatch.setattr(selfcheck.sys, "executable", "/bin/echo")
    assert selfcheck.run(selfcheck.SHORT, tmp_path) == {}, "what is printed is no JSON"


def test_a_process_that_takes_too_long_is_ended_and_says_nothing(tmp_path: Path) -> None:
    assert selfcheck.run(selfcheck.SHORT, tmp_path, seconds=0.01) == {}


# Judging nodes.


@pytest.mark.parametrize("count", [1, 2, 3, 8, 64])
def test_nodes_that_vary_a_little_are_all_ok(count: int) -> None:
    assert named(cluster(count)) == []


@pytest.mark.parametrize("name", ["compute", "memory", "network_send", "network_receive"])
def test_one_slow_node_of_three_is_named_and_no_other(name: str) -> None:
    assert named(cluster(3, n1={name: 0.5 * HEALTHY[name]})) == [("n1", name)]
    assert named(cluster(3, n1={name: 0.9 * HEALTHY[name]})) == []


def test_a_minority_of_slow_nodes_is_named() -> None:
    slow = {"compute": 30.0}
    assert named(cluster(8, n0=slow, n3=slow, n7=slow)) == [(node, "compute") for node in ("n0", "n3", "n7")]


def test_a_fast_node_is_no_outlier() -> None:
    assert named(cluster(3, n1={"compute": 500.0})) == []


def test_of_two_only_gross_differences_count() -> None:
    assert named(cluster(2, n1={"compute": 60.0})) == [], "the other one may just be a better machine"
    assert named(cluster(2, n1={"compute": 30.0})) == [("n1", "compute")]
    assert named(cluster(2, n1={"network_send": 0.2})) == [], "of two it cannot be told which end is slow"


def test_absolute_bounds_need_no_peers() -> None:
    assert named(cluster(1, n0={"shared_memory_free": 1e6})) == [("n0", "shared_memory_free")]
    assert named(cluster(1, n0={"disk": 0.0})) == [("n0", "disk")]
    assert named(cluster(2, n1={"clock_offset": -30.0})) == [("n1", "clock_offset")]
    full = cluster(3, **{f"n{index}": {"shared_memory_free": 0.0} for index in range(3)})
    assert len(named(full)) == 3, "all nodes alike are not all well"
    assert not any(judge(full)[node]["shared_memory_free"].by_peers for node in full)


def test_free_memory_and_clocks_are_not_compared() -> None:
    assert named(cluster(3, n1={"shared_memory_free": float(64 << 20), "clock_offset": 0.1})) == []


def test_what_could_not_be_measured_is_named_and_is_nobodys_peer() -> None:
    nodes: dict[str, Measured] = {"n0": {"compute": None}, "n1": {"compute": 100.0}, "n2": {"compute": 90.0}}
    assert named(nodes) == [("n0", "compute")]
    assert judge(nodes)["n1"]["compute"].peers_median == 90.0


def test_one_slow_device_of_a_node_is_named_by_the_others_of_that_node() -> None:
    devices = {f"device_compute:{index}": 6e5 for index in range(8)}
    assert named({"n0": devices}) == []
    assert named({"n0": {**devices, "device_compute:5": 3e5}}) == [("n0", "device_compute:5")]


def test_nodes_of_one_host_share_what_the_best_of_them_shows() -> None:
    nodes = cluster(4, n1={"memory": 5.0}, n3={"memory": 5.0})
    hosts = {"n0": "a", "n1": "a", "n2": "b", "n3": "c"}
    found = judge(nodes, hosts=hosts)
    assert [node for node in nodes if not found[node]["memory"].ok] == ["n3"], "n0 shows what host a can do"


def test_values_are_shown_with_units() -> None:
    assert shown("shared_memory_free", 3 << 20) == "3 MiB" and shown("compute", 106.4) == "106 GFLOP/s"


# Judging links.


def links(count: int, **odd: float) -> list[Link]:
    """Every link of n0, n1, ... at about 1 GB/s; `odd` as n0_n1=0.1."""
    chance = random.Random(count)
    nodes = [f"n{index}" for index in range(count)]
    return [
        Link(one, other, odd.get(f"{one}_{other}", chance.uniform(0.9, 1.1)))
        for one in nodes for other in nodes if one != other
    ]  # fmt: skip


def named_links(made: list[Link]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Interfaces, and links that they do not explain."""
    best = judge(best_of_nodes(made))
    slow = [(node, name) for node, checks in best.items() for name, value in checks.items() if not value.ok]
    cannot = {kind: {node for node, name in slow if name == kind} for kind in ("network_send", "network_receive")}
    judged = judge_links(made, cannot_send=cannot["network_send"], cannot_receive=cannot["network_receive"])
    rest = [
        (item.link.source, item.link.target) for item in judged
        if not item.judged.ok
        and item.link.source not in cannot["network_send"] and item.link.target not in cannot["network_receive"]
    ]  # fmt: skip
    return slow, rest


@pytest.mark.parametrize("count", [2, 3, 4, 9])
def test_links_that_vary_a_little_are_all_ok(count: int) -> None:
    assert named_links(links(count)) == ([], [])


def test_a_link_that_is_slow_in_one_pair_is_that_link() -> None:
    assert named_links(links(4, n1_n2=0.1)) == ([], [("n1", "n2")])
    assert named_links(links(4, n1_n2=0.0)) == ([], [("n1", "n2")]), "nothing arrives"


def test_a_node_whose_links_are_all_slow_has_a_slow_interface() -> None:
    assert named_links(links(3, n1_n0=0.1, n1_n2=0.1)) == ([("n1", "network_send")], [])
    both = {f"n1_n{other}": 0.1 for other in (0, 2, 3)} | {f"n{other}_n1": 0.1 for other in (0, 2, 3)}
    assert sorted(named_links(links(4, **both))[0]) == [("n1", "network_receive"), ("n1", "network_send")]
    assert named_links(links(4, **both))[1] == []


def test_a_slow_interface_does_not_hide_a_slow_link_elsewhere() -> None:
    slow = {f"n1_n{other}": 0.1 for other in (0, 2, 3)}
    assert named_links(links(4, **slow, n2_n3=0.2)) == ([("n1", "network_send")], [("n2", "n3")])


def test_of_two_nodes_only_a_gross_difference_of_directions_counts() -> None:
    assert named_links(links(2, n0_n1=0.6)) == ([], [])
    assert named_links(links(2, n0_n1=0.1)) == ([], [("n0", "n1")])


def test_links_are_compared_with_their_like() -> None:
    made = [Link(link.source, link.target, 10.0, "host") for link in links(3)] + links(3)
    assert named_links(made) == ([], [])
    only_one_host = [Link(link.source, link.target, link.value, "host") for link in links(3)]
    assert best_of_nodes(only_one_host) == {}, "there is no network between nodes of one host"
