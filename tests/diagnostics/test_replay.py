"""Replays against closed forms, against a simulation in plain Python, and against the published figures of the sample."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.diagnostics.traces import LENGTHS, Job, Seconds
from trainrt.diagnostics.replay.replay import Replay, WhatIf, what_if
from trainrt.diagnostics.replay.trace import COLUMNS, OPTYPES, Trace, read_trace
from trainrt.errors import DiagnosticsError, NotEnoughData

FORWARD, BACKWARD = LENGTHS["forward-compute"], LENGTHS["backward-compute"]


def by(factor: float, *names: str) -> Any:
    """Durations of these names, multiplied everywhere."""
    return lambda job, name, stage, chunk, microbatch, usual: usual * (factor if name in names else 1)


def figures(job: Job) -> WhatIf:
    return what_if(Replay.of(job.trace()))


CLOSED = ("embedding-grads-all-reduce", "grads-reduce-scatter", "optimizer-clip-main-grad", "optimizer")


@pytest.mark.parametrize("job", [
    {}, {"dp": 1}, {"pp": 1}, {"dp": 1, "pp": 1}, {"dp": 3, "pp": 3, "microbatches": 2}, {"vpp": 2},
    {"vpp": 3, "microbatches": 4}, {"vpp": 2, "noops": True}, {"post": CLOSED}, {"post": ()},
    {"vpp": 2, "overlap": True, "post": ("separate-grads-all-reduce", "optimizer")},
    {"vpp": 2, "overlap": True, "post": ("separate-grads-all-reduce", "optimizer"), "seconds": by(60, "grads-reduce-scatter")},
    {"seconds": by(400, "forward", "backward")}, {"vpp": 2, "seconds": by(400, "forward", "backward")},
])  # fmt: skip
def test_durations_as_traced_give_the_traced_steps(job: dict[str, Any]) -> None:
    found = figures(Job(noise=0.3, seed=3, **job))
    np.testing.assert_allclose(found.simulated, found.original, rtol=1e-9)


def test_rows_may_come_in_any_order() -> None:
    columns = Job(noise=0.2).columns()
    order = np.random.default_rng(0).permutation(len(columns["step"]))
    shuffled = what_if(Replay.of(Trace.of({name: values[order] for name, values in columns.items()})))
    plain = what_if(Replay.of(Trace.of(columns)))
    np.testing.assert_array_equal(shuffled.by_worker, plain.by_worker)
    assert (shuffled.slowdown, shuffled.M_W, shuffled.M_S) == (plain.slowdown, plain.M_W, plain.M_S)


def test_an_even_pipeline_has_no_slowdown() -> None:
    found = figures(Job())
    assert found.slowdown == pytest.approx(1, abs=1e-12)
    assert found.M_W is None and found.M_S is None
    np.testing.assert_allclose(found.by_worker, 1, rtol=1e-12)


def slower(where: dict[str, int], by: float, *names: str) -> Any:
    """Durations of these names, multiplied on a stage or in a replica."""

    def seconds(job: Job, name: str, stage: int, chunk: int, microbatch: int, usual: Seconds) -> Seconds:
        if name not in names or where.get("stage", stage) != stage:
            return usual
        usual = usual.copy()
        usual[:, where["replica"] if "replica" in where else slice(None)] *= by
        return usual

    return seconds


COMPUTES = ("forward-compute", "backward-compute")


def test_a_slow_worker_without_a_pipeline_in_closed_form() -> None:
    """T = gather + M k (f + b) + reduction + optimizer; ideally k is the mean of the replicas'."""
    k, dp, microbatches = 1.5, 4, 8
    found = figures(Job(dp=dp, pp=1, microbatches=microbatches, seconds=slower({"replica": 2}, k, *COMPUTES)))
    rest = LENGTHS["params-all-gather"] + LENGTHS["grads-reduce-scatter"] + LENGTHS["optimizer"]
    work, mean = microbatches * (FORWARD + BACKWARD), (dp - 1 + k) / dp
    assert found.simulated.mean() == pytest.approx(rest + k * work)
    assert found.ideal == pytest.approx(rest + mean * work)
    assert found.by_replica[2] == pytest.approx((rest + k * work) / (rest + mean * work))
    assert found.by_replica[0] == pytest.approx(1)
    assert found.slowest == [(0, 2)]
    # With this one at the mean it is still the slowest, and the mean is what ideal is.
    assert found.M_W is not None and abs(found.M_W - 1) < 1e-9


def test_a_long_last_stage_in_closed_form() -> None:
    """1F1B behind a long last stage: it works all the time but for the first way there and the last way back."""
    k, pp, microbatches = 1.6, 4, 8

    def seconds(job: Job, name: str, stage: int, chunk: int, microbatch: int, usual: Seconds) -> Seconds:
        if not name.endswith("compute"):
            return usual * 0
        return usual * (k if stage == pp - 1 else 1)

    found = figures(Job(pp=pp, microbatches=microbatches, seconds=seconds, post=()))
    both, mean = FORWARD + BACKWARD, (pp - 1 + k) / pp
    assert found.simulated.mean() == pytest.approx((pp - 1 + microbatches * k) * both)
    assert found.ideal == pytest.approx((pp - 1 + microbatches) * mean * both)
    # With the last stage as long as the mean, the others are shorter than it: more than the whole slowdown goes.
    share = (k - mean) * microbatches / (pp - 1 + microbatches * k - (pp - 1 + microbatches) * mean)
    assert share > 1
    assert found.M_S is not None and abs(found.M_S - share) < 1e-9


def test_a_transfer_lasts_from_the_last_arrival() -> None:
    """The receive is posted long before the send: what lies between is waiting."""
    replay = Replay.of(Job(noise=0.1).trace())
    moves = replay.lanes.is_type("forward-send", "forward-recv", "backward-send", "backward-recv")
    assert replay.lanes.duration[moves].max() > 100 * LENGTHS["forward"]
    assert replay.traced[moves].max() < 2 * LENGTHS["forward"]


@pytest.mark.parametrize(
    "name", ["embedding-grads-all-reduce", "optimizer-clip-main-grad", "separate-grads-all-reduce"]
)
def test_a_collective_lasts_from_its_last_arrival_among_its_own_members(name: str) -> None:
    """Replicas of very different speed: a collective of all of them takes no longer for it, nor one within each of them."""

    def seconds(job: Job, which: str, stage: int, chunk: int, microbatch: int, usual: Seconds) -> Seconds:
        if which == name:
            return usual * np.array([1, 1, 1, 3]) if name.startswith("embedding") else usual
        return usual * (1 + np.arange(4)) * (1 + stage)

    replay = Replay.of(Job(seconds=seconds, post=(name, "optimizer")).trace())
    moves = replay.lanes.is_type(name)
    expected = np.array([1, 1, 1, 3]) if name.startswith("embedding") else np.ones(4)
    np.testing.assert_allclose(
        replay.traced[moves], np.broadcast_to(LENGTHS[name] * expected, replay.traced[moves].shape), rtol=1e-6
    )
    ends = replay.run(np.where(moves[:, None, None], 100.0, replay.traced))
    np.testing.assert_allclose(ends, what_if(replay).original + 100 - LENGTHS[name] * expected[-1], rtol=1e-9)


class Plain:
    """One step of a pipeline of two stages by plain recursion, from what waits for what; times of one operation each."""

    def __init__(self, durations: dict[tuple[str, int, int], list[float]], *, microbatches: int, dp: int) -> None:
        self.durations, self.dp, last = durations, dp, microbatches - 1
        # What each stage computes, in order: the first one forward ahead.
        first = [("forward-compute", 0)] + [
            turn for m in range(last) for turn in (("forward-compute", m + 1), ("backward-compute", m))
        ]
        self.order = {
            0: [*first, ("backward-compute", last)],
            1: [turn for m in range(microbatches) for turn in (("forward-compute", m), ("backward-compute", m))],
        }
        self.ends: dict[tuple[str, int, int, int], float] = {}

    def takes(self, name: str, stage: int, number: int, replica: int) -> float:
        return float(self.durations[name, stage, number][replica])

    def end(self, name: str, stage: int, number: int, replica: int) -> float:
        key = name, stage, number, replica
        if key not in self.ends:
            self.ends[key] = self.start(name, stage, number, replica) + self.takes(*key)
        return self.ends[key]

    def start(self, name: str, stage: int, number: int, replica: int) -> float:
        if name == "params-all-gather":
            return 0.0
        if name == "grads-reduce-scatter":
            return max(self.end(*self.order[stage][-1][:1], stage, self.order[stage][-1][1], d) for d in range(self.dp))
        if name == "optimizer":
            return self.end("grads-reduce-scatter", stage, 0, replica)
        if name.endswith("compute"):
            return max(self.before_compute(name, stage, number, replica))
        return max(self.before_transfer(name, number, replica))

    def before_compute(self, name: str, stage: int, number: int, replica: int) -> list[float]:
        place = self.order[stage].index((name, number))
        waits = [self.end(earlier, stage, m, replica) for earlier, m in self.order[stage][max(place - 1, 0) : place]]
        waits.append(self.end("params-all-gather", stage, 0, replica))
        if (name, stage) == ("forward-compute", 1):
            waits.append(self.end("forward-recv", 1, number, replica))
        if (name, stage) == ("backward-compute", 0):
            waits.append(self.end("backward-recv", 0, number, replica))
        return waits

    def before_transfer(self, name: str, number: int, replica: int) -> list[float]:
        way = name.partition("-")[0]
        sender, receiver = (0, 1) if way == "forward" else (1, 0)
        waits = [self.end(f"{way}-compute", sender, number, replica)]
        if number:
            waits += [
                self.end(f"{way}-send", sender, number - 1, replica),
                self.end(f"{way}-recv", receiver, number - 1, replica),
            ]
            waits.append(self.end(f"{way}-compute", receiver, number - 1, replica))
        return waits

    def seconds(self) -> float:
        return max(self.end("optimizer", stage, 0, d) for stage in (0, 1) for d in range(self.dp))


@pytest.mark.parametrize("seed", range(5))
def test_scenarios_are_those_of_a_simulation_in_plain_python(seed: int) -> None:
    job = Job(dp=3, pp=2, microbatches=4, steps=3, noise=0.4, seed=seed)
    replay = Replay.of(job.trace())
    lanes = replay.lanes
    ideal = {}
    for code in np.unique(lanes.optype):
        some = replay.traced[lanes.optype == code].reshape(-1)
        ideal[int(code)] = (
            float(np.mean(some))
            if OPTYPES[code] in ("forward-compute", "backward-compute", "optimizer")
            else float(np.median(some))
        )
    random = np.random.default_rng(seed)
    masks = [random.random((len(lanes.stage), 3, 3)) < share for share in (0, 0.2, 0.5, 0.8, 1)]
    masks += [lanes.stage[:, None, None] == 1, (np.arange(3) == 1)[None, None, :]]
    found = replay.keeping(masks)
    for mask, row in zip(masks, found, strict=True):
        kept = np.broadcast_to(mask, replay.traced.shape)
        for step in range(3):
            durations = {
                (OPTYPES[code], int(stage), int(number)): [
                    replay.traced[one, step, d] if kept[one, step, d] else ideal[int(code)] for d in range(3)
                ]
                for one, (code, stage, number) in enumerate(zip(lanes.optype, lanes.stage, lanes.seq_id, strict=True))
            }
            assert row[step] == pytest.approx(Plain(durations, microbatches=4, dp=3).seconds(), rel=1e-12)


def test_one_replica_as_traced_is_the_same_in_two_lanes_and_in_all() -> None:
    for job in (Job(noise=0.3), Job(noise=0.3, dp=1), Job(noise=0.3, dp=7, pp=2, steps=2)):
        replay = Replay.of(job.trace())
        masks = [(np.arange(job.dp) == d)[None, None, :] for d in range(job.dp)]
        np.testing.assert_allclose(replay.keeping_replicas(), replay.keeping(masks), rtol=1e-12)


def test_blocks_of_scenarios_do_not_change_what_they_give(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(noise=0.3, steps=5)
    whole = figures(job)
    monkeypatch.setattr("trainrt.diagnostics.replay.replay.BLOCK", 2000)
    parts = figures(Job(noise=0.3, steps=5))
    np.testing.assert_array_equal(whole.simulated, parts.simulated)
    np.testing.assert_array_equal(whole.by_worker, parts.by_worker)


def test_labels_decide_who_is_slow() -> None:
    """A negative control: the same times under exchanged labels blame another worker."""
    columns = Job(seconds=slower({"stage": 1, "replica": 2}, 1.5, *COMPUTES)).columns()
    found = what_if(Replay.of(Trace.of(columns)))
    assert found.slowest == [(1, 2)]
    columns["dp_rank"] = (columns["dp_rank"] + 1) % 4
    columns["rank"] = columns["stage"] * 4 + columns["dp_rank"]
    assert what_if(Replay.of(Trace.of(columns))).slowest == [(1, 3)]


def test_microbatches_are_matched_by_name_where_they_have_one() -> None:
    """Names that a loader gave, the same in all stages, and none at all: both give the traced steps."""
    columns = Job(noise=0.3).columns()
    names = np.random.default_rng(1).permutation(100)
    for renamed in (np.where(columns["mb_id"] >= 0, names[columns["mb_id"]], -1), np.full(len(columns["mb_id"]), -1)):
        found = what_if(Replay.of(Trace.of({**columns, "mb_id": renamed})))
        np.testing.assert_allclose(found.simulated, found.original, rtol=1e-9)


def test_receives_that_were_noted_and_never_launched_move_nothing() -> None:
    """As profilers of interleaved pipelines leave them: the first of the first stage is missing, one is there behind the last."""
    columns = Job(noise=0.3, vpp=2, noops=True).columns()
    receives = (columns["optype"] == OPTYPES.index("forward-recv")) & (columns["stage"] == 0)
    last = receives & (columns["seq_id"] == columns["seq_id"][receives].max())
    extra = {name: values[last] for name, values in columns.items()}
    extra["start_ts"] = extra["start_ts"] + 3.0
    extra["duration"] = extra["duration"] * 0
    shifted = columns["seq_id"] - receives
    kept = {
        name: np.append(values[shifted >= 0], extra[name]) for name, values in {**columns, "seq_id": shifted}.items()
    }
    found, plain = (what_if(Replay.of(Trace.of(some))) for some in (kept, columns))
    np.testing.assert_allclose(found.simulated, plain.simulated, rtol=1e-12)
    assert found.M_S == plain.M_S


def without(columns: dict[str, Any], drop: Any) -> Trace:
    return Trace.of({name: values[~drop] for name, values in columns.items()})


def test_steps_with_operations_missing_are_left_out() -> None:
    columns = Job(noise=0.1, steps=5).columns()
    drop = (columns["step"] == 9) & (columns["dp_rank"] == 1) & (columns["seq_id"] == 3)
    replay = Replay.of(without(columns, drop))
    assert replay.lanes.steps.tolist() == [7, 8, 10, 11]
    assert "1 of 5 steps left out" in replay.lanes.notes[0]


@pytest.mark.parametrize("optype", ["forward-compute", "backward-compute", "forward-send", "backward-recv"])
def test_a_kind_of_operation_that_is_missing_is_not_enough(optype: str) -> None:
    columns = Job().columns()
    with pytest.raises(NotEnoughData):
        Replay.of(without(columns, columns["optype"] == OPTYPES.index(optype)))


def test_a_worker_that_is_missing_is_not_enough() -> None:
    columns = Job().columns()
    with pytest.raises(NotEnoughData, match="dp_rank 2"):
        Replay.of(without(columns, (columns["dp_rank"] == 2) & (columns["stage"] == 1)))


def test_numbers_far_apart_are_refused_before_memory_is_taken() -> None:
    columns = Job().columns()
    columns["dp_rank"] = np.where(columns["dp_rank"] == 3, 2**30, columns["dp_rank"])
    with pytest.raises(NotEnoughData):
        Replay.of(Trace.of(columns))


def test_an_operation_that_is_there_twice_is_named() -> None:
    columns = Job().columns()
    twice = {name: np.append(values, values[5]) for name, values in columns.items()}
    with pytest.raises(DiagnosticsError, match=r"seq_id: params-all-gather 0 of dp_rank 1, stage 0 is in step 8 twice"):
        Replay.of(Trace.of(twice))
    twice["rank"][-1] += 100
    with pytest.raises(DiagnosticsError, match="one rank of each tensor-parallel group"):
        Replay.of(Trace.of(twice))


TRACES = Path(os.environ.get("TRAINRT_TRACES", "/nowhere"))
sample = pytest.mark.skipif(not (TRACES / "trace-ST.parquet").is_file(), reason="TRAINRT_TRACES names no public traces")


@sample
def test_the_published_figures_of_the_sample() -> None:
    result, stage, worker = (json.loads((TRACES / f"{name}-ST.json").read_text()) for name in ("result", "ms", "mw"))
    trace = read_trace(TRACES / "trace-ST.parquet")
    assert len(COLUMNS) == 11 and len(trace) == 6784 and trace.sizes["world_size"] == 8
    found = what_if(Replay.of(trace))
    ours = {
        "S": found.slowdown, "tori": found.simulated.mean(), "tideal": found.ideal, "M_S": found.M_S, "M_W": found.M_W,
        "traced": found.original.mean(), "discrepancy": 1 / (1 + found.discrepancy),
    }  # fmt: skip
    theirs = {
        "S": result["blocking_slowdown"], "tori": stage["tori"], "tideal": stage["tideal"], "M_S": stage["Ms"],
        "M_W": worker["Mw"], "traced": np.mean(list(result["step_t_base"].values())), "discrepancy": result["launch_slowdown"],
    }  # fmt: skip
    by_replica, by_stage = result["blocking_decompose_by_dp_rank"], result["blocking_decompose_by_stage"]
    for p in range(4):
        for d in range(2):
            ours[f"worker {p} {d}"] = found.by_worker[p, d]
            theirs[f"worker {p} {d}"] = min(by_replica[str(d)], by_stage[str(p)])
    for name, value in result["blocking_decompose_by_optype"].items():
        ours[name], theirs[name] = found.by_type[name.replace("pp-comm", "pipeline")], value
    for step, simulated in zip(found.steps, found.simulated, strict=True):
        ours[f"step {step}"], theirs[f"step {step}"] = simulated, result["step_t_nodelay"][str(step)]
    for name, value in ours.items():
        assert value == pytest.approx(theirs[name], rel=1e-5), name
