"""The steps of a trace, played again with other durations (OSDI'25, "Understanding Stragglers in Large Model Training Using
What-if Analysis", section 3).

Ideal is the mean over all operations of its type for compute, the median for communication. A communication's duration is its
transfer alone: from the arrival of the last member to its end. Between what an operation waits for and its start no time passes,
so a replay with the durations of the trace is a little shorter than the trace; by how much is `WhatIf.discrepancy`.

Legend: O operations of a lane, S steps, D replicas (dp), P stages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainrt.diagnostics.replay.dependencies import Dependencies, find_dependencies
from trainrt.diagnostics.replay.lanes import Lanes, arrange
from trainrt.diagnostics.replay.trace import (
    BACKWARD_RECV,
    BACKWARD_SEND,
    COMPUTE,
    FORWARD_RECV,
    FORWARD_SEND,
    OPTYPES,
    Trace,
)

Numbers = NDArray[np.float64]
Mask = NDArray[np.bool_]

BLOCK = 1 << 21
"""Durations held at once for scenarios, so that memory stays bounded (16 MiB an array)."""
SLOWEST = 0.03
"""The share of workers that M_W is about."""
FORWARD_PIPELINE, BACKWARD_PIPELINE = "forward-pipeline", "backward-pipeline"
"""Types under which both ends of a transfer between stages are summed up."""


@dataclass(frozen=True, slots=True)
class Replay:
    """A trace that can be played again. traced: durations, transfers for communication, (O, S, D). ideal: (O,). Seconds."""

    lanes: Lanes
    dependencies: Dependencies
    traced: Numbers
    ideal: Numbers

    @classmethod
    def of(cls, trace: Trace) -> Replay:
        """Raises NotEnoughData and DiagnosticsError as `arrange` and `find_dependencies` do."""
        lanes = arrange(trace)
        dependencies = find_dependencies(lanes)
        traced = _transfers(lanes, dependencies)
        return cls(lanes, dependencies, traced, _ideal(lanes, traced))

    def run(self, durations: Numbers) -> Numbers:
        """Seconds of each of B steps, (B,), from durations (O, B, D)."""
        operations, steps, replicas = durations.shape
        end = np.zeros((operations + 1, steps, replicas))
        for level in self.dependencies.levels:
            start = end[level.before[:, 0]]
            for column in range(1, level.before.shape[1]):
                np.maximum(start, end[level.before[:, column]], out=start)
            several = len(level.first) < len(level.members)
            if several:
                start = np.maximum.reduceat(start, level.first, axis=0)
            if level.narrow < len(level.first):
                start[level.narrow :] = start[level.narrow :].max(axis=2, keepdims=True)
            if several:
                start = start[level.node]
            start += durations[level.members]
            end[level.members] = start
        return end.max(axis=(0, 2))

    def scenarios(self, count: int, durations: Callable[[int, slice], Numbers]) -> Numbers:
        """Seconds of each step in each of `count` scenarios, (count, S).

        durations(scenario, steps) gives the durations of some steps, (O, steps, D). As many as fit a block run together.
        """
        operations, steps, replicas = self.traced.shape
        room = max(1, BLOCK // (operations * replicas))
        pieces = [
            (one, slice(begin, min(begin + room, steps))) for one in range(count) for begin in range(0, steps, room)
        ]
        found = np.zeros((count, steps))
        for batch in _batches(pieces, room):
            seconds = self.run(np.concatenate([durations(one, some) for one, some in batch], axis=1))
            done = 0
            for one, some in batch:
                found[one, some] = seconds[done : (done := done + some.stop - some.start)]
        return found

    def keeping(self, masks: Sequence[Mask]) -> Numbers:
        """Seconds of each step where what a mask selects lasts as traced and the rest is ideal, (masks, S).

        A mask is (O, 1, 1), (O, 1, D) or as far as it can be broadcast to (O, S, D).
        """
        ideal = self.ideal[:, None, None]
        shape = self.traced.shape

        def durations(one: int, some: slice) -> Numbers:
            return np.where(np.broadcast_to(masks[one], shape)[:, some], self.traced[:, some], ideal)

        return self.scenarios(len(masks), durations)

    def keeping_replicas(self) -> Numbers:
        """Seconds of each step where one replica is as traced and the others are ideal, by replica, (D, S).

        All ideal replicas are alike, so two lanes say it.
        """
        operations, steps, replicas = self.traced.shape
        if replicas == 1:
            return self.keeping([np.ones((1, 1, 1), dtype=bool)])
        lanes = self.traced.reshape(operations, steps * replicas)
        room = max(1, BLOCK // (2 * operations))
        found = np.zeros(steps * replicas)
        for begin in range(0, len(found), room):
            part = lanes[:, begin : begin + room]
            pair = np.stack([part, np.broadcast_to(self.ideal[:, None], part.shape)], axis=2)
            found[begin : begin + room] = self.run(pair)
        return found.reshape(steps, replicas).T


def _batches(pieces: list[tuple[int, slice]], room: int) -> list[list[tuple[int, slice]]]:
    """Pieces in turn, together at most `room` steps."""
    batches: list[list[tuple[int, slice]]] = []
    filled = room
    for piece in pieces:
        steps = piece[1].stop - piece[1].start
        if filled + steps > room:
            batches.append([])
            filled = 0
        batches[-1].append(piece)
        filled += steps
    return batches


def _transfers(lanes: Lanes, dependencies: Dependencies) -> Numbers:
    """Durations, of communication from the arrival of the node's last member. Clocks that differ make it 0, never less."""
    moves = np.flatnonzero(~lanes.is_type(*COMPUTE))
    if not len(moves):
        return lanes.duration
    durations = lanes.duration.copy()
    order = moves[np.argsort(dependencies.node[moves], kind="stable")]
    _, first, number = np.unique(dependencies.node[order], return_index=True, return_inverse=True)
    last = np.maximum.reduceat(lanes.start[order], first, axis=0)
    wide = dependencies.wide[order[first]]
    last[wide] = last[wide].max(axis=2, keepdims=True)
    lag = last[number.reshape(-1)] - lanes.start[order]
    durations[order] = np.maximum(durations[order] - lag, 0)
    return durations


def _ideal(lanes: Lanes, traced: Numbers) -> Numbers:
    ideal = np.zeros(len(traced))
    for code in np.unique(lanes.optype):
        chosen = lanes.optype == code
        ideal[chosen] = (np.mean if OPTYPES[code] in COMPUTE else np.median)(traced[chosen])
    return ideal


@dataclass(frozen=True, slots=True)
class WhatIf:
    """The study's figures of one trace. original: the trace's own, simulated: replayed as traced; seconds by step, (S,).

    ideal: seconds of a step where all is ideal (the same in each). slowdown S = mean(simulated) / ideal. by_replica (D,),
    by_stage (P,), by_type, by_worker (P, D): the slowdown where this alone is as traced (a worker's is the lesser of its
    replica's and its stage's, equation 4). M_W, M_S: share of the slowdown that goes when the slowest 3 % of workers, the last
    stage, are ideal (equation 5); None where there is no slowdown. slowest: (stage, replica) of those workers.
    """

    steps: NDArray[np.int64]
    original: Numbers
    simulated: Numbers
    ideal: float
    slowdown: float
    by_replica: Numbers
    by_stage: Numbers
    by_type: Mapping[str, float]
    by_worker: Numbers
    slowest: Sequence[tuple[int, int]]
    M_W: float | None
    M_S: float | None

    @property
    def discrepancy(self) -> float:
        """By what share the replayed step is longer (shorter, if negative) than the traced one, mean over steps."""
        return float(self.simulated.mean() / self.original.mean() - 1)


def what_if(replay: Replay) -> WhatIf:
    """All figures of a trace."""
    lanes = replay.lanes
    stage = lanes.stage[:, None, None]
    types = _types(lanes)
    everything = np.ones((1, 1, 1), dtype=bool)
    masks = [everything, ~everything]
    masks += [stage == number for number in range(lanes.stages)]
    masks += [mask[:, None, None] for mask in types.values()]
    masks.append(stage != lanes.stages - 1)
    seconds = replay.keeping(masks)
    ideal = float(seconds[1].mean())
    scaled = seconds.mean(axis=1) / ideal
    by_stage, by_replica = scaled[2 : 2 + lanes.stages], replay.keeping_replicas().mean(axis=1) / ideal
    by_worker = np.minimum(by_replica[None, :], by_stage[:, None])
    slowest = _slowest(lanes, by_worker)
    others = np.ones((lanes.stages, lanes.replicas), dtype=bool)
    others[tuple(np.array(slowest).T)] = False
    without = replay.keeping([others[lanes.stage][:, None, :]]).mean()
    simulated = float(seconds[0].mean())

    def share(rest: float) -> float | None:
        return float((simulated - rest) / (simulated - ideal)) if simulated > ideal * (1 + 1e-9) else None

    ends = lanes.start + lanes.duration
    return WhatIf(
        lanes.steps, ends.max(axis=(0, 2)) - lanes.start.min(axis=(0, 2)), seconds[0], ideal, float(scaled[0]),
        by_replica, by_stage, dict(zip(types, scaled[2 + lanes.stages : -1].tolist(), strict=True)), by_worker, slowest,
        share(float(without)), share(float(seconds[-1].mean())),
    )  # fmt: skip


def _types(lanes: Lanes) -> dict[str, Mask]:
    """Which operations are of each type, transfers between stages in two types."""
    pipeline = {FORWARD_PIPELINE: (FORWARD_SEND, FORWARD_RECV), BACKWARD_PIPELINE: (BACKWARD_SEND, BACKWARD_RECV)}
    merged = [name for names in pipeline.values() for name in names]
    kinds = pipeline | {name: (name,) for name in OPTYPES if name not in merged}
    masks = {kind: lanes.is_type(*names) for kind, names in kinds.items()}
    return {kind: mask for kind, mask in masks.items() if mask.any()}


def _slowest(lanes: Lanes, by_worker: Numbers) -> list[tuple[int, int]]:
    """The slowest 3 % of workers, at least one; of equals the lower rank first."""
    number = -(-by_worker.size * round(SLOWEST * 100) // 100)
    order = np.lexsort((lanes.ranks.reshape(-1), -by_worker.reshape(-1)))[:number]
    return [(int(place // lanes.replicas), int(place % lanes.replicas)) for place in order]
