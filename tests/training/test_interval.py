"""The steps that are kept: as the job says, or by what steps beside and without snapshots were measured to cost."""

from __future__ import annotations

from itertools import pairwise

from trainrt.training.interval import PROBE, WARM_UP, Interval


def kept(interval: Interval, steps: int, *, alone: float, beside: float, stall: float) -> list[int]:
    """The steps kept, where a step that follows a kept one takes `beside` seconds, another `alone`."""
    found, seconds, stalled = [], 0.0, 0.0
    for step in range(1, steps + 1):
        interval.begin(step, step_seconds=seconds, stall_seconds=stalled)
        seconds, stalled = (beside, stall) if found and found[-1] == step - 1 else (alone, 0.0)
        if interval.now:
            found.append(step)
    return found


def test_a_fixed_interval_counts_steps_of_the_run() -> None:
    assert kept(Interval(3, mtbf_seconds=1.0), 10, alone=1.0, beside=1.0, stall=0.0) == [3, 6, 9]
    assert kept(Interval(0, mtbf_seconds=1.0), 10, alone=1.0, beside=1.0, stall=0.0) == []


def test_auto_measures_and_then_takes_the_best() -> None:
    interval = Interval("auto", mtbf_seconds=600.0)
    steps = kept(interval, 200, alone=1.0, beside=1.5, stall=0.1)
    measured = WARM_UP + PROBE
    assert steps[:measured] == list(range(1, measured + 1)), "every step is kept at first"
    assert steps[measured] - steps[measured - 1] > PROBE, "then some steps are measured without"
    gaps = {after - before for before, after in pairwise(steps[measured:])}
    assert gaps == {interval.every} and 20 <= interval.every <= 30, "sqrt(2 * 0.5 * 600) seconds, of one second each"


def test_auto_keeps_every_step_where_that_costs_nothing_or_failures_are_frequent() -> None:
    cheap, frequent = Interval("auto", mtbf_seconds=600.0), Interval("auto", mtbf_seconds=1.0)
    kept(cheap, 60, alone=1.0, beside=1.0, stall=0.0)
    kept(frequent, 60, alone=1.0, beside=1.5, stall=0.1)
    assert cheap.every == frequent.every == 1


def test_the_step_time_may_change_later() -> None:
    interval = Interval("auto", mtbf_seconds=600.0)
    kept(interval, 100, alone=1.0, beside=1.5, stall=0.1)
    before = interval.every
    kept(interval, 200, alone=4.0, beside=4.5, stall=0.1)
    assert interval.every < before
