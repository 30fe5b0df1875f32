"""Waiting goes back to its origin, over groups; and lateness is told from slow transfers."""

from __future__ import annotations

import numpy as np
import pytest

from trainrt.diagnostics.attribution import Meeting, lateness, origins


def meeting(ranks: list[int], arrivals: list[float], transfer: float = 0.1, base: float = 0.1) -> Meeting:
    end = max(arrivals) + transfer
    return Meeting("all_reduce", ranks, arrivals, [end] * len(ranks), base)


def test_a_rank_that_is_late_because_it_waited_is_a_victim() -> None:
    """1 is slow; 0 waits for it over tp, so 2, which meets 0 over fsdp, waits for 1, too."""
    met = [
        meeting([0, 1], [1.0, 2.0]),
        meeting([2, 3], [1.0, 1.0]),
        meeting([0, 2], [2.1, 1.1]),
        meeting([1, 3], [2.1, 1.1]),
    ]
    found = origins(met, 4)
    assert found.seconds == pytest.approx([0, 3.0, 0, 0]) and found.waited == pytest.approx([1.0, 0, 1.0, 1.0])
    # Negative control: without the first meeting 0 is its own reason.
    assert origins(met[1:], 4).seconds == pytest.approx([1.0, 1.0, 0, 0])


def test_what_a_rank_loses_by_itself_after_it_waited_is_its_own() -> None:
    met = [meeting([0, 1], [1.0, 2.0]), meeting([0, 2], [3.6, 1.1])]
    assert origins(met, 3).seconds == pytest.approx([1.5, 2.0, 0])


def test_what_all_members_owe_makes_none_of_them_late() -> None:
    met = [meeting([0, 1, 2], [1.0, 2.0, 1.0]), meeting([0, 1, 2], [3.0, 2.5, 2.5])]
    assert origins(met, 3).seconds == pytest.approx([1.0, 2.0, 0])


def test_waiting_is_given_away_whole() -> None:
    rng = np.random.default_rng(0)
    clock, met = np.zeros(8), []
    for turn in range(40):
        clock += rng.exponential(0.1, 8)
        group = list(range(8)) if turn % 5 == 0 else sorted(rng.choice(8, 4, replace=False).tolist())
        met.append(meeting(group, clock[group].tolist(), transfer=0.0))
        clock[group] = clock[group].max()
    found = origins(met, 8)
    assert found.seconds.sum() == pytest.approx(found.waited.sum()) and found.share.sum() == pytest.approx(1.0)


def test_late_members_are_told_from_slow_transfers() -> None:
    assert meeting([0, 1], [1.0, 2.0]).lateness_share == pytest.approx(1.0)
    assert meeting([0, 1], [1.0, 1.0], transfer=1.1).lateness_share == 0.0
    assert 0.4 < meeting([0, 1], [1.0, 1.5], transfer=0.6).lateness_share < 0.6
    assert meeting([0, 1], [1.0, 2.0]).last == 1


def test_lateness_of_a_step_is_weighed_by_what_its_collectives_lost() -> None:
    late, slow = meeting([0, 1], [1.0, 4.0]), meeting([0, 1], [1.0, 1.0], transfer=1.1)
    assert lateness([late, slow]) == pytest.approx(3 / 4) and lateness([slow]) == 0.0 and lateness([late]) == 1.0
