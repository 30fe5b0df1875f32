"""Steps that are not to be believed: numbers that are none or far off, replicas that are not equal any more."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.jobs import engine, job, train
from tests.launch.runs import Run, write_job
from tests.ranks import run_ranks
from trainrt.checkpoint.inspect import inspect
from trainrt.errors import Anomaly, ReplicasDiffer
from trainrt.training.integrity import ENOUGH, WINDOW, Numbers, Replicas, compare, digest, lines_before, spike

# Numbers.


def falling(steps: int) -> list[float]:
    """A loss as it falls at the beginning, with some noise."""
    return [1.0 + 5.0 * math.exp(-step / 30) + 0.1 * math.sin(7 * step) for step in range(steps)]


def test_a_spike_is_many_times_what_is_usual_and_nothing_less() -> None:
    before = [2.0 + 0.01 * (step % 5) for step in range(40)]
    assert spike(4.5, before, least_spread=0.05)
    assert not spike(3.9, before, least_spread=0.05), "the values hardly vary: the least spread holds"
    assert not spike(0.0, before, least_spread=0.05), "downwards is no spike"
    noisy = [1.0, 3.0] * 20
    assert not spike(20.0, noisy, least_spread=0.05)
    assert spike(40.0, noisy, least_spread=0.05)
    assert not spike(1e9, before[: ENOUGH - 1], least_spread=0.05), "too few to say"


def test_one_outlier_among_those_before_changes_little() -> None:
    before = [2.0 + 0.01 * (step % 5) for step in range(40)]
    assert spike(4.5, [*before, 1e9], least_spread=0.05)


def test_an_ordinary_run_is_believed_and_a_spike_in_it_is_not() -> None:
    numbers = Numbers()
    for step, loss in enumerate(falling(300)):
        numbers.check(step, {"loss": loss, "grad_norm": 0.5 + 0.4 * math.sin(step)})
    with pytest.raises(Anomaly, match="grad_norm is far above what it was"):
        numbers.check(300, {"loss": 1.0, "grad_norm": 50.0})
    with pytest.raises(Anomaly, match=r"loss = 9\.0, grad_norm = 0\.1: loss is far above"):
        numbers.check(300, {"loss": 9.0, "grad_norm": 0.1})
    for bad in (math.nan, math.inf):
        with pytest.raises(Anomaly, match=f"loss = {bad}"):
            numbers.check(300, {"loss": bad, "grad_norm": 1.0})
    numbers.check(300, {"loss": 1.0, "grad_norm": 0.5})


def test_what_was_usual_outlives_the_process(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"step": step, "loss": loss, "grad_norm": 1.0, "incarnation": 1} for step, loss in enumerate(falling(9000))
    ]
    replayed = {"step": 8990, "loss": None, "grad_norm": None, "incarnation": 2}
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, replayed]) + '{"step": 90')
    found = lines_before(path, 8995)
    assert [line["step"] for line in found] == list(range(8996 - WINDOW, 8996))
    assert next(line for line in found if line["step"] == 8990)["incarnation"] == 2
    with pytest.raises(Anomaly):
        Numbers(found).check(8996, {"loss": 100.0, "grad_norm": 1.0})
    assert lines_before(tmp_path / "none", 5) == [] and lines_before(path, -1) == []


# Replicas.


def test_the_odd_one_is_named_by_majority_and_all_where_there_is_none() -> None:
    assert compare(["a", "b"], [[1, 2], [1, 2], [1, 2]]) is None
    odd = compare(["a", "b"], [[1, 2], [1, 2], [1, 3]])
    assert odd is not None and (odd.names, odd.replicas, odd.odd) == (("b",), (2,), True)
    both = compare(["a", "b"], [[1, 2], [5, 2]])
    assert both is not None and (both.names, both.replicas, both.odd) == (("a",), (0, 1), False)
    halves = compare(["a"], [[1], [1], [2], [2]])
    assert halves is not None and (halves.replicas, halves.odd) == ((0, 1, 2, 3), False)
    two = compare(["a", "b"], [[1, 2], [7, 2], [1, 2], [1, 9], [1, 2]])
    assert two is not None and two.replicas == (1, 3)


def test_a_digest_is_of_every_bit() -> None:
    tensor = torch.arange(12.0).reshape(3, 4)
    before = digest(tensor)
    assert digest(tensor.clone()) == before and -(2**63) <= before < 2**63
    tensor.view(torch.int32)[2, 3] ^= 1
    assert digest(tensor) != before
    assert digest(torch.zeros(0)) == digest(torch.zeros(0)) and isinstance(digest(torch.tensor(1.0)), int)


def replicas_after_a_flip(rank: int, mesh: dict[str, int], flipped: int) -> tuple[list[str], str, tuple[int, ...]]:
    """Train a little (replicas stay equal), flip one bit on one rank: (compared parameters, message, blamed ranks)."""
    config = job("moe_lm", mesh=mesh)
    made = engine(config, rank)
    replicas = Replicas(made)
    for step in range(1, 4):
        train(made, config, steps=1, first=step)
        replicas.check(step)
    if rank == flipped:
        name = replicas.names[5]
        made.local[name].detach().view(-1).view(torch.int32)[-1] ^= 1
    try:
        replicas.check(4)
    except ReplicasDiffer as error:
        return replicas.names, str(error), error.ranks
    return replicas.names, "", ()


def test_of_three_replicas_the_one_with_the_flipped_bit_is_named() -> None:
    for names, message, ranks in run_ranks(3, replicas_after_a_flip, {"dp": 3}, 1):
        assert ranks == (1,)
        assert f"rank 1 differs from most of 3 replicas in {names[5]} (xxh3 " in message


def test_with_shards_beside_replicas_only_those_that_hold_the_same_are_compared() -> None:
    results = run_ranks(4, replicas_after_a_flip, {"dp": 2, "fsdp": 2}, 3)
    assert [ranks for _, _, ranks in results] == [(), (1, 3), (), (1, 3)]
    assert "ranks 1, 3 differ from each other, and no majority says who is right" in results[1][1]


def test_spread_experts_and_pure_shards_have_no_replicas() -> None:
    names, _, _ = run_ranks(4, replicas_after_a_flip, {"dp": 2, "fsdp": 2, "ep": 2}, 0)[0]
    assert names and not any("experts" in name for name in names)


# The job goes back, and comes to the same end.

MODULE = """
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from trainrt import Pipeline
from trainrt.training.objectives import cross_entropy_sum

ORDERS = Path({orders!r})


def asked(order):
    path = ORDERS / f"{{order}}-{{dist.get_rank()}}"
    if path.exists():
        path.unlink()
        return True
    return False


def flip_a_bit(model):
    local = next(p for p in model.parameters() if isinstance(p, DTensor)).to_local().detach()
    local.view(-1).view(torch.int32)[0] ^= 1 << 20


def loss(model, batch):
    if asked("flip"):
        flip_a_bit(model)
    total, weight = cross_entropy_sum(model(batch["input_ids"]).logits, batch["labels"])
    if asked("nan") or (ORDERS / f"always_nan-{{dist.get_rank()}}").exists():
        total = total * float("nan")
    return (total * 1000 if asked("spike") else total), weight


pipeline = Pipeline(loss=loss)
"""
STEPS = 100


class Doubted(Run):
    """A run whose numbers and replicas go wrong when asked to."""

    def order(self, name: str, rank: int) -> dict[str, Any]:
        seen = len(self.lines("incidents"))
        (self.directory.parent / "orders" / f"{name}-{rank}").touch()
        return self.incident(seen)

    def digests(self) -> dict[tuple[str, str], str]:
        """Every tensor of the last checkpoint."""
        document = inspect(self.directory / "checkpoints" / f"step-{STEPS:08d}")
        return {(tensor["name"], tensor["role"]): tensor["digest"] for tensor in document["tensors"]}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "orders").mkdir()
    (tmp_path / "doubtful.py").write_text(MODULE.format(orders=str(tmp_path / "orders")))
    write_doubtful(tmp_path, every=1)
    yield tmp_path


def write_doubtful(folder: Path, *, every: int) -> None:
    """A job of two replicas, compared every so many steps."""
    write_job(
        folder / "job.toml", run={"steps": STEPS, "pipeline": "doubtful:pipeline"}, parallel={"mode": "explicit", "dp": 2},
        cluster={"nodes": 1, "workers_per_node": 2}, optimizer={"non_finite": "rollback", "warmup_steps": 2},
        diagnostics={"dashboard": False, "corruption_check_every": every}, checkpoint={"every": every if every > 1 else 0},
    )  # fmt: skip


def test_anomalies_are_rolled_back_and_the_end_is_the_same_bit_for_bit(folder: Path) -> None:
    run, plain = Doubted(folder / "run", folder / "job.toml"), Doubted(folder / "plain", folder / "job.toml")
    try:
        run.launch()
        run.until_step(ENOUGH + 4)
        for name, rank, kind, ranks in (
            ("nan", 1, "non_finite", [0, 1]), ("spike", 0, "non_finite", [0, 1]), ("flip", 1, "silent_corruption", [0, 1]),
        ):  # fmt: skip
            incident = run.order(name, rank)
            assert (incident["kind"], incident["ranks"]) == (kind, ranks), incident
            assert (incident["action"], incident["restored_from"], incident["steps_lost"]) == ("rollback", "memory", 0)
        assert run.wait() == 0
        assert len(run.lines("incidents")) == 3
        plain.launch()
        assert plain.wait() == 0
        assert plain.lines("incidents") == []
        assert run.digests() == plain.digests()
        losses = [[(line["step"], line["loss"]) for line in each.lines("metrics")] for each in (run, plain)]
        assert losses[0] == losses[1] and len(losses[0]) == STEPS
        assert run.leftovers() == [] and plain.leftovers() == []
    finally:
        run.end()
        plain.end()


@pytest.mark.campaign
def test_what_was_kept_since_the_last_comparison_is_not_believed_and_the_same_nan_again_stops(folder: Path) -> None:
    write_doubtful(folder, every=10)
    run = Doubted(folder / "run", folder / "job.toml").launch()
    try:
        run.until(lambda: (folder / "run" / "checkpoints" / "step-00000010").exists(), "a checkpoint")
        incident = run.order("flip", 1)
        assert (incident["kind"], incident["action"]) == ("silent_corruption", "rollback")
        assert incident["step"] % 10 == 9 and incident["steps_lost"] % 10 == 9
        run.until_step(incident["step"] + 5)
        assert len(run.lines("incidents")) == 1, "the replicas are equal again"
        incident = run.order("always_nan", 0)
        assert (incident["kind"], incident["action"]) == ("non_finite", "stop")
        assert run.wait() == 1
        message = run.document("status")["message"]
        assert "loss = nan" in message and "the same again, bit for bit" in message and "deterministic" in message
    finally:
        run.end()
