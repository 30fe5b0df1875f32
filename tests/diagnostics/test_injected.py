"""Real runs with real faults: what is said while they run and afterwards, and that it is not said without the fault.

Two ranks on two nodes, one fault after the other; the long form goes on with what takes more steps. A step takes 50 to 200 ms
here, on cores that are shared, so what is injected is large against that. Each test prints its line of docs/diagnosis.md.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from tests.diagnostics.injected import Injected, pulses

MODEL = {
    "layers": 1, "hidden_size": 64, "heads": 2, "kv_heads": 1, "intermediate_size": 64, "max_position": 1024,
}  # fmt: skip
OF_HARDWARE = ("slow_worker", "slow_host", "slow_nic", "drift")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Injected]:
    run = Injected.of(tmp_path_factory.mktemp("injected"), model={"config": MODEL}, checkpoint={"every": 20})
    run.launch()
    try:
        run.until_step(15)
        yield run
    finally:
        run.end()
    assert run.leftovers() == []


def named(verdict: dict[str, Any]) -> list[tuple[int | None, str | None]]:
    return [(culprit["rank"], culprit["host"]) for culprit in verdict["culprits"]]


def expect(run: Injected, cause: str, *ranks: int, action: str) -> None:
    """The driver says so, `trainrt diagnose` says so, and no host is to be evicted but these ranks'."""
    since, hosts = run.step, {rank: host for host, rank in run.pids("worker")}
    wanted = [(rank, hosts[rank]) for rank in ranks]
    verdict = run.verdict(cause, lambda verdict: named(verdict) == wanted and verdict["action"] == action)
    steps = run.document("diagnosis")["last_step"] - since
    print(f"\n{cause} {wanted} after {steps} steps: {verdict['sentence']} Confidence {verdict['confidence']}.")
    status, found = run.diagnose()
    assert (status, found["state"]) == (0, "straggling")
    assert (named(verdict), verdict["action"]) in [
        (named(v), v["action"]) for v in found["verdicts"] if v["cause"] == cause
    ]
    blamed = {host for v in found["verdicts"] if v["cause"] in OF_HARDWARE for _, host in named(v)}
    assert blamed <= {host for _, host in wanted}, found["verdicts"]


def over(run: Injected, cause: str) -> None:
    """What was said is no longer said, now that the fault has gone."""
    run.until(lambda: all(verdict["cause"] != cause for verdict in run.said), f"no {cause} any more: {run.said}")


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
    run.until(lambda: run.document("diagnosis")["state"] == "healthy", f"healthy: {run.said}")
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
    until = run.step + 40
    pulses(run.workers[1], stopped=0.3, running=0.2, until=lambda: run.step >= until)
    expect(run, "slow_worker", 1, action="evict")
    over(run, "slow_worker")


@pytest.mark.campaign
def test_loaders_that_are_late_on_all_ranks(run: Injected) -> None:
    with run.ordered("data", 0.1, 0, 1):
        expect(run, "slow_data", action="check_storage")
    over(run, "slow_data")


@pytest.mark.campaign
def test_garbage_that_ranks_collect_out_of_turn(run: Injected) -> None:
    until = run.step + 45
    while run.step < until:
        order = run.order("collect_once", run.workers[random.randrange(2)], 0.3)
        run.until(lambda order=order: not order.exists(), "a collection")
        run.until_step(run.step + 2)
    expect(run, "garbage_collection", action="plan_gc")
    over(run, "garbage_collection")


@pytest.mark.campaign
def test_a_rank_that_collects_garbage_in_every_step(run: Injected) -> None:
    with run.ordered("collect", 0.15, 1):
        expect(run, "garbage_collection", 1, action="plan_gc")
    over(run, "garbage_collection")


@pytest.mark.campaign
def test_long_sequences_on_one_rank_are_work_and_no_fault(run: Injected) -> None:
    quiet(run, 40)
    with run.ordered("long", 16, 1):
        expect(run, "sequence_imbalance", 1, action="rebalance")
    over(run, "sequence_imbalance")


@pytest.mark.campaign
def test_a_slow_rank_is_told_from_uneven_sequences(run: Injected) -> None:
    with run.ordered("ragged", 16, 0, 1):
        expect(run, "sequence_imbalance", action="rebalance")
        with run.ordered("compute", 0.2, 1):
            expect(run, "slow_worker", 1, action="evict")
        over(run, "slow_worker")
    over(run, "sequence_imbalance")
