"""Detectors on simulated steps whose truth is known; each kind of answer, and what must not be said."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.diagnosis_scores import between, score, told
from benchmarks.simulated_faults import SCENARIOS, Instance, instance
from benchmarks.simulated_jobs import Conditions, Job, simulate
from trainrt.config import MeshSize
from trainrt.diagnostics.detect import detect
from trainrt.diagnostics.detectors.levels import find_shift
from trainrt.diagnostics.detectors.polish import polish
from trainrt.diagnostics.detectors.window import robust_slopes
from trainrt.diagnostics.table import Roles, StepTable
from trainrt.diagnostics.verdict import ACTIONS, CAUSES, KINDS, STATES, Diagnosis

RANKS = 128
NOTHING = ("clean", "one stall", "clock skew", "missing telemetry")
LATE = {"slow rank 2%"}
"""Below what a verdict is made for."""


def table_of(case: Instance, *, conditions: Conditions | None = None) -> StepTable:
    return simulate(case.job, case.steps, case.conditions if conditions is None else conditions, seed=case.seed)


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name not in NOTHING and name not in LATE])
def test_what_is_wrong_is_named_with_its_place_cause_and_remedy(name: str) -> None:
    """Negative control: the same job without the fault."""
    case = instance(name, RANKS, 4)
    table = between(table_of(case), 0, case.since + max(case.windows))
    found = detect(table)
    assert score(told(found, table), case.truths).right, found.verdicts
    assert found.state in STATES and found.slowdown is not None and found.slowdown > 1
    for verdict in found.verdicts:
        assert verdict.cause in CAUSES and verdict.action in ACTIONS and verdict.kind in KINDS
        assert 0 < verdict.share <= 1 and 0 < verdict.confidence <= 1 and verdict.sentence and verdict.evidence
        assert not set(verdict.victims) & {culprit.rank for culprit in verdict.culprits if verdict.kind == "rank"}
    if case.job.documents != "packed" and name != "last stage":
        healthy = detect(between(table_of(case, conditions=Conditions()), 0, case.since + max(case.windows)))
        assert healthy.state == "healthy" and not healthy.verdicts


@pytest.mark.parametrize("name", NOTHING)
@pytest.mark.parametrize("seed", range(4))
def test_where_nothing_is_wrong_nothing_is_said(name: str, seed: int) -> None:
    case = instance(name, RANKS, seed)
    for window in case.windows:
        found = detect(between(table_of(case), 0, case.since + window))
        assert found.state == "healthy" and not found.verdicts, found.verdicts


def test_two_culprits_give_two_verdicts_with_shares() -> None:
    case = instance("two stragglers", RANKS, 0)
    found = detect(table_of(case))
    assert [verdict.cause for verdict in found.verdicts] in (["slow_worker", "slow_data"], ["slow_data", "slow_worker"])
    assert found.step_seconds is not None and found.ideal_step_seconds is not None
    lost = sum(verdict.seconds_a_step for verdict in found.verdicts)
    assert found.ideal_step_seconds == pytest.approx(found.step_seconds - lost, rel=1e-6)


def test_the_share_is_what_the_same_job_without_the_fault_is_faster_by() -> None:
    job = Job(MeshSize(fsdp=RANKS))
    compute = np.ones((20, RANKS))
    compute[:, 5] = 1.5
    slow, well = (simulate(job, 20, conditions, seed=1) for conditions in (Conditions(compute=compute), Conditions()))
    (verdict,) = detect(slow).verdicts
    truth = 1 - float(np.median(well.seconds)) / float(np.median(slow.seconds))
    assert verdict.share == pytest.approx(truth, abs=0.03) and verdict.culprits[0].rank == 5
    assert verdict.cost_device_hours == pytest.approx(verdict.seconds_a_step * 20 * RANKS / 3600)


def test_a_clock_that_is_wrong_changes_nothing() -> None:
    case = instance("slow rank 20%", RANKS, 0)
    ahead = replace(case.conditions, clock=np.where(np.arange(RANKS) < 8, 3.0, 0.0))
    assert detect(table_of(case, conditions=ahead)) == detect(table_of(case))


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_few_steps_are_not_enough_data(steps: int) -> None:
    found = detect(simulate(Job(MeshSize(fsdp=8)), 5, seed=0).last(steps))
    assert found.state == "unknown" and not found.verdicts and "not enough data" in found.notes[0]


def test_ranks_that_are_not_heard_are_said_and_not_blamed() -> None:
    silent = np.zeros((20, RANKS), dtype=bool)
    silent[:, 7] = True
    found = detect(simulate(Job(MeshSize(fsdp=RANKS)), 20, Conditions(missing=silent), seed=0))
    assert found.state == "healthy" and found.notes == [f"no telemetry of 1 of {RANKS} ranks"]


def test_one_rank_alone_is_healthy() -> None:
    assert detect(simulate(Job(MeshSize()), 20, seed=0)).state == "healthy"


def test_labels_decide_whom_a_verdict_names() -> None:
    """Negative control: the same numbers, with two ranks in each other's place."""
    case = instance("slow rank 20%", RANKS, 0)
    (rank,) = case.truths[0].ranks
    table, order = table_of(case), np.arange(RANKS)
    order[[rank, (rank + 64) % RANKS]] = order[[(rank + 64) % RANKS, rank]]
    changed = replace(
        table, seconds=table.seconds[:, order], start=table.start[:, order],
        **{kind: {name: values[:, order] for name, values in getattr(table, kind).items()}
           for kind in ("parts", "communication", "work")},
    )  # fmt: skip
    assert [c.rank for c in detect(changed).verdicts[0].culprits] == [(rank + 64) % RANKS]


def test_a_diagnosis_is_its_document() -> None:
    found = detect(table_of(instance("slow link", RANKS, 0)))
    assert Diagnosis.from_json(found.to_json()).to_json() == found.to_json()


def test_effects_of_dimensions_are_told_apart() -> None:
    """A stage that is slow in every replica, and a member that is slow in every stage, in spite of one slow rank."""
    stage, replica, member = (index.reshape(-1) for index in np.indices((4, 8, 2)))
    roles = Roles({}, ("a",), np.zeros(64, dtype=np.int64), {"pp": stage, "fsdp": replica, "tp": member})
    values = 1.0 + 0.3 * (stage == 3) + 0.1 * (member == 1)
    values[5] += 2.0
    found = polish(values, roles)
    assert found["pp"] - found["pp"].min() == pytest.approx([0, 0, 0, 0.3])
    assert np.ptp(found["tp"]) == pytest.approx(0.1) and np.ptp(found["fsdp"]) == pytest.approx(0)


def test_levels_that_change_are_found_and_lines_and_spikes_are_not() -> None:
    noise = np.random.default_rng(0).normal(0, 0.01, 40)
    shift = find_shift(1.0 + 0.1 * (np.arange(40) >= 25) + noise, least=1.05)
    assert shift is not None and abs(shift.index - 25) <= 1 and shift.ratio == pytest.approx(1.1, abs=0.02)
    assert find_shift(1.0 + noise, least=1.05) is None
    assert find_shift(1.0 + 0.01 * np.arange(40) + noise, least=1.05) is None
    assert find_shift(1.0 + 0.5 * (np.arange(40) == 30) + noise, least=1.05) is None


def test_slopes_are_found_among_outliers_and_only_where_they_are_sure() -> None:
    rng = np.random.default_rng(1)
    squares, tokens = rng.normal(0, 1, 500), rng.normal(0, 1, 500)
    target = 0.2 * squares + rng.normal(0, 0.05, 500)
    target[:20] += 5.0
    found = robust_slopes({"squares": squares, "tokens": tokens}, target)
    assert found.keys() == {"squares"} and found["squares"] == pytest.approx(0.2, rel=0.05)
