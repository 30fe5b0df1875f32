"""Real runs with real faults: what is said while they run and afterwards, and that it is not said without the fault.

Two ranks on two nodes, one fault after the other; the long form goes on with what takes more steps. A step takes 50 to 200 ms
here, on cores that are shared, so what is injected is large against that. Each test prints its line of docs/diagnosis.md.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.diagnostics.injected import Injected, pulses
from tests.launch.runs import PATIENCE_SECONDS

MODEL = {
    "layers": 1, "hidden_size": 128, "heads": 2, "kv_heads": 1, "intermediate_size": 256, "max_position": 1024,
}  # fmt: skip
"""Of which a sequence that is 24 times as long takes several times as long."""
OF_HARDWARE = ("slow_worker", "slow_host", "slow_nic", "drift")


def of_ranks(folder: Path, *, per_node: int) -> Iterator[Injected]:
    """A run on two nodes that has warmed up, and its end."""
    run = Injected.of(
        folder, model={"config": MODEL}, cluster={"workers_per_node": per_node},
        data={"global_batch": 4 * per_node}, checkpoint={"every": 5},
    )  # fmt: skip
    run.launch()
    try:
        run.until_step(15)
        yield run
    finally:
        run.end()
    assert run.leftovers() == []


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Injected]:
    yield from of_ranks(tmp_path_factory.mktemp("injected"), per_node=1)


def named(verdict: dict[str, Any]) -> list[tuple[int | None, str | None]]:
    return [(culprit["rank"], culprit["host"]) for culprit in verdict["culprits"]]


def expect(run: Injected, cause: str, *ranks: int, action: str, since: int | None = None) -> None:
    """The driver says so, `trainrt diagnose` says so, and no host is to be evicted but these ranks'. since: the fault's step."""
    since = run.step if since is None else since
    hosts = {rank: host for host, rank in run.pids("worker")}
    wanted = [(rank, hosts[rank]) for rank in ranks]
    verdict = run.verdict(cause, lambda verdict: named(verdict) == wanted and verdict["action"] == action)
    steps = run.document("diagnosis")["last_step"] - since
    print(f"\n{cause} {wanted} after {steps} steps: {verdict['sentence']} Confidence {verdict['confidence']}.")
    status, found = run.diagnose()
    assert (status, found["state"]) == (0, "straggling")
    # Over its longer window what became slower step by step may be slow all along.
    same = {cause, "slow_worker"} if cause == "drift" else {cause}
    assert (named(verdict), action) in [(named(v), v["action"]) for v in found["verdicts"] if v["cause"] in same]
    blamed = {host for v in found["verdicts"] if v["cause"] in OF_HARDWARE for _, host in named(v)}
    assert blamed <= {host for _, host in wanted}, found["verdicts"]


def causes(run: Injected) -> set[str]:
    return {verdict["cause"] for verdict in run.said}


def over(run: Injected, *said: str) -> None:
    """What was said is no longer said, now that the fault has gone."""
    run.until(lambda: not causes(run) & set(said), f"no {' nor '.join(said)} any more: {run.said}")


def quiet(run: Injected, steps: int) -> None:
    """Nothing that would cost a host is said in so many steps."""
    until, heard = run.step + steps, []
    while run.step < until:
        heard = [verdict for verdict in run.said if verdict["cause"] in OF_HARDWARE and verdict["action"] == "evict"]
        assert not heard, heard
        run.until_step(min(until, run.step + 2))


# Short: what goes wrong most.


def test_a_run_that_is_well_is_healthy(run: Injected) -> None:
    quiet(run, 30)
    run.until(lambda: run.document("diagnosis").get("state") == "healthy", "healthy")
    assert run.diagnose()[0] == 0


def test_one_stall_is_nobodys_fault(run: Injected) -> None:
    order = run.order("stall", run.workers[1], 1.0)
    run.until(lambda: not order.exists(), "a stall")
    quiet(run, 30)


def test_a_rank_that_computes_slowly_is_to_be_evicted(run: Injected) -> None:
    with run.ordered("compute", 0.15, 1):
        expect(run, "slow_worker", 1, action="evict")
    over(run, "slow_worker")


def test_a_loader_that_is_late_on_one_rank_is_no_slow_worker(run: Injected) -> None:
    with run.ordered("data", 0.15, 0):
        expect(run, "slow_data", 0, action="check_storage")
    over(run, "slow_data")


# The long form.


@pytest.mark.campaign
def test_a_busy_rank(run: Injected) -> None:
    with run.ordered("busy", 0.2, 0):
        expect(run, "slow_worker", 0, action="evict")
    over(run, "slow_worker")


@pytest.mark.campaign
def test_a_process_that_is_stopped_again_and_again(run: Injected) -> None:
    """Wherever it is at that moment, so that no part of its steps shows it alone."""
    since = run.step
    with pulses(run.workers[1], stopped=0.2, running=0.2):
        run.until_step(since + 110)
        expect(run, "slow_worker", 1, action="evict", since=since)
    over(run, "slow_worker")


@pytest.mark.campaign
def test_loaders_that_are_late_on_all_ranks(run: Injected) -> None:
    with run.ordered("data", 0.1, 0, 1):
        expect(run, "slow_data", action="check_storage")
    over(run, "slow_data")


@pytest.mark.campaign
def test_garbage_that_ranks_collect_out_of_turn(run: Injected) -> None:
    since = run.step
    while run.step < since + 45 and "garbage_collection" not in causes(run):
        order = run.order("collect_once", run.workers[random.randrange(2)], 0.3)
        run.until(lambda order=order: not order.exists(), "a collection")
        run.until_step(run.step + 2)
    expect(run, "garbage_collection", action="plan_gc", since=since)
    over(run, "garbage_collection")


@pytest.mark.campaign
def test_a_rank_that_collects_garbage_in_every_step(run: Injected) -> None:
    with run.ordered("collect", 0.15, 1):
        expect(run, "garbage_collection", 1, action="plan_gc")
    over(run, "garbage_collection")


@pytest.mark.campaign
def test_long_sequences_on_one_rank_are_work_and_no_fault(run: Injected) -> None:
    quiet(run, 40)
    with run.ordered("long", 24, 1):
        expect(run, "sequence_imbalance", 1, action="rebalance")
    over(run, "sequence_imbalance")


@pytest.mark.campaign
def test_a_slow_rank_is_told_from_uneven_sequences(run: Injected) -> None:
    with run.ordered("ragged", 24, 0, 1):
        expect(run, "sequence_imbalance", action="rebalance")
        with run.ordered("compute", 0.2, 1):
            expect(run, "slow_worker", 1, action="evict")
        over(run, "slow_worker")
    over(run, "sequence_imbalance")


@pytest.mark.campaign
def test_a_rank_that_becomes_slower_and_slower(run: Injected) -> None:
    with run.ordered("drift", 0.01, 1):
        expect(run, "drift", 1, action="evict")
    over(run, "drift", "slow_worker")


@pytest.mark.campaign
def test_snapshots_that_stall_on_one_rank(run: Injected) -> None:
    with run.ordered("snapshot", 0.3, 0):
        expect(run, "slow_storage", 0, action="check_storage")
    over(run, "slow_storage")


@pytest.mark.campaign
def test_snapshots_that_stall_on_all_ranks(run: Injected) -> None:
    with run.ordered("snapshot", 0.2, 0, 1):
        expect(run, "slow_storage", action="check_storage")
    over(run, "slow_storage")


@pytest.mark.campaign
def test_checkpoints_that_stall_on_one_rank(run: Injected) -> None:
    with run.ordered("checkpoint", 1.0, 1):
        # A stop in five steps takes many steps to be sure of, beside what snapshots vary anyhow and were before.
        since = run.step
        run.until_step(since + 110)
        expect(run, "slow_storage", 1, action="check_storage", since=since)
    over(run, "slow_storage")


@pytest.mark.campaign
def test_a_clock_that_is_wrong_says_nothing_of_the_rank(run: Injected) -> None:
    with run.ordered("clock", 5.0, 1):
        quiet(run, 40)


@pytest.mark.campaign
def test_one_of_two_ranks_alone_is_not_enough_to_compare(run: Injected) -> None:
    with run.ordered("mute", 1, 1):
        quiet(run, 70)
        run.until(lambda: run.document("diagnosis")["state"] == "unknown", "not enough data")
    run.until(lambda: run.document("diagnosis")["state"] != "unknown", "enough data")


# Two ranks on each of two nodes.


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Injected]:
    yield from of_ranks(tmp_path_factory.mktemp("four"), per_node=2)


@pytest.mark.campaign
def test_four_ranks_that_are_well(four: Injected) -> None:
    quiet(four, 40)


@pytest.mark.campaign
def test_a_slow_host_is_no_slow_rank(four: Injected) -> None:
    with four.ordered("compute", 0.2, 2, 3):
        expect(four, "slow_host", 2, 3, action="evict")
    over(four, "slow_host")


@pytest.mark.campaign
def test_a_slow_rank_is_no_slow_host_and_found_without_the_telemetry_of_another(four: Injected) -> None:
    with four.ordered("mute", 1, 3):
        quiet(four, 40)
        with four.ordered("compute", 0.2, 1):
            expect(four, "slow_worker", 1, action="evict")
        over(four, "slow_worker")


@pytest.mark.campaign
def test_a_host_that_gets_its_data_late(four: Injected) -> None:
    with four.ordered("data", 0.2, 0, 1):
        expect(four, "slow_data", 0, 1, action="check_storage")
    over(four, "slow_data")


# Runs that are over.


@pytest.mark.campaign
def test_a_dead_run_is_diagnosed_as_it_was(tmp_path: Path) -> None:
    run = Injected.of(tmp_path)
    run.launch()
    try:
        run.until_step(15)
        with run.ordered("compute", 0.15, 0):
            run.verdict("slow_worker")
            for node, rank in run.pids("worker"):
                run.kill("worker", node, rank)
            run.signal(signal.SIGKILL)
            run.wait()
            status, found = run.diagnose()
    finally:
        run.end()
    assert (status, found["state"]) == (0, "straggling")
    assert [(v["cause"], named(v)) for v in found["verdicts"][:1]] == [("slow_worker", [(0, "n0")])]


@pytest.mark.campaign
def test_few_steps_are_not_enough(tmp_path: Path) -> None:
    run = Injected.of(tmp_path, run={"steps": 4})
    run.launch()
    try:
        assert run.wait(seconds=2 * PATIENCE_SECONDS) == 0
    finally:
        run.end()
    status, found = run.diagnose()
    assert (status, found["state"], found["verdicts"]) == (0, "unknown", [])


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert Injected(tmp_path / "run", tmp_path / "job.toml").diagnose() == (2, {})
