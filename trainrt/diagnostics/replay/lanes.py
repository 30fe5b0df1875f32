"""The operations of a trace, arranged so that what is the same in each step and replica stands in one row.

Replicas of a data-parallel job run one program, and so does each step: a *lane* is one replica (all its stages) in one step.

Legend: O operations of a lane, S steps, D replicas (dp).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainrt.diagnostics.replay.trace import OPTYPES, Trace
from trainrt.errors import DiagnosticsError, NotEnoughData

SAMPLE = 64
"""Lanes whose median start says in which order operations come."""


@dataclass(frozen=True, slots=True)
class Lanes:
    """stage, optype, seq_id, mc, gmc, mb_id: what each operation is, (O,). start, duration: seconds from the first start of the
    step, (O, S, D). steps: their numbers, (S,). ranks: global rank by stage and replica, (P, D). notes: what was left out."""

    stage: NDArray[np.int32]
    optype: NDArray[np.int32]
    seq_id: NDArray[np.int32]
    mc: NDArray[np.int32]
    gmc: NDArray[np.int32]
    mb_id: NDArray[np.int32]
    start: NDArray[np.float64]
    duration: NDArray[np.float64]
    steps: NDArray[np.int64]
    ranks: NDArray[np.int64]
    notes: tuple[str, ...] = ()

    @property
    def stages(self) -> int:
        return self.ranks.shape[0]

    @property
    def replicas(self) -> int:
        return self.ranks.shape[1]

    def chunk(self, operation: int) -> int:
        """The chunk of the model that a compute is of."""
        gmc = int(self.gmc[operation])
        return gmc if gmc >= 0 else max(int(self.mc[operation]), 0) * self.stages + int(self.stage[operation])

    def is_type(self, *names: str) -> NDArray[np.bool_]:
        """Which operations are of these types, (O,)."""
        return np.isin(self.optype, [OPTYPES.index(name) for name in names])

    def typical(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(start, end) of each operation: medians over a sample of lanes, seconds, (O,)."""
        operations = len(self.stage)
        flat = self.start.reshape(operations, -1), self.duration.reshape(operations, -1)
        chosen = np.linspace(0, flat[0].shape[1] - 1, min(SAMPLE, flat[0].shape[1])).astype(int)
        start = flat[0][:, chosen]
        return np.median(start, axis=1), np.median(start + flat[1][:, chosen], axis=1)


def arrange(trace: Trace) -> Lanes:
    """Lanes of the steps in which every replica ran the same operations as in most others.

    Raises DiagnosticsError where an operation is there twice or a worker has two ranks, NotEnoughData where no step is whole.
    """
    row, known = _rows(trace)
    steps, step = np.unique(trace.step, return_inverse=True)
    replicas = trace.sizes["dp_size"]
    shape = (len(known), len(steps), replicas)
    if np.prod(shape, dtype=np.float64) > 16 * len(trace) + 4096:
        raise NotEnoughData(
            f"{trace.source}: most operations are in a few lanes only; allowed: all workers in each step"
        )
    place = (row.astype(np.int64) * shape[1] + step) * replicas + trace.dp_rank
    count = np.bincount(place, minlength=int(np.prod(shape))).reshape(shape)
    if (count > 1).any():
        _refuse_twice(trace, place, int(np.argmax(count > 1)))
    chosen, kept = _whole_steps(trace, count.astype(bool))
    notes = []
    if len(kept) < len(steps):
        notes.append(
            f"{len(steps) - len(kept)} of {len(steps)} steps left out: operations missing, or others than in most"
        )
    at = np.zeros(shape, dtype=np.int64).reshape(-1)
    at[place] = np.arange(len(trace))
    at = at.reshape(shape)[np.ix_(chosen, kept)]
    start = trace.start_ts[at]
    start -= start.min(axis=(0, 2), keepdims=True)
    first = at[:, 0, 0]
    names = ("stage", "optype", "seq_id", "mc", "gmc", "mb_id")
    return Lanes(
        **{name: getattr(trace, name)[first] for name in names}, start=start, duration=trace.duration[at],
        steps=steps[kept].astype(np.int64), ranks=_ranks(trace), notes=tuple(notes),
    )  # fmt: skip


def _rows(trace: Trace) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(for each row of the trace the number of its operation in a lane, the operations' codes)."""
    width = int(trace.seq_id.max()) + 1
    code = (trace.stage.astype(np.int64) * len(OPTYPES) + trace.optype) * width + trace.seq_id
    if code.max() > 16 * len(trace) + 4096:
        known, row = np.unique(code, return_inverse=True)
        return row, known
    seen = np.zeros(int(code.max()) + 1, dtype=bool)
    seen[code] = True
    return (np.cumsum(seen) - 1)[code], np.flatnonzero(seen)


def _whole_steps(trace: Trace, there: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(operations, steps) to keep: the set of operations that most steps have in all replicas."""
    everywhere: Any = there.all(axis=2)
    differ = np.not_equal(everywhere, there.any(axis=2))
    alike = ~differ.any(axis=0)
    if not alike.any():
        lacking = np.argwhere(differ)[0]
        replica = int(np.argmin(there[lacking[0], lacking[1]]))
        raise NotEnoughData(
            f"{trace.source}: no step is whole (dp_rank {replica} lacks operations that other replicas have); "
            "allowed: the same operations of each replica in a step"
        )
    sets, which, often = np.unique(everywhere[:, alike], axis=1, return_inverse=True, return_counts=True)
    most = int(np.argmax(often))
    return np.flatnonzero(sets[:, most]), np.flatnonzero(alike)[which.reshape(-1) == most]


def _refuse_twice(trace: Trace, place: NDArray[np.int64], where: int) -> None:
    first, second = np.flatnonzero(place == where)[:2]
    worker = f"dp_rank {trace.dp_rank[first]}, stage {trace.stage[first]}"
    if trace.rank[first] != trace.rank[second]:
        raise DiagnosticsError(
            f"{trace.source}: column rank: {trace.rank[first]} and {trace.rank[second]} are both {worker}; "
            "allowed: one rank of each tensor-parallel group"
        )
    raise DiagnosticsError(
        f"{trace.source}: column seq_id: {OPTYPES[trace.optype[first]]} {trace.seq_id[first]} of {worker} is in step "
        f"{trace.step[first]} twice (rows {first + 1} and {second + 1}); allowed: once"
    )


def _ranks(trace: Trace) -> NDArray[np.int64]:
    ranks = np.full((trace.sizes["pp_size"], trace.sizes["dp_size"]), -1, dtype=np.int64)
    ranks[trace.stage, trace.dp_rank] = trace.rank
    wrong = np.flatnonzero(ranks[trace.stage, trace.dp_rank] != trace.rank)
    if len(wrong):
        row = wrong[0]
        raise DiagnosticsError(
            f"{trace.source}: column rank, row {row + 1}: {trace.rank[row]}, but dp_rank {trace.dp_rank[row]}, stage "
            f"{trace.stage[row]} is rank {ranks[trace.stage[row], trace.dp_rank[row]]} elsewhere; allowed: one rank a worker"
        )
    return ranks
