"""Worker, store, both, a node, two nodes at once: killed in one run, which ends bit for bit like an undisturbed one."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import pytest

from tests.faults.faulty import FaultyRun, compare_with_undisturbed, expect

NODES, SPARES, PARITY = 4, 3, 2


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[FaultyRun]:
    more = 2 if request.config.getoption("--campaign") else 0
    run = FaultyRun(tmp_path_factory.mktemp("chain"), nodes=NODES, spares=SPARES + more, m=PARITY)
    run.launch()
    run.until_step(5)
    yield run
    run.end()


@pytest.mark.parametrize("place", ["forward", "collective", "optimizer", "copy"])
def test_a_worker_dies_at_a_chosen_place(run: FaultyRun, place: str) -> None:
    seen, _ = run.fault()
    run.order(place, 2)
    incident = run.incident(seen)
    expect(incident, kind="worker_exit", ranks=[2], action="restart", restored_from="memory")


def test_the_rank_that_reports_dies_after_its_snapshot_and_before_its_report(run: FaultyRun) -> None:
    seen, _ = run.fault()
    run.order("report", 0)
    expect(run.incident(seen), kind="worker_exit", ranks=[0], action="restart", restored_from="memory")


def test_workers_die_at_different_steps(run: FaultyRun) -> None:
    seen, _ = run.fault()
    run.order("copy", 1)
    run.order("forward", 3)
    incident = run.incident(seen)
    expect(incident, kind="worker_exit", action="restart", restored_from="memory")


def test_a_store_dies_and_training_goes_on(run: FaultyRun) -> None:
    seen, _ = run.fault()
    run.kill("store", run.seat(1))
    expect(run.incident(seen), kind="store_loss", nodes=[run.seat(1)], steps_lost=0)


def test_worker_and_store_of_a_node_die_together(run: FaultyRun) -> None:
    seen, _ = run.fault()
    node = run.seat(0)
    run.kill("store", node)
    run.kill("worker", node, 0)
    incidents = [run.incident(seen), run.incident(seen + 1)]
    worker = next(held for held in incidents if held["kind"] == "worker_exit")
    expect(worker, ranks=[0], restored_from="parity")


def test_a_node_dies_and_a_spare_decodes_it(run: FaultyRun) -> None:
    seen, _ = run.fault()
    node = run.seat(3)
    run.kill_node(node)
    expect(run.incident(seen), kind="node_loss", nodes=[node], action="replace", restored_from="parity")


def test_two_nodes_die_at_once(run: FaultyRun) -> None:
    seen, _ = run.fault()
    nodes = sorted([run.seat(1), run.seat(2)])
    run.kill_node(*nodes)
    run.until(lambda: len(run.pids("worker")) == NODES, "all workers")
    incident = run.incident(seen)
    expect(incident, kind="node_loss", action="replace", restored_from="parity")
    assert set(incident["nodes"]) <= set(nodes)
    run.settled()


@pytest.mark.campaign
def test_a_second_node_dies_while_the_first_is_replaced(run: FaultyRun) -> None:
    seen, _ = run.fault()
    first, second = run.seat(0), run.seat(3)
    run.kill_node(first)
    run.until(lambda: run.document("status")["state"] == "recovering", "recovery")
    run.kill_node(second)
    incidents = [run.incident(seen)]
    run.settled()
    incidents += run.lines("incidents")[seen + 1 :]
    assert {node for incident in incidents for node in incident["nodes"]} == {first, second}
    for incident in incidents:
        expect(incident, kind="node_loss", action="replace", restored_from="parity")


def test_a_loss_that_is_no_number_right_after_a_restore_is_tried_again(run: FaultyRun) -> None:
    seen, _ = run.fault()
    # The driver sleeps until the survivors wait in a collective: their next forward is that after the restore.
    run.signal(signal.SIGSTOP)
    run.kill("worker", run.seat(1), 1)
    time.sleep(0.5)
    run.order("nan", 2)
    run.signal(signal.SIGCONT)
    incidents = [run.incident(seen), run.incident(seen + 1)]
    assert sorted(incident["kind"] for incident in incidents) == ["non_finite", "worker_exit"]
    rolled = next(incident for incident in incidents if incident["kind"] == "non_finite")
    expect(rolled, action="rollback", restored_from="memory")


def test_the_clock_is_set_by_an_hour(run: FaultyRun) -> None:
    seen, step = run.fault()
    run.set_clock(3600)
    run.until_step(step + 10)
    worker = run.seat(1)
    run.kill("worker", worker, 1)
    expect(run.incident(seen), kind="worker_exit", ranks=[1], action="restart", restored_from="memory")
    assert run.lines("metrics")[-1]["time"] > time.time() + 3000
    run.set_clock(-3600)
    run.until_step(run.step + 10)
    assert len(run.lines("incidents")) == seen + 1


def test_flipped_bits_in_data_and_parity_are_decoded_before_a_tensor_is_used(run: FaultyRun) -> None:
    seen, _ = run.fault()
    # The driver sleeps, so that nothing is restored, and nothing written, before the bits are flipped.
    run.signal(signal.SIGSTOP)
    for node, rank in run.pids("worker"):
        run.kill("worker", node, rank)
    # The stores code what was sealed last: what rots between its hash and its parity would be in the parity too.
    time.sleep(1)
    run.rot(run.seat(1), "rank")
    run.rot(run.seat(2), "parity")
    run.signal(signal.SIGCONT)
    expect(run.incident(seen), kind="worker_exit", restored_from="memory")
    expect(run.incident(seen + 1), kind="storage", restored_from="parity")


def test_the_driver_dies(run: FaultyRun) -> None:
    seen, _ = run.fault()
    run.signal(signal.SIGKILL)
    run.wait()
    run.launch()
    expect(run.incident(seen), kind="driver_loss", restored_from="memory")


def test_the_end_is_bit_for_bit_that_of_an_undisturbed_run(run: FaultyRun) -> None:
    run.fault()
    run.signal(signal.SIGTERM)
    assert run.wait() == 75
    assert run.leftovers() == []
    compare_with_undisturbed(run)
