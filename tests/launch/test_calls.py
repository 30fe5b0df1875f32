"""Collective calls that do not match are named with both call sites, whether they hang, crash or only lose connections.

One run of four ranks, whose loss function makes calls of its own and gets one wrong where it finds an order in a folder.
The long form has them on two nodes, whose agents each know a half.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.launch.runs import Run, write_job

MODULE = """
from pathlib import Path

import torch
import torch.distributed as dist

from trainrt import Pipeline
from trainrt.training.objectives import cross_entropy_sum

ORDERS = Path({orders!r})


def ordered(name):
    path = ORDERS / f"{{name}}-{{dist.get_rank()}}"
    if path.exists():
        path.unlink()
        return True
    return False


def together(name):
    # All ranks see the order in the same step, or none does.
    seen = torch.tensor(int((ORDERS / name).exists()))
    dist.all_reduce(seen, op=dist.ReduceOp.MIN)
    dist.barrier()
    if seen:
        (ORDERS / name).unlink(missing_ok=True)
    return bool(seen)


def counted(rank):
    total = torch.ones(64)
    if not ordered("skip"):
        dist.all_reduce(total)  # skipped
    parts = [torch.empty(16) for _ in range(4)]
    dist.all_gather(parts, torch.ones(16))  # after it


def shared():
    if ordered("type"):
        dist.broadcast(torch.ones(64), 0)  # other type
    elif ordered("shape"):
        dist.all_reduce(torch.ones(8))  # other shape
    else:
        dist.all_reduce(torch.ones(64))  # usual


def crossed():
    one, two = dist.new_group([1, 2], group_desc="one"), dist.new_group([1, 2], group_desc="two")
    first, second = (two, one) if dist.get_rank() == 1 else (one, two)
    if dist.get_rank() in (1, 2):
        dist.all_reduce(torch.ones(4), group=first)  # first
        dist.all_reduce(torch.ones(4), group=second)


def loss(model, batch):
    counted(dist.get_rank())
    shared()
    if together("cross"):
        crossed()
    if (ORDERS / f"always-{{dist.get_rank()}}").exists():
        dist.broadcast(torch.ones(64), 0)
    return cross_entropy_sum(model(batch["input_ids"]).logits, batch["labels"])


pipeline = Pipeline(loss=loss)
"""
LIMIT_SECONDS = 3.0
"""diagnostics.hang_seconds; what it adapts to is shorter here."""
ALLOWED_SECONDS = LIMIT_SECONDS + 10.0


class Calling(Run):
    """A run that takes orders."""

    def order(self, name: str) -> dict[str, Any]:
        """Have a call go wrong; the incident that follows."""
        seen = len(self.lines("incidents"))
        self.until_step(self.step + 12)
        (self.directory.parent / "orders" / name).touch()
        return self.incident(seen)

    def place(self, comment: str) -> str:
        """Where the module makes a call, as messages have it."""
        lines = (self.directory.parent / "calling.py").read_text().splitlines()
        return f"(calling.py:{next(n for n, line in enumerate(lines, 1) if line.endswith(f'# {comment}'))})"

    def verdict(self) -> dict[str, Any]:
        document = self.document("diagnosis")
        assert document["state"] == "hung" and len(document["verdicts"]) == 1
        return document["verdicts"][0]


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.campaign)])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Calling]:
    folder = tmp_path_factory.mktemp("calls")
    (folder / "orders").mkdir()
    (folder / "calling.py").write_text(MODULE.format(orders=str(folder / "orders")))
    job = write_job(
        folder / "job.toml", run={"steps": 100000, "pipeline": "calling:pipeline"},
        cluster={"workers_per_node": 4 // request.param, "nodes": request.param},
        diagnostics={"dashboard": False, "hang_seconds": LIMIT_SECONDS},
    )  # fmt: skip
    run = Calling(folder / "run", job)
    run.launch()
    try:
        run.until_step(5)
        yield run
    finally:
        run.end()
    assert run.leftovers() == []


def check(incident: dict[str, Any], kind: str, *ranks: int) -> None:
    print(incident["detected_seconds"], incident["recovered_seconds"], incident["message"])
    assert (incident["kind"], incident["ranks"], incident["action"]) == (kind, list(ranks), "restart")
    assert incident["detected_seconds"] < ALLOWED_SECONDS
    assert incident["recovered_seconds"] > 0 and incident["steps_lost"] <= 1


def test_a_rank_that_skips_a_call_is_named_with_the_call_it_left_out(run: Calling) -> None:
    incident = run.order("skip-1")
    check(incident, "worker_hang", 1)
    assert f"left out all_reduce at counted {run.place('skipped')}" in incident["message"]
    assert f"rank 1 calls all_gather(float32 16) at counted {run.place('after it')}" in incident["message"]
    verdict = run.verdict()
    assert (verdict["cause"], verdict["action"]) == ("mismatched_collective", "none")
    assert [one["rank"] for one in verdict["culprits"]] == [1] and verdict["victims"] == [0, 2, 3]


def test_a_rank_that_makes_another_call_is_named_with_both_sites(run: Calling) -> None:
    incident = run.order("type-2")
    check(incident, "worker_hang", 2)
    assert f"rank 0 calls all_reduce(float32 64) at shared {run.place('usual')}" in incident["message"]
    assert f"rank 2 calls broadcast(root 0, float32 64) at shared {run.place('other type')}" in incident["message"]
    assert any("/calling.py:" in line for line in run.verdict()["evidence"])


def test_another_shape_ends_a_process_of_gloo_and_is_named_all_the_same(run: Calling) -> None:
    incident = run.order("shape-1")
    check(incident, "worker_exit", 1)
    assert "SIGABRT" in incident["message"]
    assert f"rank 1 calls all_reduce(float32 8) at shared {run.place('other shape')}" in incident["message"]
    assert f"rank 0 calls all_reduce(float32 64) at shared {run.place('usual')}" in incident["message"]
    assert run.verdict()["cause"] == "mismatched_collective"


def test_two_groups_in_opposite_order_are_traced_to_the_first_wait(run: Calling) -> None:
    incident = run.order("cross")
    check(incident, "worker_hang", 1, 2)
    message = incident["message"].partition("deadlock, the first wait first: ")[2]
    assert message.count(f"at crossed {run.place('first')}") == 2, incident["message"]
    assert "group one" in message and "group two" in message
    verdict = run.verdict()
    assert (verdict["cause"], verdict["kind"], verdict["action"]) == ("hang", "code", "none")


@pytest.mark.campaign
def test_the_same_mismatch_at_the_same_step_stops_the_job(run: Calling) -> None:
    incident = run.order("always-2")
    assert (incident["kind"], incident["ranks"], incident["action"]) == ("worker_hang", [2], "stop")
    assert run.wait() == 1
    assert "twice at the same step" in run.document("status")["message"]
