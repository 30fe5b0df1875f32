"""Experts to bins of a fixed room, as integer programs solved by HiGHS, and greedily where those are too large or too slow.

Two programs. `assign`: each expert has a cost in each bin, and the fullest bin costs too. `chain`: experts of consecutive
layers should share a bin where many tokens go from one to the other.

Legend: E experts, P bins, L layers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, linear_sum_assignment, milp
from scipy.sparse import coo_array

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Row = tuple[Sequence[int] | Ints, Sequence[float], float, float]
"""Indices of variables, their coefficients, and the least and the largest value of the sum."""

LARGEST = 20_000
"""Variables of a program that is tried at all: HiGHS takes seconds to look at more, without a better result than greedy's."""
GAP = 1e-3
"""A solution within this share of its bound is the optimum: counts are a sample anyway."""


@dataclass(slots=True)
class Budget:
    """Seconds for all the programs of one placement, and whether each was solved to the optimum."""

    seconds: float
    solves: int
    exact: bool = True
    _began: float = field(default_factory=time.monotonic)

    def next(self) -> float:
        """The seconds that the next program may take: an even share of what is left."""
        left = self.seconds - (time.monotonic() - self._began)
        share = max(left, 0.0) / max(self.solves, 1)
        self.solves -= 1
        return share


def assign(
    cost_EP: Floats, load_E: Floats, room: Ints, ranks: Ints, balance: float, budget: Budget, *, before: Ints | None = None
) -> Ints:  # fmt: skip
    """The bin of each expert: min sum of costs + balance * the load per rank of the fullest bin, bin p holding `room[p]`.

    ranks: among how many a bin's load is divided. before: the bins as they are, kept where nothing is better.
    """

    def value(bin_E: Ints) -> float:
        full = np.bincount(bin_E, load_E, len(ranks)) / ranks
        return float(cost_EP[np.arange(len(bin_E)), bin_E].sum() + balance * full.max())

    greedy = _swapped(_dealt(cost_EP, load_E, room, ranks, balance), cost_EP, load_E, ranks, balance)
    found = [greedy] if before is None else [before, greedy]
    experts, bins = cost_EP.shape
    seconds = budget.next()
    if bins == 1 or not load_E.any():
        return found[0]
    if experts * bins > LARGEST or not seconds:
        budget.exact = False
        return min(found, key=value)
    # Variables: x[e, p], then the fullest bin's load.
    index = np.arange(experts * bins).reshape(experts, bins)
    fullest = index.size
    rows: list[Row] = [(index[e], [1.0] * bins, 1.0, 1.0) for e in range(experts)]
    rows += [(index[:, p], [1.0] * experts, room[p], room[p]) for p in range(bins)]
    scale = max(float(load_E.sum()), 1.0)
    for p in range(bins):
        rows.append(((*index[:, p], fullest), (*load_E / scale, -float(ranks[p])), -np.inf, 0.0))
    objective = np.append(cost_EP.flatten() / scale, balance)
    solution = _solve(objective, rows, integers=fullest, top=np.inf, seconds=seconds, budget=budget)
    if solution is not None:
        found.append(solution[:fullest].reshape(experts, bins).argmax(1))
    return min(found, key=value)


def _dealt(cost_EP: Floats, load_E: Floats, room: Ints, ranks: Ints, balance: float) -> Ints:
    """Heaviest first, each where it adds least (longest processing time first, with costs)."""
    bin_E, left, full = np.zeros(len(load_E), np.int64), room.copy(), np.zeros(len(room))
    for expert in np.argsort(-load_E, kind="stable"):
        added = cost_EP[expert] + balance * np.maximum(full + load_E[expert] / ranks, full.max(initial=0.0))
        chosen = int(np.where(left > 0, added, np.inf).argmin())
        bin_E[expert] = chosen
        left[chosen] -= 1
        full[chosen] += load_E[expert] / ranks[chosen]
    return bin_E


def _swapped(bin_E: Ints, cost_EP: Floats, load_E: Floats, ranks: Ints, balance: float) -> Ints:
    """Exchange two experts as long as that betters the value: the best exchange for one expert after the other."""
    bin_E, experts, everyone = bin_E.copy(), range(len(bin_E)), np.arange(len(bin_E))
    own_E = cost_EP[everyone, bin_E]
    full = np.bincount(bin_E, load_E, len(ranks)) / ranks
    better = True
    while better:
        better = False
        for one in experts:
            here = bin_E[one]
            moved_E = (cost_EP[one, bin_E] - own_E[one]) + (cost_EP[:, here] - own_E)
            after_EP = np.broadcast_to(full, (len(bin_E), len(full))).copy()
            change_E = load_E[one] - load_E
            after_EP[:, here] -= change_E / ranks[here]
            after_EP[everyone, bin_E] += change_E / ranks[bin_E]
            gain_E = np.where(bin_E == here, 0.0, moved_E + balance * (after_EP.max(1) - full.max()))
            other = int(gain_E.argmin())
            if gain_E[other] < -1e-9 * max(1.0, abs(own_E).sum()):
                bin_E[[one, other]] = bin_E[[other, one]]
                own_E, full, better = cost_EP[everyone, bin_E], after_EP[other], True
    return bin_E


def chain(
    count_LEE: Sequence[Floats], room: Ints, budget: Budget, *, before: list[Ints] | None = None
) -> list[Ints]:  # fmt: skip
    """For each layer the bin of each expert: as many tokens as can be stay in their bin from layer to layer.

    max sum over l, i, j of count_l[i, j] * sum over p of x_l[i, p] x_(l + 1)[j, p], the products being variables of their own.

    `count_LEE[l][i, j]`: tokens from expert i of layer l to expert j of the next one. before: as for `assign`.
    """

    def value(bin_LE: list[Ints]) -> float:
        return kept(count_LEE, bin_LE)

    found = [_swept(count_LEE, room)] if before is None else [before, _swept(count_LEE, room)]
    seconds, bins = budget.next(), len(room)
    pairs = [np.argwhere(count > 0) for count in count_LEE]
    if bins == 1 or not any(map(len, pairs)):
        return found[0]
    experts = len(count_LEE[0])
    variables = (len(count_LEE) + 1) * experts * bins
    if variables + sum(map(len, pairs)) * bins > LARGEST or not seconds:
        budget.exact = False
        return max(found, key=value)
    # Variables: x[l, e, p], then for each pair (i, j) of a layer and each bin whether both are in it.
    index = np.arange(variables).reshape(-1, experts, bins)
    rows: list[Row] = [(of_expert, [1.0] * bins, 1.0, 1.0) for of_layer in index for of_expert in of_layer]
    rows += [(of_layer[:, p], [1.0] * experts, room[p], room[p]) for of_layer in index for p in range(bins)]
    objective = [0.0] * variables
    scale = max(sum(float(count.sum()) for count in count_LEE), 1.0)
    for layer, (count, pair) in enumerate(zip(count_LEE, pairs, strict=True)):
        for i, j in pair:
            for p in range(bins):
                both = len(objective)
                objective.append(-count[i, j] / scale)
                rows.append(((both, index[layer, i, p]), (1.0, -1.0), -np.inf, 0.0))
                rows.append(((both, index[layer + 1, j, p]), (1.0, -1.0), -np.inf, 0.0))
    if len(set(room.tolist())) == 1:
        # Bins are alike: without this every solution is there P! times.
        rows.append(([index[0, 0, 0]], [1.0], 1.0, 1.0))
    solution = _solve(np.array(objective), rows, integers=variables, top=1.0, seconds=seconds, budget=budget)
    if solution is not None:
        found.append(list(solution[:variables].reshape(index.shape).argmax(2)))
    return max(found, key=value)


def kept(count_LEE: Sequence[Floats], bin_LE: Sequence[Ints]) -> float:
    """Tokens that stay in their bin."""
    return sum(
        float(count[here[:, None] == there[None, :]].sum())
        for count, here, there in zip(count_LEE, bin_LE[:-1], bin_LE[1:], strict=True)
    )


def _swept(count_LEE: Sequence[Floats], room: Ints) -> list[Ints]:
    """Bins of one layer from those of its neighbours, exactly, up and down the layers until nothing gets better.

    Begun once from each layer, whose experts are grouped by where their tokens go; the best of these.
    """
    best: list[Ints] = []
    for first in range(len(count_LEE) + 1):
        bin_LE: dict[int, Ints] = {first: _grouped(count_LEE, first, room)}
        for layer in [*range(first + 1, len(count_LEE) + 1), *range(first - 1, -1, -1)]:
            bin_LE[layer] = _between(count_LEE, bin_LE, layer, room)
        before = -1.0
        while (now := kept(count_LEE, [bin_LE[layer] for layer in sorted(bin_LE)])) > before:
            before = now
            for layer in [*range(len(bin_LE)), *reversed(range(len(bin_LE) - 1))]:
                bin_LE[layer] = _between(count_LEE, bin_LE, layer, room)
        found = [bin_LE[layer] for layer in sorted(bin_LE)]
        if not best or kept(count_LEE, found) > kept(count_LEE, best):
            best = found
    return best


def _between(count_LEE: Sequence[Floats], bin_LE: dict[int, Ints], layer: int, room: Ints) -> Ints:
    """The best bins of a layer, given those of its neighbours: an assignment of experts to seats."""
    experts = len(count_LEE[0])
    stays_EP = np.zeros((experts, len(room)))
    if layer - 1 in bin_LE:
        stays_EP += count_LEE[layer - 1].T @ np.eye(len(room))[bin_LE[layer - 1]]
    if layer + 1 in bin_LE:
        stays_EP += count_LEE[layer] @ np.eye(len(room))[bin_LE[layer + 1]]
    seat = np.repeat(np.arange(len(room)), room)
    expert, taken = linear_sum_assignment(-stays_EP[:, seat])
    bin_E = np.empty(experts, np.int64)
    bin_E[expert] = seat[taken]
    return bin_E


def _grouped(count_LEE: Sequence[Floats], layer: int, room: Ints) -> Ints:
    """Experts of one layer in groups whose tokens come from, and go to, the same experts."""
    experts = len(count_LEE[0])
    towards = [count_LEE[layer - 1].T] if layer else []
    towards += [count_LEE[layer]] if layer < len(count_LEE) else []
    profile = np.concatenate(towards, 1)
    alike_EE = profile @ profile.T
    weight_E = np.diag(alike_EE).copy()
    bin_E, free = np.full(experts, -1, np.int64), np.ones(experts, bool)
    for p in np.argsort(-room, kind="stable"):
        for place in range(room[p]):
            near_E = alike_EE[:, bin_E == p].sum(1) if place else weight_E
            chosen = int(np.where(free, near_E, -np.inf).argmax())
            bin_E[chosen], free[chosen] = p, False
    return bin_E


def _solve(
    objective: Floats, rows: Sequence[Row], *, integers: int, top: float, seconds: float, budget: Budget
) -> Floats | None:  # fmt: skip
    """Minimise; the first `integers` variables are 0 or 1, the others from 0 to `top`. None: nothing found in time."""
    indices = np.concatenate([np.asarray(row[0], np.int64) for row in rows])
    values = np.concatenate([np.asarray(row[1], float) for row in rows])
    which = np.repeat(np.arange(len(rows)), [len(row[0]) for row in rows])
    matrix = coo_array((values, (which, indices)), shape=(len(rows), len(objective))).tocsr()
    limits = LinearConstraint(matrix, np.array([row[2] for row in rows]), np.array([row[3] for row in rows]))
    kind = np.arange(len(objective)) < integers
    bounds = Bounds(np.zeros(len(objective)), np.where(kind, 1.0, top))
    options = {"time_limit": seconds, "mip_rel_gap": GAP}
    result = milp(objective, constraints=limits, integrality=kind.astype(int), bounds=bounds, options=options)
    # HiGHS's status 1 is a limit that was reached; there may be a solution all the same.
    budget.exact = budget.exact and result.status == 0
    if result.x is None or not math.isfinite(result.fun):
        return None
    solution: Floats = result.x
    return solution
