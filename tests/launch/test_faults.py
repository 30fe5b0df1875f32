"""One run through every fault: its worker, store, agent, driver and nodes are killed, one after another.

Only with `--campaign`: tests/faults kills the same in larger runs.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.runs import Run, alive, write_job


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("faults")
    job = write_job(folder / "job.toml", run={"steps": 5000}, cluster={"spare_nodes": 1, "driver_grace_seconds": 60})
    run = Run(folder / "run", job).launch()
    run.until_step(5)
    yield run
    run.end()


@pytest.mark.campaign
def test_what_runs_is_in_cluster_json(run: Run) -> None:
    assert set(run.pids("worker")) == {("n0", 0), ("n1", 1)}
    assert set(run.pids("agent")) == set(run.pids("store")) == set(run.pids("raylet")) == {
        ("n0", None), ("n1", None), ("n2", None),
    }  # fmt: skip
    assert run.process is not None
    assert run.pids("driver") == {(None, None): run.process.pid}
    assert all(alive(entry["pid"]) for entry in run.document("cluster")["processes"])


@pytest.mark.campaign
def test_a_killed_worker_is_forked_anew_and_the_survivor_stays(run: Run) -> None:
    seen, before, incarnation = len(run.lines("incidents")), run.pids("worker"), run.document("status")["incarnation"]
    run.kill("worker", "n1", 1)
    incident = run.incident(seen)
    assert (incident["kind"], incident["ranks"], incident["nodes"]) == ("worker_exit", [1], ["n1"])
    assert (incident["restored_from"], incident["action"]) == ("memory", "restart")
    assert incident["steps_lost"] <= 1 and incident["recovered_seconds"] > 0
    run.until(lambda: len(run.pids("worker")) == 2, "two workers")
    after = run.pids("worker")
    assert after["n0", 0] == before["n0", 0] and after["n1", 1] != before["n1", 1]
    run.until(lambda: run.document("status")["incarnation"] == incarnation + 1, "the next incarnation")
    assert run.lines("metrics")[-1]["incarnation"] == incarnation + 1


@pytest.mark.campaign
def test_a_killed_store_is_replaced_while_training_goes_on(run: Run) -> None:
    seen, workers, store = len(run.lines("incidents")), run.pids("worker"), run.pids("store")["n0", None]
    run.kill("store", "n0")
    incident = run.incident(seen)
    assert (incident["kind"], incident["nodes"], incident["steps_lost"]) == ("store_loss", ["n0"], 0)
    assert run.pids("worker") == workers
    assert run.pids("store")["n0", None] != store


@pytest.mark.campaign
def test_a_killed_agent_is_replaced_in_place(run: Run) -> None:
    seen, store = len(run.lines("incidents")), run.pids("store")["n1", None]
    run.kill("agent", "n1")
    incident = run.incident(seen)
    assert (incident["kind"], incident["nodes"], incident["action"]) == ("node_loss", ["n1"], "restart")
    assert incident["restored_from"] == "memory"
    run.until(lambda: len(run.pids("worker")) == 2, "two workers")
    assert run.pids("store")["n1", None] == store


@pytest.mark.campaign
def test_a_killed_driver_is_followed_by_one_that_adopts_the_rest(run: Run) -> None:
    seen, stores = len(run.lines("incidents")), run.pids("store")
    workers, agents = run.pids("worker"), run.pids("agent")
    run.signal(signal.SIGKILL)
    run.wait()
    run.until(lambda: not any(alive(pid) for pid in workers.values()), "workers end without their driver")
    run.launch()
    incident = run.incident(seen)
    assert (incident["kind"], incident["restored_from"]) == ("driver_loss", "memory")
    assert incident["steps_lost"] <= 1
    assert run.pids("agent") == agents and run.pids("store") == stores


@pytest.mark.campaign
def test_lost_nodes_are_replaced_by_a_spare_then_left_out(run: Run) -> None:
    seen = len(run.lines("incidents"))
    run.kill("raylet", "n1")
    incident = run.incident(seen)
    assert (incident["kind"], incident["nodes"], incident["action"]) == ("node_loss", ["n1"], "replace")
    assert incident["restored_from"] == "memory"
    assert run.document("status")["world_size"] == 2
    # The head's node: what the other nodes need of it stays.
    run.kill("raylet", "n0")
    incident = run.incident(seen + 1)
    assert (incident["kind"], incident["nodes"], incident["action"]) == ("node_loss", ["n0"], "shrink")
    assert incident["restored_from"] == "memory"
    run.until(lambda: run.document("status")["world_size"] == 1, "a smaller world")
    assert set(run.pids("worker")) == {("n2", 0)}
    assert run.document("plan")["world_size"] == 1


@pytest.mark.campaign
def test_sigterm_ends_it_with_a_checkpoint_and_nothing_left(run: Run) -> None:
    run.signal(signal.SIGTERM)
    assert run.wait() == 75
    status = run.document("status")
    assert status["state"] == "interrupted"
    assert (run.directory / "checkpoints" / f"step-{status['step']:08d}" / "COMMIT").exists()
    steps = [line["step"] for line in run.lines("metrics")]
    assert steps == list(range(1, status["step"] + 1)), "each step stands once"
    assert run.document("cluster")["processes"] == []
    assert run.leftovers() == []


def test_without_a_driver_everything_ends_by_itself(tmp_path: Path) -> None:
    job = write_job(tmp_path / "job.toml", cluster={"nodes": 1, "driver_grace_seconds": 4})
    run = Run(tmp_path / "run", job).launch()
    try:
        run.until_step(3)
        processes = [entry["pid"] for entry in run.document("cluster")["processes"]]
        run.signal(signal.SIGKILL)
        run.wait()
        run.until(lambda: not any(alive(pid) for pid in processes), "the lease runs out")
        run.until(lambda: run.leftovers() == [], "nothing is left")
    finally:
        run.end()
