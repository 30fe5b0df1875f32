"""The simulated jobs obey their physics, and answers are scored as they should be."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.diagnosis import RIVALS, by_scenario, by_severity, campaign, confusion, false_alarms, totals
from benchmarks.diagnosis_scores import Claim, between, noise_of, score, told
from benchmarks.simulated_faults import SCENARIOS, SHORT, Truth, instance, meshes
from benchmarks.simulated_jobs import Conditions, Job, Noise, simulate
from benchmarks.simulated_noise import PERCENTILES, TRACES, residuals
from benchmarks.simulated_pipeline import pipeline
from trainrt.diagnostics.table import StepTable
from trainrt.diagnostics.verdict import Culprit, Diagnosis, Verdict
from trainrt.parallel.mesh import MeshSize

QUIET = Noise(scale=0.0, chips=0.0, hosts=0.0, transfers=0.0, own=0.0, jitter=0.0, drift=0.0)
MESHES = ("data", "stages", "experts", "context")


def own(table: StepTable) -> NDArray[np.float64]:
    return np.asarray(sum(table.parts.values()))


def waiting(table: StepTable) -> NDArray[np.float64]:
    return np.asarray(sum(table.communication.values()))


def job_of(mesh: str, noise: Noise, ranks: int = 128) -> Job:
    return replace(meshes(ranks)[mesh], noise=noise)


@pytest.mark.parametrize("name", list(SCENARIOS))
def test_parts_and_communication_add_up_to_the_step(name: str) -> None:
    case = instance(name, 128, 1)
    table = simulate(case.job, case.steps, case.conditions, seed=1)
    assert np.nanmax(np.abs((own(table) + waiting(table)) / table.seconds - 1)) < 1e-6
    kinds: tuple[Mapping[str, NDArray[np.float64]], ...] = (table.parts, table.communication)
    assert all(np.nanmin(seconds) > -1e-9 for kind in kinds for seconds in kind.values())


@pytest.mark.parametrize("mesh", MESHES)
def test_a_slow_rank_raises_its_own_parts_and_the_communication_of_others(mesh: str) -> None:
    job = job_of(mesh, QUIET)
    compute = np.ones(job.ranks)
    compute[77] = 1.2
    usual = simulate(job, 8, seed=3)
    slow = simulate(job, 8, Conditions(compute=compute), seed=3)
    more, waited = own(slow) - own(usual), waiting(slow) - waiting(usual)
    longer = slow.seconds.mean() - usual.seconds.mean()
    others = np.arange(job.ranks) != 77
    compute_seconds = usual.parts["forward"] + usual.parts["backward"]
    np.testing.assert_allclose(more[:, 77], 0.2 * compute_seconds[:, 77], rtol=1e-4)
    np.testing.assert_array_equal(more[:, others], 0)
    assert (waited[:, 77].mean() < 1e-6) and waited[:, others].mean() > 0.9 * longer > 0.01


@pytest.mark.parametrize("mesh", MESHES)
def test_all_ranks_take_as_long_for_a_step(mesh: str) -> None:
    """They differ by what they do after the world has met."""
    seconds = simulate(job_of(mesh, Noise()), 20, seed=0).seconds
    assert (seconds.std(axis=1) / seconds.mean(axis=1)).mean() < 0.01


@pytest.mark.parametrize("mesh", MESHES)
def test_without_faults_and_noise_all_peers_are_alike(mesh: str) -> None:
    job = job_of(mesh, QUIET)
    table = simulate(job, 12, seed=0)
    exchanged = {"rows"} if mesh == "experts" else set()
    assert np.ptp(table.parts["optimizer"], axis=1).max() == 0
    assert np.ptp(table.parts["forward"], axis=1).max() < (0.05 if exchanged else 1e-9)
    assert table.work["tokens"].std() == 0


def test_a_seed_says_all_and_a_fault_moves_no_other_draw() -> None:
    job = job_of("stages", Noise())
    one, same, other = (simulate(job, 6, seed=seed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(one.seconds, same.seconds)
    np.testing.assert_array_equal(one.links.seconds, same.links.seconds)
    assert (one.seconds != other.seconds).all()
    skewed = simulate(job, 6, Conditions(clock=3.0), seed=5)
    np.testing.assert_array_equal(skewed.seconds, one.seconds)
    np.testing.assert_allclose(skewed.start - one.start, 3.0)


def test_steps_follow_each_other_on_the_clock() -> None:
    table = simulate(job_of("context", Noise()), 6, seed=5)
    np.testing.assert_allclose(np.diff(table.start, axis=0), table.seconds[:-1], atol=1e-5)


def test_windows_that_follow_each_other_are_the_same_chips() -> None:
    job = job_of("data", Noise(scale=0.0, jitter=0.0))
    early, late = (simulate(job, 4, seed=1, first=first) for first in (0, 40))
    ratio = late.parts["forward"] / early.parts["forward"]
    assert ratio.std() < 1e-6 and late.steps[0] == 40


def test_all_axes_at_once_add_up() -> None:
    table = simulate(Job(MeshSize(pp=2, dp=2, fsdp=2, cp=2, tp=4, ep=4)), 12, seed=0)
    assert set(table.communication) == {"tp", "cp", "ep", "fsdp", "pp", "dp", "world"}
    assert min(seconds.min() for seconds in table.communication.values()) > 0
    np.testing.assert_allclose(own(table) + waiting(table), table.seconds, rtol=1e-6)


def test_sixteen_thousand_ranks() -> None:
    job = meshes(16384)["stages"]
    table = simulate(replace(job, microbatches=4), 2, seed=0)
    assert table.seconds.shape == (2, 16384) == table.communication["pp"].shape == table.work["squares"].shape
    assert len(table.roles.hosts) == 2048 and table.roles.mesh["tp"] == 8
    assert set(table.roles.coordinates) == {"pp", "fsdp", "tp"}


def test_eight_ranks() -> None:
    table = simulate(Job(MeshSize(fsdp=2, tp=4)), 3, seed=0)
    assert table.seconds.shape == (3, 8) and len(table.links.step) == 0 and set(table.communication) == {
        "tp", "fsdp", "world",
    }  # fmt: skip


def test_stages_without_noise_take_the_time_of_the_formula() -> None:
    """1F1B of equal stages: (M + P - 1) (forward + backward)."""
    ones = np.ones((1, 6, 4, 2))
    ends = pipeline(np.zeros((1, 4, 2)), ones, 2 * ones, np.zeros((1, 4, 2)))
    assert ends[0, 0].tolist() == [3 * (6 + 3)] * 2
    assert ends[0, -1].tolist() == [3 + 3 * 6] * 2, "the last stage is done first"


def test_a_slow_stage_paces_the_pipeline() -> None:
    job = job_of("stages", QUIET)
    usual, slow = (simulate(job, 4, Conditions(stage=stage), seed=0) for stage in (None, np.array([1, 1, 1, 1.3])))
    longer = slow.seconds.mean() - usual.seconds.mean()
    assert longer > 0.28 * (usual.parts["forward"] + usual.parts["backward"]).mean()
    ratio = slow.parts["forward"] / usual.parts["forward"]
    last = slow.roles.coordinates["pp"] == 3
    np.testing.assert_allclose(ratio[:, last], 1.3, rtol=1e-5)
    np.testing.assert_allclose(ratio[:, ~last], 1.0, rtol=1e-5)


def test_members_of_cp_share_the_tokens_and_squares_of_a_sequence() -> None:
    alone, shared = (simulate(job_of(mesh, QUIET), 2, seed=0).work for mesh in ("data", "context"))
    assert (alone["tokens"] == 2 * shared["tokens"]).all() and (alone["squares"] == 2 * shared["squares"]).all()
    assert (alone["rows"] == 0).all()


def test_a_slow_link_slows_the_groups_whose_ring_it_is_in_and_its_own_transfers() -> None:
    job = Job(MeshSize(dp=4, fsdp=32), noise=QUIET)
    usual, slow = (simulate(job, 3, Conditions(links=links), seed=0) for links in ({}, {(4, 5): 4.0}))
    more = (slow.communication["fsdp"] - usual.communication["fsdp"]).mean(0)
    assert more[32:64].min() > 0.1 and np.abs(more[:32]).max() < 1e-9
    ratio = slow.links.seconds / usual.links.seconds
    between_them = (slow.links.source == 4) & (slow.links.target == 5)
    assert ratio[between_them].min() == 4.0 and ratio[~between_them].max() == 1.0


def test_long_documents_take_longer_for_as_many_tokens() -> None:
    job = replace(job_of("data", QUIET), **SHORT)
    squares = np.ones(job.ranks)
    squares[9] = 8.0
    table = simulate(job, 2, Conditions(squares=squares), seed=0)
    assert np.ptp(table.work["tokens"]) == 0 and table.work["squares"][0, 9] == 8 * table.work["squares"][0, 8]
    assert table.parts["forward"][0, 9] == pytest.approx(1.5 / 1.0625 * table.parts["forward"][0, 8], rel=1e-5)


def test_residuals_are_those_of_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TRACES, raising=False)
    drawn = residuals()
    assert drawn.std() == pytest.approx(0.0153, abs=0.0002) and abs(drawn.mean()) < 1e-6
    assert np.ptp(drawn) == pytest.approx(PERCENTILES[-1] - PERCENTILES[0], rel=0.01)
    np.savetxt(tmp_path / "real.txt", [-0.01, 0.01])
    assert np.abs(residuals(tmp_path / "real.txt")).min() == pytest.approx(0.01, rel=1e-5)


@pytest.mark.skipif(TRACES not in os.environ, reason=f"{TRACES} names no directory of traces")
def test_the_figures_are_those_of_the_trace() -> None:
    pytest.importorskip("pyarrow")
    drawn = residuals()
    assert drawn.std() == pytest.approx(0.0149, abs=0.0005)


def test_noise_of_a_step_is_that_of_its_microbatches() -> None:
    table = simulate(job_of("data", Noise(jitter=0.0), 256), 40, seed=0)
    assert 0.002 < noise_of(table) < 0.015 / np.sqrt(8)


def verdict(cause: str, rank: int, action: str = "evict") -> Verdict:
    return Verdict(cause, "rank", [Culprit(rank, None)], [], 0.1, 0.1, 0.0, action, 0.9, "", [])


def slowest_by_a_tenth(table: StepTable) -> Diagnosis:
    """A stand-in: blames the rank whose compute is most above that of its peers, if that is much."""
    compute = np.nanmedian(table.parts["forward"] + table.parts["backward"], axis=0)
    peers = table.roles.peers()
    over = compute / np.array([np.nanmedian(compute[peers == role]) for role in range(peers.max() + 1)])[peers]
    worst = int(np.nanargmax(over))
    found = [verdict("slow_worker", worst)] if over[worst] > 1.08 else []
    return Diagnosis("straggling" if found else "healthy", None, None, None, {}, found)


def test_a_campaign_scores_a_stand_in() -> None:
    names = ("clean", "one stall", "slow rank 2%", "slow rank 20%", "slow rank 50%", "slow link", "missing telemetry")
    rows = campaign(slowest_by_a_tenth, [128], "held-out", names=names)
    scenarios = {row["scenario"]: row for row in by_scenario(rows)}
    assert scenarios["clean"]["alarmed"] == scenarios["one stall"]["alarmed"] == 0
    assert scenarios["slow rank 50%"]["right"] == 1 == scenarios["slow rank 50%"]["place"]
    assert scenarios["slow rank 20%"]["signal / noise"] > 15 > scenarios["slow rank 2%"]["signal / noise"] > 1
    assert scenarios["slow rank 50%"]["least / own < 0.75"] == 1 and scenarios["slow rank 50%"]["2 x median"] == 0
    whole = {row["method"]: row for row in totals(rows)}
    assert set(whole) == {"trainrt", *RIVALS} and whole["trainrt"]["the same at 10 % slow and more"] > 0.7
    assert [row["slower by"] for row in by_severity(rows)][-1] == "50%"
    assert "| slow_worker |" in confusion(rows)


def test_only_unbalanced_work_is_claimed_of_healthy_hardware() -> None:
    table = simulate(job_of("data", Noise()), 2, seed=0)
    verdicts = [verdict("slow_worker", 3), verdict("sequence_imbalance", 9)]
    said = {
        state: told(Diagnosis(state, None, None, None, {}, verdicts), table)
        for state in ("straggling", "healthy", "unknown")
    }
    assert [len(claims) for claims in said.values()] == [2, 1, 0]
    assert said["straggling"][0].hosts == {0} and said["healthy"][0].hosts == {1}


def test_clean_steps_in_windows() -> None:
    found = false_alarms(slowest_by_a_tenth, ranks=128, steps=100, seed=0)
    assert (found["windows"], found["trainrt"], found["2 x median"]) == (3, 0, 0)


def test_what_is_right() -> None:
    slow = Truth(("slow_worker",), ("evict",), ranks=frozenset({7}))
    everyone = Truth(("congestion",), ("check_network",))

    def claim(rank: int, cause: str | None = None, action: str | None = None) -> Claim:
        return Claim(frozenset({rank}), frozenset({0}), frozenset(), cause, action)

    assert score([claim(7, "slow_worker", "evict")], [slow]).right
    assert not score([claim(8, "slow_worker", "evict")], [slow]).right, "negative control: another rank"
    assert not score([claim(7, "slow_link", "evict")], [slow]).right, "negative control: another cause"
    assert score([claim(7, "slow_worker", "wait")], [slow]).action is False
    assert score([claim(7, "congestion", "check_network")], [everyone]).right
    assert not score([claim(7)], [everyone]).right, "to name a rank is wrong where all are concerned"
    assert not score([], [slow]).right and not score([claim(7, "slow_worker")], []).right
    both = score([claim(7, "slow_worker")], [slow, everyone])
    assert both.right and not both.all_found


def test_a_window_of_a_table() -> None:
    table = simulate(job_of("data", Noise()), 6, seed=0, first=10)
    middle = between(table, 2, 5)
    assert middle.steps.tolist() == [12, 13, 14] == np.unique(middle.links.step).tolist()
    assert middle.parts["forward"].shape == (3, 128)
