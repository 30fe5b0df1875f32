"""What the page, its metrics and its heat map show of summaries, worked out once a step.

Legend: R ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainrt.diagnostics.accounting import Accounting, account
from trainrt.diagnostics.table import Indices, Numbers
from trainrt.diagnostics.telemetry import Summaries

HEAT_STEPS = 20
HEAT = ("self_seconds", "data_seconds", "waiting_seconds", "step_seconds", "memory_bytes")
POINTS_KEPT = 4096
CELLS_AT_ONCE = 1 << 18
LATE_STEPS = 2
"""A step that not all ranks spoke of is taken as it is once so many later ones are there: a rank may have died."""

Cells = NDArray[np.float32]


class Ledger:
    """By step the means of the parts, and of the last steps the numbers of each rank. `refresh` follows the summaries."""

    def __init__(self, summaries: Summaries) -> None:
        self.bands: dict[int, dict[str, float]] = {}
        self._summaries = summaries
        self._recent: deque[Cells] = deque(maxlen=HEAT_STEPS)
        self._last: int | None = None
        self._incarnation = 0
        self._heat: dict[str, Cells] | None = None

    @property
    def heat_steps(self) -> int:
        """Over how many steps the heat is."""
        return len(self._recent)

    def refresh(self) -> bool:
        """Take in the steps that are new. True if any was."""
        held = self._summaries.steps
        if self._summaries.incarnation != self._incarnation or (self._last is not None and held[-1:] < [self._last]):
            self._incarnation, self._last, self._heat = self._summaries.incarnation, None, None
            self._recent.clear()
        steps = self._ready(held)
        at_once = max(1, CELLS_AT_ONCE // max(1, self._summaries.roles.ranks))
        for first in range(0, len(steps), at_once):
            self._take(steps[first : first + at_once])
        return bool(steps)

    def heat(self) -> dict[str, Cells]:
        """Of each rank the median over the last steps, (R,), by the names of HEAT; `ratio`: self time over its role's median."""
        if self._heat is None:
            ranks = self._summaries.roles.ranks
            middle = medians(np.stack(self._recent)) if self._recent else np.full((len(HEAT), ranks), np.nan)
            self._heat = dict(zip(HEAT, middle.astype(np.float32), strict=True))
            own = self._heat["self_seconds"]
            typical = median_of_group(own, self._summaries.roles.peers()) if ranks else own
            self._heat["ratio"] = np.divide(own, typical, out=np.ones_like(own), where=typical > 0)
        return self._heat

    def suspects(self, number: int) -> list[tuple[int, str, float]]:
        """(rank, host, ratio) of those whose self time is longest against their role's median."""
        ratio, roles = self.heat()["ratio"], self._summaries.roles
        order = np.argsort(-np.nan_to_num(ratio), kind="stable")[:number]
        return [(int(r), roles.hosts[roles.host[r]], float(ratio[r])) for r in order if np.isfinite(ratio[r])]

    def _ready(self, held: Sequence[int]) -> list[int]:
        new = [step for step in held if self._last is None or step > self._last]
        for count, step in enumerate(new):
            if len(new) - count <= LATE_STEPS and not self._summaries.complete(step):
                return new[:count]
        return new

    def _take(self, steps: Sequence[int]) -> None:
        found = account(self._summaries.table_of(steps))
        bands = found.bands()
        for index, step in enumerate(steps):
            self.bands[step] = {name: float(values[index]) for name, values in bands.items()}
        memory = np.stack([self._summaries.column_of("memory", step) for step in steps[-HEAT_STEPS:]])
        self._recent.extend(_cells(found, memory))
        self._last = steps[-1]
        self._heat = None
        if len(self.bands) > POINTS_KEPT:
            self._thin()

    def _thin(self) -> None:
        """Drop every second of the older half: the longer ago, the sparser."""
        steps = sorted(self.bands)
        for step in steps[1 : len(steps) // 2 : 2]:
            del self.bands[step]


def _cells(found: Accounting, memory: NDArray[Any]) -> Cells:
    """The numbers of HEAT of the last steps: (steps, HEAT, R)."""
    last = slice(-HEAT_STEPS, None)
    kinds = (found.self_seconds(), found.own["data"], found.waited(), found.seconds)
    return np.stack([kind[last].astype(np.float32) for kind in kinds] + [memory.astype(np.float32)], axis=1)


def medians(values: NDArray[Any]) -> NDArray[Any]:
    """The median along the first dimension of what is no NaN; NaN where nothing is."""
    rows = np.sort(values, axis=0)  # NaN last
    count = (~np.isnan(rows)).sum(axis=0)
    low = np.take_along_axis(rows, np.maximum(count - 1, 0)[None] // 2, axis=0)[0]
    high = np.take_along_axis(rows, np.minimum(count // 2, len(rows) - 1)[None], axis=0)[0]
    return np.where(count > 0, (low + high) / 2, np.nan)


def median_of_group(values: NDArray[Any], group: Indices) -> Numbers:
    """For each rank the lower median of its group's values that are no NaN."""
    order = np.lexsort((values, group))
    counts = np.bincount(group, weights=~np.isnan(values)).astype(np.int64)
    first = np.searchsorted(group[order], np.arange(len(counts)))
    middle = values[order][np.minimum(first + np.maximum(counts - 1, 0) // 2, len(values) - 1)]
    return middle[group]
