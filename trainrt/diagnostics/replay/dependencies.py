"""What waits for what in one step of a pipeline, found from a trace (OSDI'25, "Understanding Stragglers in Large Model Training
Using What-if Analysis", section 3.2).

Four rules make the graph of a lane (`lanes.py`); all lanes share it:
- a worker computes in the order it computed in; each kind of send and receive, and the replicas' collectives, keep theirs;
- a send follows the compute it is of; a receive is posted after the compute before, and its compute waits for it;
- the first forward of a chunk waits for the gather of its parameters, the reduction of its gradients for its last backward;
- what closes the step comes in one order behind the last backward.

A *node* is what starts together: the two ends of a transfer, the members of a collective, or one operation alone. It starts when
its last member has arrived, in all replicas where it is *wide*.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainrt.diagnostics.replay.lanes import Lanes
from trainrt.diagnostics.replay.trace import (
    BACKWARD,
    BACKWARD_RECV,
    BACKWARD_SEND,
    CLIP,
    EMBEDDING,
    FORWARD,
    FORWARD_RECV,
    FORWARD_SEND,
    GATHER,
    GC,
    LAYERNORM,
    OPTIMIZER,
    OPTYPES,
    SCATTER,
    SEPARATE,
)
from trainrt.errors import NotEnoughData

CLOCKS_SECONDS = 5e-5
"""By how much clocks of two streams may differ."""


@dataclass(frozen=True, slots=True)
class Level:
    """Nodes that wait for nothing of their own level. M members, N nodes; narrow nodes first.

    members: operations, ordered by node, (M,). before: for each what it waits for, padded with O (which ends at 0), (M, K).
    first: where each node's members begin, (N,). node: number of each member's node, (M,). narrow: how many nodes are not wide.
    """

    members: NDArray[np.int64]
    before: NDArray[np.int64]
    first: NDArray[np.int64]
    node: NDArray[np.int64]
    narrow: int


@dataclass(frozen=True, slots=True)
class Dependencies:
    """levels: in topological order. node: of each operation, (O,). wide: which nodes join the replicas.

    joins: for each send or receive that moves something, the two stages it is between, (O, 2), -1 else.
    orders: by stage, its compute by start.
    """

    levels: Sequence[Level]
    node: NDArray[np.int64]
    wide: NDArray[np.bool_]
    joins: NDArray[np.int64]
    orders: Sequence[Sequence[int]]

    def out_of_order(self, lanes: Lanes) -> float:
        """In what share of the lanes a stage computed in another order than in most, so that a replay is not to be relied on."""
        wrong = np.zeros(lanes.start.shape[1:], dtype=bool)
        for order in self.orders:
            wrong |= (np.diff(lanes.start[list(order)], axis=0) < -CLOCKS_SECONDS).any(axis=0)
        return float(wrong.mean())


def find_dependencies(lanes: Lanes) -> Dependencies:
    """The graph of a lane. Raises NotEnoughData where sends, receives and compute do not fit each other."""
    graph = _Graph(lanes)
    for stage in range(lanes.stages):
        graph.compute_in_order(stage)
        graph.transfers(stage)
        graph.replicas(stage)
        graph.close(stage)
    graph.join_transfers()
    graph.join_stages()
    return graph.finish()


class _Graph:
    """The graph as it grows. Operations are numbers, as in Lanes."""

    def __init__(self, lanes: Lanes) -> None:
        self.lanes = lanes
        count = len(lanes.stage)
        self.begin, self.end = lanes.typical()
        self.before: list[list[int]] = [[] for _ in range(count)]
        self.node = np.arange(count)
        self.wide = np.zeros(count, dtype=bool)
        self.joins = np.full((count, 2), -1, dtype=np.int64)
        self.ends: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        self._by_place: dict[tuple[int, str], list[int]] = defaultdict(list)
        for operation in np.lexsort((lanes.seq_id, lanes.optype, lanes.stage)).tolist():
            self._by_place[int(lanes.stage[operation]), OPTYPES[lanes.optype[operation]]].append(operation)
        self.chunk_of = lanes.chunk
        self.last = max((lanes.chunk(int(one)) for one in np.flatnonzero(lanes.is_type(FORWARD))), default=0)
        self._microbatch = self._microbatches()

    def of(self, stage: int, *names: str) -> list[int]:
        """Operations of a stage by type and, within it, by number."""
        return [operation for name in names for operation in self._by_place[stage, name]]

    def in_order(self, stage: int) -> list[int]:
        """A stage's compute by start."""
        return sorted(self.of(stage, FORWARD, BACKWARD), key=lambda operation: (self.begin[operation], operation))

    def chain(self, operations: Sequence[int]) -> None:
        for earlier, later in pairwise(operations):
            self.before[later].append(earlier)

    def _microbatches(self) -> dict[int, int]:
        """The microbatch of each compute: its mb_id, or where that names none, its turn within its chunk."""
        found: dict[tuple[str, int], list[int]] = defaultdict(list)
        for (_, name), operations in self._by_place.items():
            if name in (FORWARD, BACKWARD):
                for operation in operations:
                    found[name, self.chunk_of(operation)].append(operation)
        named = [sorted(int(self.lanes.mb_id[operation]) for operation in group) for group in found.values()]
        trusted = all(names == named[0] and names[0] >= 0 and len(set(names)) == len(names) for names in named)
        return {
            operation: int(self.lanes.mb_id[operation]) if trusted else turn
            for group in found.values()
            for turn, operation in enumerate(group)
        }

    def compute_in_order(self, stage: int) -> None:
        for name in (FORWARD, BACKWARD):
            if not self.of(stage, name):
                raise NotEnoughData(f"stage {stage} has no {name}; allowed: forward and backward compute of each stage")
        self.chain(self.in_order(stage))

    def transfers(self, stage: int) -> None:
        """Sends and receives of a stage, each with the compute it is of."""
        for name, compute, outward, step in (
            (FORWARD_SEND, FORWARD, True, 1), (FORWARD_RECV, FORWARD, False, -1),
            (BACKWARD_SEND, BACKWARD, True, -1), (BACKWARD_RECV, BACKWARD, False, 1),
        ):  # fmt: skip
            moves, computes = self.of(stage, name), self.of(stage, compute)
            self.chain(moves)
            turn = {operation: place for place, operation in enumerate(computes)}
            for move, matched in self._match(stage, name, moves, computes, step):
                chunk, previous = self.chunk_of(matched), turn[matched] - 1
                if outward:
                    self.before[move].append(matched)
                else:
                    self.before[matched].append(move)
                    if previous >= 0:
                        self.before[move].append(computes[previous])
                if self._goes(chunk + step):
                    arrives = chunk + step if outward else chunk
                    self.ends[compute, arrives, self._microbatch[matched]].append(move)

    def _match(self, stage: int, name: str, moves: list[int], computes: list[int], step: int) -> list[tuple[int, int]]:
        """Pairs of a send or receive and its compute, by turn.

        Profilers of interleaved pipelines also note transfers that were never launched: at the first and last chunk of the
        model (a pair is made, nothing moves) and before the first or after the last compute (no pair).
        """
        wanted = [operation for operation in computes if self._goes(self.chunk_of(operation) + step)]
        for some in (self._launched(name, moves, computes), moves):
            if len(some) == len(wanted):
                return list(zip(some, wanted, strict=True))
            if len(some) == len(computes):
                return list(zip(some, computes, strict=True))
            if len(some) + 1 == len(computes) and computes[0] not in wanted:
                return list(zip(some, computes[1:], strict=True))
        raise NotEnoughData(f"stage {stage} has {len(moves)} {name} for {len(wanted)} that its compute needs")

    def _goes(self, chunk: int) -> bool:
        """Whether something is exchanged with a chunk."""
        return self.lanes.stages > 1 and 0 <= chunk <= self.last

    def _launched(self, name: str, moves: list[int], computes: list[int]) -> list[int]:
        """Without receives after the last compute has begun and sends before the first has ended."""
        if name in (FORWARD_RECV, BACKWARD_RECV):
            latest = max(self.begin[operation] for operation in computes) + CLOCKS_SECONDS
            return [move for move in moves if self.begin[move] <= latest]
        earliest = min(self.end[operation] for operation in computes) - CLOCKS_SECONDS
        return [move for move in moves if self.end[move] >= earliest]

    def join_transfers(self) -> None:
        for (compute, chunk, microbatch), moves in self.ends.items():
            if len(moves) != 2:
                raise NotEnoughData(
                    f"the {compute} of chunk {chunk}, microbatch {microbatch} has {len(moves)} ends of its transfer; "
                    "allowed: a send and a receive"
                )
            self.node[moves] = min(moves)
            self.joins[moves] = sorted(int(self.lanes.stage[move]) for move in moves)

    def replicas(self, stage: int) -> None:
        """Gathers and reductions over the replicas."""
        moves = sorted(self.of(stage, GATHER, SCATTER), key=lambda move: (self.begin[move], move))
        self.chain(moves)
        self.wide[self.of(stage, GATHER, SCATTER, SEPARATE)] = True
        order, lanes = self.in_order(stage), self.lanes
        for mc in {int(lanes.mc[move]) for move in moves}:

            def own(name: str, mc: int = mc) -> list[int]:
                code = OPTYPES.index(name)
                return [one for one in order if lanes.optype[one] == code and (lanes.mc[one] == mc or mc < 0)]

            # Of several gathers of a chunk the last one counts, of several reductions the first.
            gathers = [move for move in self.of(stage, GATHER) if lanes.mc[move] == mc][-1:]
            scatters = [move for move in self.of(stage, SCATTER) if lanes.mc[move] == mc][:1]
            for gather, forward in zip(gathers, own(FORWARD), strict=False):
                self.before[forward].append(gather)
            for scatter, backward in zip(scatters, own(BACKWARD)[::-1], strict=False):
                self.before[scatter].append(backward)

    def close(self, stage: int) -> None:
        """What follows the last compute: garbage, gradients of norms and embeddings, reductions that are left, the optimizer."""
        last = max(self.in_order(stage), key=lambda operation: self.end[operation])
        scatter = self.of(stage, SCATTER)
        overlapped = bool(self.of(stage, SEPARATE)) or any(self.begin[move] < self.end[last] for move in scatter[:-1])
        behind = [last, *self.of(stage, GC)]
        self.chain(behind)
        tail = [*self.of(stage, LAYERNORM), *self.of(stage, EMBEDDING)]
        tail += [*self.of(stage, SEPARATE)] if overlapped else scatter
        tail += [*self.of(stage, CLIP), *self.of(stage, OPTIMIZER)]
        self.chain([behind[-1], *tail])
        if overlapped and scatter and tail:
            self.before[tail[0]].append(scatter[-1])

    def join_stages(self) -> None:
        """Tied embeddings are reduced between the stages that hold them; the norm of all gradients over everybody."""
        for name in (EMBEDDING, CLIP):
            for members in zip(
                *filter(None, (self.of(stage, name) for stage in range(self.lanes.stages))), strict=False
            ):
                self.node[list(members)] = min(members)
                if name == CLIP:
                    self.wide[list(members)] = True

    def finish(self) -> Dependencies:
        level = _level_of_nodes(self)
        levels = [_level(self, np.flatnonzero(level == depth)) for depth in range(int(level.max()) + 1)]
        orders = [self.in_order(stage) for stage in range(self.lanes.stages)]
        return Dependencies(levels, self.node, self.wide, self.joins, orders)


def _level_of_nodes(graph: _Graph) -> NDArray[np.int64]:
    """For each operation the level of its node: one more than the highest it waits for (Kahn)."""
    count = len(graph.before)
    node = graph.node.tolist()
    waits = [0] * count
    then: list[list[int]] = [[] for _ in range(count)]
    for operation, earlier in enumerate(graph.before):
        waits[node[operation]] += len(earlier)
        for one in earlier:
            then[node[one]].append(node[operation])
    level = [0] * count
    ready = [one for one in set(node) if not waits[one]]
    done = 0
    while ready:
        one = ready.pop()
        done += 1
        for later in then[one]:
            level[later] = max(level[later], level[one] + 1)
            waits[later] -= 1
            if not waits[later]:
                ready.append(later)
    if done < len(set(node)):
        stuck = next(one for one in range(count) if waits[one])
        raise NotEnoughData(
            f"operations wait for each other in a circle, one is {OPTYPES[graph.lanes.optype[stuck]]} "
            f"{graph.lanes.seq_id[stuck]} of stage {graph.lanes.stage[stuck]}; allowed: an order that can have been run"
        )
    return np.array(level)[graph.node]


def _level(graph: _Graph, members: NDArray[np.int64]) -> Level:
    order = np.lexsort((members, graph.node[members], graph.wide[members]))
    members = members[order]
    _, first, number = np.unique(graph.node[members], return_index=True, return_inverse=True)
    # np.unique numbers nodes by value; here they count in the order they stand in.
    place = np.argsort(np.argsort(first))
    width = max(1, max(len(graph.before[member]) for member in members))
    before = np.full((len(members), width), len(graph.before), dtype=np.int64)
    for row, member in enumerate(members):
        before[row, : len(graph.before[member])] = graph.before[member]
    narrow = int((~graph.wide[members[np.sort(first)]]).sum())
    return Level(members, before, np.sort(first), place[number.reshape(-1)], narrow)
