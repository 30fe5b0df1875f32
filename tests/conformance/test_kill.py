"""The last column: a real launch, a worker killed with SIGKILL, and a final state equal bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conformance.rows import ROWS, Row
from tests.jobs import job
from tests.launches import finish, kill, launched, wait_step, write_job
from trainrt.checkpoint.inspect import inspect
from trainrt.run_dir import RunDir

STEPS = 25
FIXED = {"r": 1, "degree": 1, "all_to_all": "linear", "hot_experts": 0}


def config_of(row: Row, tmp_path: Path, *, nodes: int) -> Any:
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(33 + (i * i // 7) % 31) for i in range(20000)))
    sizes = {"vocab_size": 320} | ({"max_position": 32} if row.kind == "moe_lm" else {})
    config = job(row.kind, mesh=row.mesh, **row.sections)
    document = config.model_dump(mode="json")
    document["model"]["config"] = {**document["model"]["config"], **sizes}
    document["data"] |= {"source": str(text)}
    document["run"] |= {"steps": STEPS}
    document["cluster"] |= {
        "nodes": nodes,
        "workers_per_node": row.ranks // nodes,
    }
    document["checkpoint"] |= {"every": 0}
    document["evaluation"] = {"samples": 0}
    document["diagnostics"] |= {"dashboard": False}
    # What is measured decides otherwise, and another strategy has other bits.
    fixed = {key: value if (given := document["moe"][key]) == "auto" else given for key, value in FIXED.items()}
    document["moe"] = fixed if row.kind == "huggingface" else {**document["moe"], **fixed}
    return type(config).model_validate(document)


def final_digests(run_dir: RunDir) -> dict[Any, str]:
    return {(t["name"], t["role"]): t["digest"] for t in inspect(run_dir.checkpoint(STEPS))["tensors"]}


@pytest.mark.campaign
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_kill_and_restore(row: Row, tmp_path: Path, record_property: Any) -> None:
    record_property("cell", (row.name, "kill and restore"))
    undisturbed, killed = RunDir(tmp_path / "undisturbed"), RunDir(tmp_path / "killed")
    with launched(write_job(tmp_path, config_of(row, tmp_path, nodes=row.hosts)), undisturbed.path) as process:
        output = finish(process)
        assert process.returncode == 0, output
    nodes = 1 if row.ranks == 3 else 2
    with launched(write_job(tmp_path, config_of(row, tmp_path, nodes=nodes)), killed.path) as process:
        wait_step(killed, 8)
        kill(killed, "worker", rank=row.ranks - 1)
        output = finish(process)
        assert process.returncode == 0, output
    incidents = killed.read_incidents()
    assert [(i["kind"], i["action"], i["restored_from"]) for i in incidents] == [("worker_exit", "restart", "memory")]
    assert incidents[0]["steps_lost"] <= 1
    assert final_digests(killed) == final_digests(undisturbed)
    ours, theirs = killed.read_metrics(), undisturbed.read_metrics()
    same = ("step", "loss", "grad_norm", "samples_digest")
    assert [[line[key] for key in same] for line in ours] == [[line[key] for key in same] for line in theirs]
    assert ours[-1]["incarnation"] == 2 and theirs[-1]["incarnation"] == 1, "negative control: one was disturbed"
