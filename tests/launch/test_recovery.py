"""What is decided after a fault."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.jobs import job
from trainrt.checkpoint.store.group import Group
from trainrt.checkpoint.store.inventory import Holding
from trainrt.config import MeshSize
from trainrt.errors import PlanError, StoreError
from trainrt.launch.recovery import (
    ROLLBACKS,
    TRIES_WITHOUT_PROGRESS,
    Origin,
    Patience,
    Progress,
    choose_origin,
    largest_world,
    last_compared,
    seat_ranks,
)
from trainrt.launch.symptoms import Fault


def fault(kind: str = "user_error", signature: str | None = "ValueError: no") -> Fault:
    return Fault(kind, "rank 0 (n0): ValueError: no", (0,), ("n0",), signature, 0.0)


def held(step: int, *there: str, parity: tuple[str, ...] = ()) -> Holding:
    """A generation of two nodes with one rank each, of which some are there."""
    seating = {0: "a", 1: "b"}
    holding = Holding(step, 1, seating, (Group(("a", "b"), 1),), parity=set(parity))
    for rank, node in seating.items():
        if node in there:
            holding.data[rank].add(node)
    return holding


def choose(*holdings: Holding, disk: tuple[int, Path] | None = None, can_rebuild: bool = True) -> Origin:
    def rebuild(_: Holding) -> None:
        if not can_rebuild:
            raise StoreError("a store is gone")

    return choose_origin(holdings, disk, rebuild=rebuild)[0]


def test_the_newest_state_is_taken_and_memory_before_disk() -> None:
    disk = (10, Path("step-00000010"))
    assert choose(held(12, "a", "b"), disk=disk).to_json() == {"from": "memory", "step": 12}
    assert choose(held(10, "a", "b"), disk=disk).kind == "memory"
    assert choose(held(9, "a", "b"), disk=disk).to_json() == {"from": "disk", "path": "step-00000010"}
    assert choose(disk=disk).kind == "disk"
    assert choose().to_json() == {"from": "none"}


def test_what_was_lost_is_decoded_where_enough_parity_is_left() -> None:
    decoded = choose(held(12, "a", parity=("a",)), held(11, "a", "b"))
    assert (decoded.kind, decoded.step, decoded.to_json()["from"]) == ("parity", 12, "memory")
    assert choose(held(12, "a"), held(11, "a", "b")) == Origin("memory", 11), "no parity was complete: the one before"
    assert choose(held(12, "a", parity=("a",)), held(11, "a", "b"), can_rebuild=False) == Origin("memory", 11)
    origin, missing = choose_origin([held(12, "b", parity=("a",))], None, rebuild=lambda _: None)
    assert origin.kind == "none" and "lost a of a group of 1 + 1" in missing


def test_the_same_error_at_the_same_step_stops_the_job() -> None:
    patience = Patience()
    assert patience.fault(fault(), completed=7) is None
    assert "twice at the same step" in (patience.fault(fault(), completed=7) or "")


def test_an_error_at_another_step_or_a_kill_at_the_same_one_is_tried_again() -> None:
    patience = Patience()
    assert patience.fault(fault(), completed=7) is None
    assert patience.fault(fault(), completed=8) is None
    assert patience.fault(fault("worker_exit", None), completed=8) is None
    assert patience.fault(fault("worker_exit", None), completed=8) is None


def test_tries_without_progress_are_counted_and_slowed_down() -> None:
    patience, delays, tries = Patience(), [], 0
    while patience.fault(fault("worker_exit", None), completed=3) is None:
        delays.append(patience.delay_seconds)
        tries += 1
    assert tries == TRIES_WITHOUT_PROGRESS - 1
    assert delays[0] == 0 and delays == sorted(delays) and delays[-1] > delays[1] > 0


def test_progress_makes_patience_new() -> None:
    patience = Patience()
    for completed in range(3 * TRIES_WITHOUT_PROGRESS):
        assert patience.fault(fault("worker_exit", None), completed=completed) is None
        assert patience.delay_seconds == 0


def test_a_loss_that_is_no_number_is_not_tried_again() -> None:
    assert Patience().fault(fault("non_finite"), completed=3) is not None


def doubt(value: str) -> Fault:
    """A step that was not believed."""
    return Fault("non_finite", f"step 8: loss = {value}", (0,), ("n0",), f"loss = {value}", 0.0, "rollback")


def test_a_step_that_is_not_believed_is_done_again_unless_it_comes_out_the_same() -> None:
    patience = Patience()
    assert patience.fault(doubt("nan"), completed=7) is None
    assert "bit for bit" in (patience.fault(doubt("nan"), completed=7) or "")
    patience = Patience()
    assert patience.fault(doubt("nan"), completed=7) is None
    assert patience.fault(doubt("nan"), completed=9) is None, "at another step it is another accident"


def test_rollbacks_of_one_step_are_bounded() -> None:
    patience = Patience()
    found = [patience.fault(doubt(str(n)), completed=7) for n in range(ROLLBACKS + 1)]
    assert found[:-1] == [None] * ROLLBACKS and f"after {ROLLBACKS} rollbacks" in (found[-1] or "")
    assert patience.delay_seconds == 0


def test_a_hang_that_comes_again_stops_the_job_and_one_from_outside_does_not() -> None:
    for signature, stops in (("worker_hang (1,) loss (mine.py:3)", True), (None, False)):
        patience = Patience()
        assert patience.fault(fault("worker_hang", signature), completed=7) is None
        assert (patience.fault(fault("worker_hang", signature), completed=7) is not None) is stops


def test_replicas_are_known_to_be_equal_as_of_the_last_comparison() -> None:
    config = job(diagnostics={"corruption_check_every": 10}, checkpoint={"every": 25})
    assert [last_compared(config, completed=n) for n in (0, 9, 10, 24, 25, 29, 30)] == [0, 0, 10, 20, 25, 25, 30]
    every = job(diagnostics={"corruption_check_every": 1}, checkpoint={"every": 0})
    assert last_compared(every, completed=7) == 7


def test_an_explicit_mesh_shrinks_fsdp_then_dp() -> None:
    config = job(mesh={"dp": 2, "fsdp": 4})
    assert largest_world(config, available=8) == MeshSize(dp=2, fsdp=4)
    assert largest_world(config, available=7) == MeshSize(dp=2, fsdp=3)
    assert largest_world(config, available=2) == MeshSize(dp=2, fsdp=1)
    assert largest_world(config, available=1) == MeshSize(dp=1, fsdp=1)


def test_what_tensor_and_expert_parallelism_need_stays() -> None:
    config = job(mesh={"fsdp": 3, "tp": 2})
    assert largest_world(config, available=5) == MeshSize(fsdp=2, tp=2)
    with pytest.raises(PlanError, match="multiple of pp\\*cp\\*tp = 2"):
        largest_world(config, available=1)
    with pytest.raises(PlanError, match="ep = 2"):
        largest_world(job(mesh={"fsdp": 4, "ep": 2}), available=1)


def test_mode_auto_takes_whatever_is_left() -> None:
    config = job(parallel={"mode": "auto"})
    assert largest_world(config, available=3) == 3
    with pytest.raises(PlanError):
        largest_world(config, available=0)


def test_nodes_are_filled_in_order() -> None:
    assert seat_ranks(3, ["n0", "n2"], workers_per_node=2) == {0: "n0", 1: "n0", 2: "n2"}


def test_a_step_is_complete_when_the_last_rank_has_done_it() -> None:
    progress = Progress(2, done=10)
    assert not progress.step(0, 11) and progress.completed == 10
    assert progress.step(1, 11) and progress.completed == 11
    assert not progress.step(0, 12)
