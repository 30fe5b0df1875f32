"""Diagnoses of made-up jobs whose trouble is known, and of jobs that have none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.diagnostics.test_replay import COMPUTES, TRACES, sample, slower
from tests.diagnostics.test_trace import written
from tests.diagnostics.traces import LENGTHS, Job, Seconds
from trainrt.diagnostics.replay.trace import OPTYPES, Trace
from trainrt.diagnostics.replay.whatif import diagnose, diagnose_trace
from trainrt.diagnostics.verdict import ACTIONS, CAUSES, KINDS, Diagnosis, Verdict
from trainrt.errors import DiagnosticsError


def only(found: Diagnosis) -> Verdict:
    assert found.state == "straggling"
    assert [verdict.cause for verdict in found.verdicts] == [found.verdicts[0].cause], found.verdicts
    verdict = found.verdicts[0]
    assert verdict.cause in CAUSES and verdict.action in ACTIONS and verdict.kind in KINDS
    assert 0 < verdict.confidence <= 1 and 0 < verdict.share < 1 and verdict.evidence and verdict.sentence
    json.dumps(found.to_json())
    return verdict


def places(verdict: Verdict) -> set[tuple[int | None, int | None]]:
    return {(culprit.stage, culprit.dp_rank) for culprit in verdict.culprits}


@pytest.mark.parametrize("noise", [0.0, 0.02])
@pytest.mark.parametrize(
    "job", [{}, {"dp": 1}, {"dp": 2}, {"pp": 1}, {"pp": 2, "dp": 2}, {"vpp": 2}, {"dp": 16, "steps": 8}]
)
def test_a_job_without_trouble_is_healthy(job: dict[str, Any], noise: float) -> None:
    found = diagnose(Job(noise=noise, **job).trace())
    assert found.state == "healthy"
    assert not found.verdicts
    assert found.slowdown == pytest.approx(1, abs=0.08)


@pytest.mark.parametrize("job", [{}, {"dp": 2}, {"dp": 3, "pp": 2}, {"vpp": 2, "noops": True}, {"dp": 16, "steps": 3}])
@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_a_slow_worker_is_named(job: dict[str, Any], noise: float) -> None:
    verdict = only(
        diagnose(Job(noise=noise, seconds=slower({"stage": 1, "replica": 1}, 1.5, *COMPUTES), **job).trace())
    )
    assert (verdict.cause, verdict.action, places(verdict)) == ("slow_worker", "evict", {(1, 1)})
    assert verdict.culprits[0].rank == job.get("dp", 4) + 1
    assert set(verdict.victims) == set(range(job.get("dp", 4) * job.get("pp", 4))) - {verdict.culprits[0].rank}


def test_what_a_slow_worker_costs_in_closed_form() -> None:
    k, microbatches, steps = 1.5, 8, 4
    found = diagnose(Job(dp=4, pp=1, microbatches=microbatches, seconds=slower({"replica": 2}, k, *COMPUTES)).trace())
    verdict = only(found)
    work = microbatches * (LENGTHS["forward-compute"] + LENGTHS["backward-compute"])
    rest = LENGTHS["params-all-gather"] + LENGTHS["grads-reduce-scatter"] + LENGTHS["optimizer"]
    assert verdict.seconds_a_step == pytest.approx((k - 1) * work)
    assert verdict.share == pytest.approx((k - 1) * work / (k * work + rest))
    assert verdict.cost_device_hours == pytest.approx((k - 1) * work * steps * 4 / 3600)


def test_two_slow_workers_are_one_verdict_as_neither_alone_costs_anything() -> None:
    def seconds(job: Job, name: str, stage: int, chunk: int, microbatch: int, usual: Seconds) -> Seconds:
        if name not in COMPUTES or stage != 2:
            return usual
        return usual * np.array([1, 1.4, 1, 1, 1.4, 1, 1, 1])

    assert places(only(diagnose(Job(dp=8, seconds=seconds).trace()))) == {(2, 1), (2, 4)}


@pytest.mark.parametrize("job", [{}, {"dp": 1}, {"dp": 2}, {"vpp": 2}])
def test_a_long_last_stage_is_to_be_repartitioned(job: dict[str, Any]) -> None:
    verdict = only(diagnose(Job(noise=0.02, seconds=slower({"stage": 3}, 1.6, *COMPUTES), **job).trace()))
    assert (verdict.cause, verdict.action, verdict.kind) == ("stage_imbalance", "repartition", "stage")
    assert places(verdict) == {(3, replica) for replica in range(job.get("dp", 4))}
    if job.get("dp") == 1:
        assert verdict.confidence < 0.6


def lengths(job: Job, name: str, stage: int, chunk: int, microbatch: int, usual: Seconds) -> Seconds:
    """Each microbatch of each replica has its length, the same in all stages, forward and backward."""
    if name not in COMPUTES:
        return usual
    random = np.random.default_rng([job.seed, microbatch])
    return usual * random.lognormal(0, 0.4, usual.shape)


@pytest.mark.parametrize("job", [{}, {"pp": 1}, {"vpp": 2}, {"dp": 8, "steps": 6}, {"dp": 1, "pp": 4}])
def test_sequences_of_unequal_lengths_are_to_be_rebalanced(job: dict[str, Any]) -> None:
    verdict = only(diagnose(Job(noise=0.01, seconds=lengths, **job).trace()))
    assert (verdict.cause, verdict.action, verdict.kind, places(verdict)) == (
        "sequence_imbalance",
        "rebalance",
        "workload",
        set(),
    )


def test_what_unequal_sequences_cost_in_closed_form() -> None:
    """Without a pipeline the step waits for the replica with most work; balanced, all have the same."""
    job = Job(dp=4, pp=1, microbatches=4, steps=30, seconds=lengths)
    verdict = only(diagnose(job.trace()))
    work = np.zeros((30, 4))
    for microbatch in range(4):
        for name in COMPUTES:
            work += lengths(job, name, 0, 0, microbatch, np.full((30, 4), LENGTHS[name]))
    assert verdict.seconds_a_step == pytest.approx(work.max(axis=1).mean() - work.mean())


@pytest.mark.parametrize("pp", [1, 4])
def test_a_replica_that_always_gets_long_sequences_is_no_slow_device(pp: int) -> None:
    """Its short microbatches take as long as others' (no pipeline), or all its stages are as slow (pipeline)."""

    def seconds(job: Job, name: str, stage: int, chunk: int, microbatch: int, usual: Seconds) -> Seconds:
        usual = lengths(job, name, stage, chunk, microbatch, usual).copy() if pp > 1 else usual.copy()
        if name in COMPUTES and (pp > 1 or microbatch % 2):
            usual[:, 3] *= 1.8
        return usual

    verdict = only(diagnose(Job(dp=6, pp=pp, steps=6, seconds=seconds, noise=0.01).trace()))
    assert (verdict.cause, verdict.action) == ("sequence_imbalance", "rebalance")
    assert verdict.share > 0.2


def test_variation_that_forward_and_backward_do_not_share_is_no_matter_of_sequences() -> None:
    """A negative control: the same spread, drawn anew for each operation."""
    found = diagnose(Job(noise=0.4).trace())
    assert found.slowdown is not None and found.slowdown > 1.1
    assert found.state == "straggling" and not found.verdicts
    assert any("no single cause" in note for note in found.notes)


@pytest.mark.parametrize("seed", range(3))
def test_among_many_workers_that_vary_the_slowest_by_chance_is_not_blamed(seed: int) -> None:
    found = diagnose(Job(dp=64, pp=1, microbatches=2, steps=3, noise=0.3, seed=seed).trace())
    assert found.state == "straggling" and not found.verdicts


@pytest.mark.parametrize("seed", range(8))
def test_a_replica_that_gets_long_sequences_by_chance_is_no_slow_device(seed: int) -> None:
    found = diagnose(Job(dp=8, pp=1, microbatches=2, steps=6, noise=0.02, seed=seed, seconds=lengths).trace())
    assert [verdict.cause for verdict in found.verdicts] == ["sequence_imbalance"]


def test_a_slow_worker_among_unequal_sequences_is_told_from_them() -> None:
    def seconds(job: Job, name: str, stage: int, chunk: int, microbatch: int, usual: Seconds) -> Seconds:
        usual = lengths(job, name, stage, chunk, microbatch, usual).copy()
        if name in COMPUTES and stage == 2:
            usual[:, 5] *= 1.8
        return usual

    found = diagnose(Job(dp=8, steps=6, seconds=seconds).trace())
    by_cause = {verdict.cause: verdict for verdict in found.verdicts}
    assert set(by_cause) == {"slow_worker", "sequence_imbalance"}
    assert places(by_cause["slow_worker"]) == {(2, 5)}
    assert [verdict.share for verdict in found.verdicts] == sorted((v.share for v in found.verdicts), reverse=True)


@pytest.mark.parametrize("pp", [2, 4])
def test_a_replica_that_is_slow_in_all_stages_though_its_microbatches_are_alike_is_slow_workers(pp: int) -> None:
    verdict = only(diagnose(Job(noise=0.02, pp=pp, seconds=slower({"replica": 2}, 1.4, *COMPUTES)).trace()))
    assert (verdict.cause, places(verdict)) == ("slow_worker", {(stage, 2) for stage in range(pp)})


def test_a_long_stage_and_a_slow_worker_in_another_are_told_apart() -> None:
    long, slow = slower({"stage": 3}, 1.5, *COMPUTES), slower({"stage": 0, "replica": 1}, 1.9, *COMPUTES)
    found = diagnose(Job(noise=0.02, seconds=lambda *of: slow(*of[:5], long(*of))).trace())
    by_cause = {verdict.cause: verdict for verdict in found.verdicts}
    assert {cause: places(verdict) for cause, verdict in by_cause.items()} == {
        "stage_imbalance": {(3, d) for d in range(4)}, "slow_worker": {(0, 1)},
    }  # fmt: skip
    assert "once the other causes are gone" in by_cause["stage_imbalance"].sentence
    assert "once the other causes are gone" not in by_cause["slow_worker"].sentence


def on_links(*links: tuple[int, int]) -> Any:
    """Transfers 40 times as long between stage s and s + 1 in replica d, both ways, for (s, d)."""

    def seconds(job: Job, name: str, stage: int, chunk: int, microbatch: int, usual: Seconds) -> Seconds:
        usual = usual.copy()
        for low, replica in links:
            if (name == "forward" and stage == low) or (name == "backward" and stage == low + 1):
                usual[:, replica] *= 40
        return usual

    return seconds


def test_a_slow_link_is_named_by_its_ends() -> None:
    verdict = only(diagnose(Job(noise=0.02, seconds=on_links((1, 2))).trace()))
    assert (verdict.cause, verdict.action, verdict.kind) == ("slow_link", "check_network", "link")
    assert places(verdict) == {(1, 2), (2, 2)}


def test_a_worker_all_of_whose_links_are_slow_has_a_slow_nic() -> None:
    verdict = only(diagnose(Job(noise=0.02, pp=5, seconds=on_links((1, 3), (2, 3))).trace()))
    assert (verdict.cause, verdict.action, places(verdict)) == ("slow_nic", "check_network", {(2, 3)})


def test_a_replica_all_of_whose_links_are_slow_has_slow_links_and_no_slow_nic() -> None:
    verdict = only(diagnose(Job(noise=0.02, seconds=on_links((0, 3), (1, 3), (2, 3))).trace()))
    assert (verdict.cause, places(verdict)) == ("slow_link", {(stage, 3) for stage in range(4)})


def test_a_stage_whose_replicas_exchange_slowly_is_named() -> None:
    verdict = only(diagnose(Job(noise=0.02, seconds=slower({"stage": 0}, 8, "grads-reduce-scatter")).trace()))
    assert (verdict.cause, verdict.action) == ("slow_link", "check_network")
    assert places(verdict) == {(0, replica) for replica in range(4)}


def test_garbage_collected_at_different_times_is_to_be_planned() -> None:
    def seconds(job: Job, name: str, stage: int, chunk: int, microbatch: int, usual: Seconds) -> Seconds:
        if name != "gc":
            return usual
        random = np.random.default_rng([job.seed, stage])
        return np.where(random.random(usual.shape) < 0.2, 0.4, 0.0)

    job = Job(steps=8, seconds=seconds, post=("gc", "grads-reduce-scatter", "optimizer"))
    verdict = only(diagnose(job.trace()))
    assert (verdict.cause, verdict.action, verdict.kind) == ("garbage_collection", "plan_gc", "code")


def test_too_little_is_unknown_and_says_what_is_missing() -> None:
    slow = slower({"stage": 1, "replica": 1}, 2.0, *COMPUTES)
    found = diagnose(Job(steps=2, seconds=slow).trace())
    assert (found.state, found.verdicts, found.slowdown) == ("unknown", (), None)
    assert "2 whole steps" in found.notes[-1]
    columns = Job(seconds=slow).columns()
    keep = columns["optype"] != OPTYPES.index("forward-recv")
    found = diagnose(Trace.of({name: values[keep] for name, values in columns.items()}))
    assert (found.state, found.verdicts) == ("unknown", ())
    assert "forward-recv" in found.notes[-1]


def test_time_outside_of_operations_is_said_and_lowers_confidence(tmp_path: Path) -> None:
    """Steps with a gap that nothing recorded: the replay is shorter, and says by how much."""
    columns = Job(seconds=slower({"stage": 1, "replica": 1}, 1.5, *COMPUTES)).columns()
    whole = diagnose_trace(written(tmp_path / "whole.parquet", columns))
    late = columns["start_ts"] - 1000.0 * (columns["step"] - 7) > 1.0
    columns["start_ts"] = columns["start_ts"] + np.where(late, 1.0, 0.0)
    gap = diagnose_trace(written(tmp_path / "gap.csv", columns))
    assert any("confidence is halved" in note for note in gap.notes)
    assert gap.verdicts[0].confidence < 0.6 * whole.verdicts[0].confidence


def test_a_file_that_is_no_trace_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DiagnosticsError, match="dp_rank"):
        diagnose_trace(tmp_path / "t.csv")


@sample
def test_the_sample_is_slowed_by_its_last_stage() -> None:
    found = diagnose_trace(TRACES / "trace-ST.parquet")
    verdict = only(found)
    assert (verdict.cause, verdict.action, places(verdict)) == ("stage_imbalance", "repartition", {(3, 0), (3, 1)})
    assert found.slowdown == pytest.approx(1.179, rel=0.01)
    assert found.metrics["M_S"] == pytest.approx(1.22, rel=0.01)
    assert found.metrics["M_W"] == pytest.approx(0.0314, rel=0.01)
    assert (found.first_step, found.last_step) == (23, 1048)
