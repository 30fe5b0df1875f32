"""A pipeline's steps: when each stage is done with all microbatches, by the schedule 1F1B.

Legend: S steps, M microbatches, P stages, D data ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Turn(NamedTuple):
    stage: int
    backward: bool
    microbatch: int


def turns(stages: int, microbatches: int) -> Iterator[Turn]:
    """All turns of 1F1B, so that each comes after those it needs."""
    orders = [_of_stage(stage, stages, microbatches) for stage in range(stages)]
    at, done = [0] * stages, set[Turn]()
    while any(place < len(order) for place, order in zip(at, orders, strict=True)):
        for stage, order in enumerate(orders):
            while at[stage] < len(order):
                turn = order[at[stage]]
                need = _need(turn, stages)
                if need is not None and need not in done:
                    break
                done.add(turn)
                at[stage] += 1
                yield turn


def _of_stage(stage: int, stages: int, microbatches: int) -> list[Turn]:
    warm = min(stages - stage - 1, microbatches)
    order = [Turn(stage, False, number) for number in range(warm)]
    for number in range(microbatches - warm):
        order += [Turn(stage, False, warm + number), Turn(stage, True, number)]
    return order + [Turn(stage, True, number) for number in range(microbatches - warm, microbatches)]


def _need(turn: Turn, stages: int) -> Turn | None:
    """The turn of a neighbour from which this one's input comes."""
    if not turn.backward:
        return Turn(turn.stage - 1, False, turn.microbatch) if turn.stage else None
    return Turn(turn.stage + 1, True, turn.microbatch) if turn.stage < stages - 1 else None


def pipeline(ready: Array, forward: Array, backward: Array, send: Array) -> Array:
    """When each stage is done, (S, P, D), from when it is ready, (S, P, D), its seconds of each microbatch, (S, M, P, D), and
    those of what it sends, (S, P, D)."""
    stages, microbatches = ready.shape[1], forward.shape[1]
    free = np.ascontiguousarray(ready.transpose(1, 0, 2))
    seconds = [np.ascontiguousarray(table.transpose(2, 1, 0, 3)) for table in (forward, backward)]
    under_way = send.transpose(1, 0, 2)
    ended: dict[Turn, Array] = {}
    for turn in turns(stages, microbatches):
        need = _need(turn, stages)
        start = free[turn.stage]
        if need is not None:
            start = np.maximum(start, ended.pop(need) + under_way[need.stage])
        ended[turn] = free[turn.stage] = start + seconds[turn.backward][turn.stage, turn.microbatch]
    return free.transpose(1, 0, 2)
