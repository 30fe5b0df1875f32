"""Pure data parallelism: parity of replicated state is coded from what each node's own trainer holds."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.faults.faulty import FaultyRun, compare_with_undisturbed, expect
from trainrt.checkpoint.store.admin import StoreAdmin
from trainrt.launch.record import Folder, Record
from trainrt.run_dir import RunDir

NODES, MESH = 3, {"dp": 3}


def pulled(run: FaultyRun) -> int:
    """Bytes that the stores have had from each other to code parity."""
    folder = Folder(RunDir(run.directory))
    record = Record.load(folder)
    assert record is not None
    secret = folder.secret.read_text()
    return sum(StoreAdmin(address, secret).status()["pulled"] for address in record.stores.values())


@pytest.mark.campaign
def test_a_node_of_replicas_is_decoded_from_parity_that_needed_no_network(tmp_path: Path) -> None:
    run = FaultyRun(tmp_path, nodes=NODES, spares=0, m=1, mesh=MESH)
    run.launch()
    try:
        run.until_step(5)
        before, step = pulled(run), run.step
        assert before > 0, "of the first generation"
        run.until_step(step + 10)
        assert pulled(run) == before
        seen, _ = run.fault()
        node = run.seat(2)
        run.kill("store", node)
        run.kill("worker", node, 2)
        incidents = [run.incident(seen), run.incident(seen + 1)]
        expect(next(i for i in incidents if i["kind"] == "worker_exit"), ranks=[2], restored_from="parity")
        run.fault()
        run.signal(signal.SIGTERM)
        assert run.wait() == 75
    finally:
        run.end()
    compare_with_undisturbed(run)
