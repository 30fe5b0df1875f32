"""The steps after which a snapshot is taken: as the job says, or chosen from what the run measures (`snapshot.every = "auto"`).

All ranks decide alike, because they decide from the same numbers: the slowest rank's, which the step's gather brings.
"""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import Literal

from trainrt.checkpoint.policy import best_every

WARM_UP = 3
PROBE = 8
"""Steps with a snapshot each, then as many without: their difference is what one costs, its work beside the training too."""
WINDOW = 64


class Interval:
    """Which steps are kept. `begin` is called once in every step, before `now` is asked."""

    def __init__(self, every: int | Literal["auto"], *, mtbf_seconds: float) -> None:
        self.every = 1 if every == "auto" else every
        self.now = False
        self._probe = _Probe(mtbf_seconds) if every == "auto" else None
        self._since = 0

    def begin(self, step: int, *, step_seconds: float, stall_seconds: float) -> None:
        """Step `step` runs; the numbers are the last step's (0 where there was none in this incarnation)."""
        if self._probe is None:
            self.now = self.every > 0 and step % self.every == 0
            return
        self.every = self._probe.every(step_seconds, stall_seconds, self.every)
        self._since += 1
        self.now = 0 < self.every <= self._since
        if self.now:
            self._since = 0


class _Probe:
    """Steps beside snapshots, steps without, and the interval that follows."""

    def __init__(self, mtbf_seconds: float) -> None:
        self._mtbf = mtbf_seconds
        self._seen = 0
        self._beside: list[float] = []
        self._alone: list[float] = []
        self._stalls: list[float] = []
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._cost = 0.0

    def every(self, step_seconds: float, stall_seconds: float, current: int) -> int:
        """What holds for this step; 0 while steps without snapshots are measured."""
        number, self._seen = self._seen, self._seen + 1
        self._recent.append(step_seconds)
        if number <= WARM_UP:
            return 1
        if number <= WARM_UP + PROBE:
            self._beside.append(step_seconds)
            self._stalls.append(stall_seconds)
            return 1 if number < WARM_UP + PROBE else 0
        if number <= WARM_UP + 2 * PROBE + 1:
            if number > WARM_UP + PROBE + 1:
                # The copy of the last snapshot ran beside the first of these.
                self._alone.append(step_seconds)
            if number <= WARM_UP + 2 * PROBE:
                return 0
            self._cost = max(median(self._beside) - median(self._alone), median(self._stalls))
            self._recent = deque(self._alone, WINDOW)
        elif number % WINDOW:
            return current
        return best_every(step_seconds=median(self._recent), snapshot_seconds=self._cost, mtbf_seconds=self._mtbf)
