"""One fault, one line; and none is lost with a driver."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from trainrt.launch.incidents import Incident, Ledger
from trainrt.run_dir import RunDir


def ledger(folder: Path) -> tuple[Ledger, RunDir]:
    run_dir = RunDir(folder)
    run_dir.create()
    told: list[dict[str, Any]] = []
    return Ledger(run_dir, folder / "open.json", tell=told.append), run_dir


def fault(kind: str = "worker_exit", **fields: Any) -> Incident:
    return Incident(kind, "rank 1 (n0) was killed", time.monotonic(), **fields)


def test_a_fault_is_written_when_a_step_is_completed_again(tmp_path: Path) -> None:
    held, run_dir = ledger(tmp_path)
    held.open(fault())
    held.restored("memory", steps_lost=1, find_seconds=0.0)
    assert run_dir.read_incidents() == []
    held.stepped()
    (line,) = run_dir.read_incidents()
    assert (line["restored_from"], line["steps_lost"]) == ("memory", 1)
    assert line["recovered_seconds"] >= 0


def test_the_phases_of_a_recovery_add_up(tmp_path: Path) -> None:
    held, run_dir = ledger(tmp_path)
    held.open(fault())
    held.open(fault("store_loss"))
    held.restored("parity", steps_lost=0, find_seconds=0.002)
    time.sleep(0.02)
    for seconds in (0.004, 0.001):
        held.has_read(seconds)
    held.stepped()
    held.protected()
    line, store = run_dir.read_incidents()
    assert line["phases"]["restore_seconds"] == pytest.approx(0.006)
    assert sum(line["phases"].values()) == pytest.approx(line["recovered_seconds"])
    assert min(line["phases"].values()) >= 0
    assert store["phases"] is None


def test_a_fault_after_the_last_restore_has_no_phases(tmp_path: Path) -> None:
    held, run_dir = ledger(tmp_path)
    held.restored("none", steps_lost=0, find_seconds=0.0)
    held.has_read(0.0)
    held.open(fault())
    held.stepped()
    assert run_dir.read_incidents()[0]["phases"] is None


def test_the_steps_to_redo_are_counted_once(tmp_path: Path) -> None:
    held, run_dir = ledger(tmp_path)
    held.open(fault())
    held.open(fault("node_loss"))
    held.restored("disk", steps_lost=7, find_seconds=0.0)
    held.stepped()
    assert [line["steps_lost"] for line in run_dir.read_incidents()] == [7, 0]


def test_the_loss_of_a_store_is_over_with_a_commit_and_redoes_nothing(tmp_path: Path) -> None:
    held, run_dir = ledger(tmp_path)
    held.open(fault("store_loss"))
    held.restored("memory", steps_lost=3, find_seconds=0.0)
    held.stepped()
    assert held.store_lost and run_dir.read_incidents() == []
    held.protected()
    assert not held.store_lost
    assert [(line["kind"], line["steps_lost"]) for line in run_dir.read_incidents()] == [("store_loss", 0)]


def test_an_error_that_comes_again_is_the_same_incident(tmp_path: Path) -> None:
    held, run_dir = ledger(tmp_path)
    held.open(fault("user_error", step=4))
    held.stop(fault("user_error", step=4))
    held.end()
    (line,) = run_dir.read_incidents()
    assert (line["action"], line["recovered_seconds"]) == ("stop", None)


def test_the_next_driver_holds_what_a_killed_one_left_open(tmp_path: Path) -> None:
    first, run_dir = ledger(tmp_path)
    first.open(fault())
    second, _ = ledger(tmp_path)
    second.stepped()
    (line,) = run_dir.read_incidents()
    assert line["kind"] == "worker_exit" and 0 <= line["recovered_seconds"] < 60
    assert ledger(tmp_path)[0].store_lost is False


def test_the_loss_of_a_node_takes_in_that_of_its_store(tmp_path: Path) -> None:
    held, run_dir = ledger(tmp_path)
    held.open(fault("store_loss", nodes=["n1"]))
    held.open(fault("store_loss", nodes=["n2"]))
    held.open(fault("node_loss", nodes=["n1"]))
    held.stepped()
    held.protected()
    assert [(line["kind"], line["nodes"]) for line in run_dir.read_incidents()] == [
        ("node_loss", ["n1"]),
        ("store_loss", ["n2"]),
    ]
