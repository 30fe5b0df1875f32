"""What memory cannot bring back: the run stops and says so, or goes on from disk; dead memory is never taken for a state."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.faults.faulty import FaultyRun
from tests.launch.runs import alive
from trainrt.launch.guard import descendants


@pytest.mark.campaign
def test_more_nodes_than_parity_without_a_checkpoint_are_a_loud_stop(tmp_path: Path) -> None:
    run = FaultyRun(tmp_path, nodes=2, spares=1, m=1)
    run.launch()
    try:
        run.until_step(5)
        run.fault()
        lost, other = run.seat(1), run.seat(0)
        run.kill("store", other)
        run.kill_node(lost)
        run.kill("worker", other, 0)
        assert run.wait() == 1, run.text
        incident = run.lines("incidents")[-1]
        assert (incident["kind"], incident["action"], incident["restored_from"]) == ("node_loss", "stop", "none")
        assert incident["nodes"] == [lost]
        assert "nothing is left to restore from" in run.text and "Traceback" not in run.text
        assert run.document("status")["state"] == "failed"
        assert run.leftovers() == []
    finally:
        run.end()


@pytest.mark.campaign
def test_memory_of_an_older_run_is_no_state_and_is_removed(tmp_path: Path) -> None:
    """Everything is killed at once, as if the host had lost its power and kept its files."""
    run = FaultyRun(tmp_path, nodes=2, spares=0, m=1, checkpoints=5)
    run.launch()
    try:
        run.until_step(5)
        run.fault()
        run.until(lambda: list((run.directory / "checkpoints").glob("step-*/COMMIT")), "a checkpoint")
        killed = everything(run)
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        run.wait()
        while any(map(alive, killed)):
            time.sleep(0.05)
        memory = Path(f"/dev/shm/trainrt-{run.document('status')['run_id']}")
        assert list(memory.glob("*/*-slot-*")), "its slots are still there"
        checkpoint = max(int(path.parent.name[5:]) for path in (run.directory / "checkpoints").glob("step-*/COMMIT"))
        seen = len(run.lines("incidents"))
        run.launch()
        assert run.incident(seen)["restored_from"] == "disk"
        run.until_step(checkpoint + 20)
        run.signal(signal.SIGTERM)
        assert run.wait() == 75, run.text
        assert run.leftovers() == []
    finally:
        run.end()


def everything(run: FaultyRun) -> list[int]:
    """All processes of a run: the driver's children, and those that are nobody's."""
    assert run.process is not None
    roots = [run.process.pid, *run.processes(), *(entry["pid"] for entry in run.document("cluster")["processes"])]
    return sorted({pid for root in roots for pid in [root, *descendants(root)]})
