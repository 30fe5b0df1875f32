"""Change points: where a series goes from one level to another, verified by what comes after; and what has ceased."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainrt.diagnostics.detectors.window import sigma
from trainrt.diagnostics.table import Numbers

FEWEST_BEFORE, FEWEST_AFTER = 3, 3
LASTING = 0.75
SCORE = 7.0
CEASED = 1e-3
"""The chance to see it so seldom towards the end."""


@dataclass(frozen=True, slots=True)
class Shift:
    """From step `index` on the level is `ratio` times what it was before. sure: evidence over its threshold."""

    index: int
    before: float
    after: float
    sure: float

    @property
    def ratio(self) -> float:
        return self.after / max(self.before, 1e-12)


def find_shift(series: Numbers, *, least: float, fewest: int = FEWEST_AFTER) -> Shift | None:
    """The strongest rise of a series (S,) by the factor `least` or more that lasts to its end, or None.

    fewest: steps after it.
    A line that rises as well is no change point.
    """
    best: Shift | None = None
    for index in range(FEWEST_BEFORE, len(series) - max(fewest, FEWEST_AFTER) + 1):
        head, tail = series[:index], series[index:]
        before, after = float(np.median(head)), float(np.median(tail))
        varies = max(sigma(np.concatenate((head - before, tail - after))), 1e-3 * abs(before), 1e-9)
        score = (after - before) / (1.2533 * varies * np.sqrt(1 / len(head) + 1 / len(tail)))
        lasts = np.mean(tail > (before + after) / 2) >= LASTING and np.mean(head < (before + after) / 2) >= LASTING
        if lasts and after >= least * before and score > SCORE and (best is None or score / SCORE > best.sure):
            best = Shift(index, before, after, float(score / SCORE))
    return best if best is not None and not _is_line(series, best) else None


def goes_on(late: NDArray[np.bool_], *, fewest: int = 1) -> bool:
    """Whether what is true of some steps (S,) is so over `fewest` or more, and did not become too rare towards the end."""
    from scipy.stats import binom

    at = np.flatnonzero(late)
    if not len(at) or at[-1] - at[0] + 1 < fewest:
        return False
    usual = len(at) / (at[-1] - at[0] + 2)
    since = late[at[0] :][::-1]
    return bool(binom.cdf(np.cumsum(since), np.arange(len(since)) + 1, usual).min() > CEASED)


def _is_line(series: Numbers, shift: Shift) -> bool:
    at = np.arange(len(series))
    level = np.where(at < shift.index, shift.before, shift.after)
    line = np.polyval(np.polyfit(at, series, 1), at)
    return bool(np.abs(series - line).sum() < np.abs(series - level).sum())
