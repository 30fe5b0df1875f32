"""Change points: where a series goes from one level to another, verified by what comes after."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainrt.diagnostics.detectors.window import sigma
from trainrt.diagnostics.table import Numbers

FEWEST_BEFORE, FEWEST_AFTER = 3, 3
LASTING = 0.75
SCORE = 7.0


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


def find_shift(series: Numbers, *, least: float) -> Shift | None:
    """The strongest rise of a series (S,) by the factor `least` or more that lasts to its end, or None.

    A line that rises as well is no change point.
    """
    best: Shift | None = None
    for index in range(FEWEST_BEFORE, len(series) - FEWEST_AFTER + 1):
        head, tail = series[:index], series[index:]
        before, after = float(np.median(head)), float(np.median(tail))
        varies = max(sigma(np.concatenate((head - before, tail - after))), 1e-3 * abs(before), 1e-9)
        score = (after - before) / (1.2533 * varies * np.sqrt(1 / len(head) + 1 / len(tail)))
        lasts = np.mean(tail > (before + after) / 2) >= LASTING and np.mean(head < (before + after) / 2) >= LASTING
        if lasts and after >= least * before and score > SCORE and (best is None or score / SCORE > best.sure):
            best = Shift(index, before, after, float(score / SCORE))
    return best if best is not None and not _is_line(series, best) else None


def _is_line(series: Numbers, shift: Shift) -> bool:
    at = np.arange(len(series))
    level = np.where(at < shift.index, shift.before, shift.after)
    line = np.polyval(np.polyfit(at, series, 1), at)
    return bool(np.abs(series - line).sum() < np.abs(series - level).sum())
