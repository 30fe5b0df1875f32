"""A window of steps as detectors look at it: what each rank took beyond its peers for the same work, part by part.

Legend: S steps, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from trainrt.diagnostics.accounting import Accounting, account
from trainrt.diagnostics.detectors.polish import polish
from trainrt.diagnostics.table import COMPUTE, Indices, Numbers, Roles, StepTable

PARTS_OF: Mapping[str, tuple[str, ...]] = {
    "compute": COMPUTE,
    "data": ("data",),
    "garbage_collection": ("garbage_collection",),
    "storage": ("snapshot", "checkpoint"),
    "other": ("other",),
}
"""What a rank does by itself, as causes tell it apart."""
FEW_PEERS = 8
"""With so many peers or fewer a rank is compared with the others alone: it would move their median itself."""
TO_SIGMA = 1.4826
"""From the median absolute deviation to the standard deviation of a normal distribution."""
FEWEST_TO_FIT = 64
"""Pairs of step and rank that say how work makes time; with fewer, all ranks are taken to do the same."""
SURE = 6.0
"""Standard errors that a slope is from zero."""
LENGTHS = (3, 5, 10, 20, 40, 80)
"""Steps at the end of the window that are looked at together."""
MOMENT_SECONDS = 2.0
"""What is over sooner is a host that did something else for a moment, however many short steps that were."""
STOP_SECONDS = 0.05
"""Single stops that are shorter are what schedulers and polls do anyway."""
MOST_OF_A_MOMENT = 40
"""Steps of less than 50 ms."""


@dataclass(frozen=True)
class Window:
    """table: no rank without a summary in it. valid: where one was heard; elsewhere parts are as those of the peers."""

    table: StepTable
    valid: np.ndarray

    @classmethod
    def of(cls, table: StepTable) -> Window:
        return cls(table, np.isfinite(table.seconds))

    @property
    def roles(self) -> Roles:
        return self.table.roles

    @cached_property
    def heard(self) -> np.ndarray:
        """Ranks of which most steps are known, (R,)."""
        return np.asarray(self.valid.mean(0) >= 0.6)

    @cached_property
    def peers(self) -> Indices:
        """The number of each rank's role; roles of one rank alone are those of the whole stage, or of all."""
        found = self.roles.peers()
        if np.bincount(found).min() > 1:
            return found
        stage = self.roles.coordinates.get("pp", np.zeros(self.roles.ranks, dtype=np.int64))
        return stage if np.bincount(stage).min() > 1 else np.zeros(self.roles.ranks, dtype=np.int64)

    @cached_property
    def seconds(self) -> Numbers:
        """Of the step, (S,): the median over ranks."""
        return nan_median(self.table.seconds, axis=1)

    @cached_property
    def moment(self) -> int:
        """The steps at the end that took MOMENT_SECONDS together: fewer say nothing of what lasts."""
        reached = np.flatnonzero(np.cumsum(self.seconds[::-1]) >= MOMENT_SECONDS)
        return min(int(reached[0]) + 1 if len(reached) else len(self.seconds) + 1, MOST_OF_A_MOMENT)

    @cached_property
    def accounting(self) -> Accounting:
        return account(self.table)

    def own(self, kind: str) -> Numbers:
        """Seconds of one kind of part, (S, R), NaN where nothing was heard."""
        return np.sum([self.table.parts[name] for name in PARTS_OF[kind]], axis=0)

    @cached_property
    def compute(self) -> Numbers:
        return self.own("compute")

    @cached_property
    def usual(self) -> Numbers:
        """Compute seconds of the peers, (S, R)."""
        return self.of_peers(self.compute)

    @cached_property
    def scale(self) -> float:
        """Compute seconds of a step, the median of all: what excesses are shares of."""
        return float(np.nanmedian(self.compute)) or 1e-9

    def of_peers(self, values: Numbers) -> Numbers:
        """The median of each rank's peers, of few of the others alone, step by step, (S, R)."""
        found = np.empty_like(values)
        for role in np.unique(self.peers):
            where = np.flatnonzero(self.peers == role)
            block = values[:, where]
            if 1 < len(where) <= FEW_PEERS:
                for at, rank in enumerate(where):
                    others = np.delete(block, at, axis=1)
                    # Where no other was heard there is nothing to compare with.
                    found[:, rank] = np.where(np.isfinite(others).any(1), nan_median(others, axis=1), block[:, at])
            else:
                found[:, where] = nan_median(block, axis=1)[:, None]
        return found

    def of_all(self, values: Numbers) -> Numbers:
        """What all ranks alike take, (S,): the median; of few ranks the lower quartile, which one slow rank does not move."""
        usual = nan_median(values, axis=1)
        if values.shape[1] > FEW_PEERS:
            return usual
        return np.asarray(
            np.quantile(np.where(np.isfinite(values), values, usual[:, None]), 0.25, axis=1, method="lower")
        )

    @cached_property
    def slopes(self) -> dict[str, float]:
        """Seconds of compute that a unit of work takes, for the kinds of work that differ between peers and explain time.

        A robust regression of what compute and work differ from the peers': compute ~ a tokens + b squares + c rows.
        """
        kinds = [name for name in self.table.work if name != "rows" or "ep" in self.roles.coordinates]
        # Without ep each rank has all experts: rows follow its tokens.
        differ = {name: self.table.work[name] - self.of_peers(self.table.work[name]) for name in kinds}
        known = np.isfinite(self.compute) & np.isfinite(sum(differ.values()))
        target = (self.compute - self.usual)[known]
        names = [name for name, d in differ.items() if np.abs(d[known]).max(initial=0.0) > 0]
        if not names or len(target) < FEWEST_TO_FIT:
            return {}
        return robust_slopes({name: differ[name][known] for name in names}, target)

    def more_work(self, name: str) -> Numbers:
        """Seconds that more work of a kind than the peers' explains, (S, R)."""
        work = self.table.work[name]
        return np.nan_to_num(self.slopes.get(name, 0.0) * (work - self.of_peers(work)))

    @cached_property
    def explained(self) -> Numbers:
        """Seconds of compute that the work here and the peers' times explain, (S, R)."""
        return self.usual + sum((self.more_work(name) for name in self.slopes), np.zeros_like(self.usual))

    def excess(self, kind: str) -> Numbers:
        """Seconds beyond what peers take for the same work, (S, R); 0 where nothing was heard."""
        if kind == "compute":
            return np.nan_to_num(self.compute - self.explained)
        own = self.own(kind)
        return np.nan_to_num(own - self.of_peers(own))

    @cached_property
    def stage_seconds(self) -> Numbers:
        """Compute seconds of each stage for the same replica and member (median polish), (stages,)."""
        stage = self.roles.coordinates.get("pp")
        if stage is None:
            return np.array([self.scale])
        typical = np.log(np.maximum(nan_median(self.compute, axis=0), 1e-12))
        return np.exp(polish(typical, self.roles)["pp"])


def nan_median(values: Numbers, *, axis: int) -> Numbers:
    """The median without NaN; 0 where there is nothing else. Much faster than numpy's where nothing is missing."""
    if np.isfinite(values).all():
        return np.asarray(np.median(values, axis=axis))
    with np.errstate(all="ignore"):
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            return np.nan_to_num(np.nanmedian(values, axis=axis))


def sigma(values: Numbers) -> float:
    """A robust standard deviation about the median."""
    return float(TO_SIGMA * np.median(np.abs(values - np.median(values)))) if values.size else 0.0


def robust_slopes(differ: Mapping[str, Numbers], target: Numbers) -> dict[str, float]:
    """Slopes that are surely positive, by least squares with outliers weighted down (Huber's weights, three rounds)."""
    names, weights = list(differ), np.ones(len(target))
    x = np.stack([differ[name] for name in names], axis=1)
    width = np.maximum(np.abs(x).max(0), 1e-30)
    x = x / width
    solution, covariance = np.zeros(len(names)), np.zeros((len(names), len(names)))
    for _ in range(3):
        inverse = np.linalg.pinv((x * weights[:, None]).T @ x)
        solution = inverse @ (x.T @ (weights * target))
        left = target - x @ solution
        spread = max(sigma(left), 1e-12)
        weights = np.minimum(1.0, 1.5 * spread / np.maximum(np.abs(left), 1e-30))
        covariance = inverse * spread**2
    errors = solution / np.maximum(np.sqrt(np.diag(covariance)), 1e-30)
    if errors.min() <= SURE:
        # Kinds of work that go together hide each other: the least sure goes, and the others are asked again.
        kept = {name: differ[name] for at, name in enumerate(names) if at != errors.argmin()}
        return robust_slopes(kept, target) if kept else {}
    return {name: float(slope) for name, slope in zip(names, solution / width, strict=True)}


Measure = Callable[[Window], Numbers]
