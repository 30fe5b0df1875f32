"""Why a traced job is slow: what the durations of its operations have in common (OSDI'25, "Understanding Stragglers in Large
Model Training Using What-if Analysis", section 5).

Each cause is a suspicion with the durations that operations would have without it; a replay of those says what it costs. A stage
is long where all its replicas compute long, a worker is slow where its replicas do not, sequences differ where a microbatch that
is long forward is long backward. Causes in the network are in `network_causes.py`.

Legend: O operations of a lane, S steps, D replicas (dp), P stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainrt.diagnostics.replay.replay import Replay
from trainrt.diagnostics.replay.trace import BACKWARD, FORWARD, GC

Numbers = NDArray[np.float64]

LONG_STAGE = 1.05
SLOW_WORKER = 1.1
"""From what ratio to its peers on a stage, a worker is suspected."""
LASTING = 0.8
"""In what share of the steps it must be so."""
CORRELATED = 0.9
"""The study's bound on the correlation of forward and backward, above which the lengths of sequences are to blame."""
UNEVEN = 0.03
"""The least standard deviation of a microbatch's compute, of its mean, that sequences are suspected for."""


@dataclass(frozen=True, slots=True)
class Suspicion:
    """cause, kind, action: as in a verdict. workers: (stage, replica) to blame. scale: factors on the traced durations without
    it, broadcast to (O, S, D). lasting: in what share of the steps it shows. what, evidence: for people.
    """

    cause: str
    kind: str
    action: str
    workers: Sequence[tuple[int, int]]
    scale: Numbers
    lasting: float
    what: str
    evidence: Sequence[str]


def causes_in_work(replay: Replay) -> list[Suspicion]:
    """What the trace gives reason to suspect of compute."""
    compute = Compute.of(replay)
    found = [long_stage(replay, compute), slow_workers(replay, compute), uneven_sequences(replay, compute)]
    return [one for one in (*found, garbage(replay)) if one is not None]


@dataclass(frozen=True, slots=True)
class Compute:
    """load: seconds of compute of each worker in a step, (P, S, D). chunks: by (chunk of the model, 0 forward or 1 backward) the
    operations, in their order. correlation, deviation: see `_correlation`.
    """

    load: Numbers
    chunks: dict[tuple[int, int], NDArray[np.int64]]
    correlation: float | None
    deviation: float

    @classmethod
    def of(cls, replay: Replay) -> Compute:
        lanes = replay.lanes
        forward, backward = lanes.is_type(FORWARD), lanes.is_type(BACKWARD)
        both = np.flatnonzero(forward | backward)
        load = np.zeros((lanes.stages, *replay.traced.shape[1:]))
        np.add.at(load, lanes.stage[both], replay.traced[both])
        chunks: dict[tuple[int, int], list[int]] = {}
        for operation in both.tolist():
            chunks.setdefault((lanes.chunk(operation), int(backward[operation])), []).append(operation)
        ordered = {key: np.array(sorted(some, key=lambda one: lanes.seq_id[one])) for key, some in chunks.items()}
        return cls(load, ordered, *_correlation(replay, ordered))

    @property
    def uneven(self) -> bool:
        """Whether sequences differ in length: forward and backward vary, and together."""
        return self.correlation is not None and self.correlation >= CORRELATED and self.deviation >= UNEVEN

    @property
    def of_worker(self) -> Numbers:
        """Mean over the steps, (P, D)."""
        return self.load.mean(axis=1)


def _correlation(replay: Replay, chunks: dict[tuple[int, int], NDArray[np.int64]]) -> tuple[float | None, float]:
    """(Pearson's r of forward and backward over microbatches, standard deviation of a microbatch's forward, of the mean).

    About the mean of a worker's microbatches in a step (over steps, where there is one a step): what is slow all through a step
    does not count.
    """
    forwards: list[Numbers] = []
    backwards: list[Numbers] = []
    for (chunk, direction), operations in chunks.items():
        other = chunks.get((chunk, 1))
        if direction or other is None or len(other) != len(operations):
            continue
        by_microbatch = replay.lanes.mb_id[operations], replay.lanes.mb_id[other]
        if set(by_microbatch[0].tolist()) == set(by_microbatch[1].tolist()):
            operations, other = (
                some[np.argsort(ids, kind="stable")]
                for some, ids in zip((operations, other), by_microbatch, strict=True)
            )
        axis = 0 if len(operations) > 1 else 1
        for some, into in ((operations, forwards), (other, backwards)):
            spent = replay.traced[some]
            mean = spent.mean(axis=axis, keepdims=True)
            # About a mean of n of its own, n values deviate by n - 1 parts of n.
            unbiased = np.sqrt(spent.shape[axis] / max(spent.shape[axis] - 1, 1))
            into.append(((spent - mean) * unbiased / np.maximum(spent.mean(), 1e-12)).reshape(-1))
    if not forwards:
        return None, 0.0
    forward, backward = np.concatenate(forwards), np.concatenate(backwards)
    both = float(np.sqrt((forward**2).mean() * (backward**2).mean()))
    return (float((forward * backward).mean() / both) if both > 1e-9 else None), float(np.sqrt((forward**2).mean()))


def _typical(values: Numbers) -> Numbers:
    """Over the last axis, what is usual: the median, of two the lesser, so that one slow replica is not taken for usual."""
    return np.median(values, axis=-1) if values.shape[-1] != 2 else values.min(axis=-1)


def long_stage(replay: Replay, compute: Compute) -> Suspicion | None:
    """Stages with more work than others: without it, each chunk takes the mean of all (section 5.2)."""
    lanes = replay.lanes
    usual = _typical(compute.of_worker)
    ratio = usual / usual.mean()
    worst = int(np.argmax(ratio))
    if ratio[worst] < LONG_STAGE:
        return None
    scale = np.ones((len(lanes.stage), 1, 1))
    for direction in (0, 1):
        some = {chunk: operations for (chunk, way), operations in compute.chunks.items() if way == direction}
        spent = {chunk: _typical(replay.traced[operations].mean(axis=(0, 1))) for chunk, operations in some.items()}
        even = float(np.mean(list(spent.values())))
        for chunk, operations in some.items():
            scale[operations] = even / max(float(spent[chunk]), 1e-12)
    usual_in_step = _typical(compute.load)
    lasting = float((usual_in_step[worst] >= LONG_STAGE * usual_in_step.mean(axis=0)).mean())
    evidence = [f"seconds of compute in a step, by stage: {listed(usual)}"]
    if worst == lanes.stages - 1:
        evidence.append("it is the last stage, which also computes the output layer and the loss")
    if lanes.replicas == 1:
        lasting /= 2
        evidence.append("there is one replica, so a long stage and a slow worker look alike")
    return Suspicion(
        "stage_imbalance", "stage", "repartition", [(worst, replica) for replica in range(lanes.replicas)], scale, lasting,
        f"stage {worst} computes {ratio[worst]:.2f}x as long as the mean of the stages, in all its replicas", evidence,
    )  # fmt: skip


def slow_devices(replay: Replay, compute: Compute) -> tuple[NDArray[np.bool_], Numbers, Numbers]:
    """(which workers are slow, ratio to their peers, share of the steps they are slower in), (P, D) each.

    A slow device is slow all the time: in most steps, and with its shortest microbatches too. Where sequences differ, what all
    stages of a replica share is their data and no device's fault.
    """
    lanes = replay.lanes
    ratio, in_step = _ratio(compute.of_worker), _ratio(compute.load)
    shared = compute.uneven and lanes.stages > 1
    replica = _of_replica(ratio) if shared else np.ones((1, 1))
    ratio, in_step = ratio / replica, in_step / (_of_replica(in_step) if shared else 1)
    lasting = (in_step > (1 + SLOW_WORKER) / 2).mean(axis=1)
    # Four standard errors of a worker's mean: of many that vary, some are slow by chance.
    chance = (
        4 * compute.deviation / np.sqrt(sum(map(len, compute.chunks.values())) / 2 / lanes.stages * len(lanes.steps))
    )
    shortest = _ratio(_shortest(replay, compute)) / replica
    slow = (
        (ratio >= SLOW_WORKER)
        & (shortest >= SLOW_WORKER)
        & (ratio - 1 > (0 if shared else chance))
        & (lasting >= LASTING)
    )
    return slow, ratio, lasting


def slow_workers(replay: Replay, compute: Compute) -> Suspicion | None:
    """Workers that compute longer than the same stage of other replicas (section 5.1)."""
    lanes = replay.lanes
    slow, ratio, lasting = slow_devices(replay, compute)
    if lanes.replicas == 1 or not slow.any():
        return None
    workers = sorted(((int(s), int(d)) for s, d in np.argwhere(slow)), key=lambda place: -ratio[place])
    factor = np.where(slow, 1 / ratio, 1.0)[lanes.stage]
    scale = np.where(lanes.is_type(FORWARD, BACKWARD)[:, None], factor, 1.0)[:, None, :]
    evidence = [
        f"rank {lanes.ranks[place]} (stage {place[0]}, dp_rank {place[1]}) computes {compute.of_worker[place]:.4g} s a step, "
        f"its peers in other replicas {compute.of_worker[place] / ratio[place]:.4g} s; slower in {lasting[place]:.0%} of steps"
        for place in workers[:8]
    ]
    named = ", ".join(f"rank {lanes.ranks[place]} ({ratio[place]:.2f}x)" for place in workers[:8])
    named += f" and {len(workers) - 8} more" if len(workers) > 8 else ""
    return Suspicion(
        "slow_worker", "rank", "evict", workers, scale, float(lasting[slow].min()),
        f"against the same stage of other replicas, compute takes longer on {named}",
        evidence,
    )  # fmt: skip


def _ratio(values: Numbers) -> Numbers:
    """To what is usual over the replicas (last axis); of two replicas, to the other."""
    usual = values[..., ::-1] if values.shape[-1] == 2 else np.median(values, axis=-1, keepdims=True)
    return values / np.maximum(usual, 1e-12)


def _of_replica(ratio: Numbers) -> Numbers:
    """What all stages of a replica share, (1, D): their data, not their devices. 1 where there is one stage."""
    if len(ratio) == 1:
        return np.ones_like(ratio)
    return (ratio.min(axis=0) if len(ratio) == 2 else np.median(ratio, axis=0))[None]


def _shortest(replay: Replay, compute: Compute) -> Numbers:
    """Seconds of short microbatches (the 20 % quantile) of each worker, (P, D): a slow device is slow there too."""
    found = np.zeros((replay.lanes.stages, replay.lanes.replicas))
    for operations in compute.chunks.values():
        spent = replay.traced[operations].reshape(-1, replay.lanes.replicas)
        found[replay.lanes.stage[operations[0]]] += np.quantile(spent, 0.2, axis=0)
    return found


def uneven_sequences(replay: Replay, compute: Compute) -> Suspicion | None:
    """Microbatches of unequal work (section 5.3): without it, each takes its worker's mean, and replicas have equal shares."""
    if compute.correlation is None or not compute.uneven:
        return None
    lanes = replay.lanes
    scale = np.ones(replay.traced.shape)
    slow = slow_devices(replay, compute)[0]
    share = compute.of_worker / np.median(compute.of_worker, axis=1, keepdims=True)
    if lanes.stages > 1:
        share = _of_replica(share)
    elif not slow.all():
        # Without a pipeline all that is not a slow device is data.
        share = np.where(slow, share[~slow].mean(), share)
    share /= share.mean()
    for operations in compute.chunks.values():
        spent = replay.traced[operations]
        scale[operations] = spent.mean(axis=(0, 1)) / share[0] / np.maximum(spent, 1e-12)
    evidence = [
        f"forward and backward of a microbatch correlate with r = {compute.correlation:.3f} (from {CORRELATED} on, lengths of "
        "sequences are to blame)",
        f"a microbatch's compute deviates from the mean of its worker's by {compute.deviation:.0%} (standard deviation)",
    ]
    load = compute.load.sum(axis=0)
    lasting = float((load.max(axis=1) > load.mean(axis=1) * (1 + UNEVEN / 2)).mean()) if lanes.replicas > 1 else 1.0
    return Suspicion(
        "sequence_imbalance", "workload", "rebalance", (), scale, lasting,
        "microbatches differ in work, by the lengths of their sequences", evidence,
    )  # fmt: skip


def garbage(replay: Replay) -> Suspicion | None:
    """Recorded pauses of garbage collection (section 5.4)."""
    chosen = replay.lanes.is_type(GC)
    if not chosen.any() or not replay.traced[chosen].any():
        return None
    pauses = replay.traced[chosen]
    longest = pauses.max(axis=(0, 2))
    return Suspicion(
        "garbage_collection", "code", "plan_gc", (), np.where(chosen, 0.0, 1.0)[:, None, None], float((longest > 0).mean()),
        "ranks collect garbage at different times, and all others wait",
        [f"the longest pause of a step is {longest.mean():.4g} s, the mean pause {pauses.mean():.4g} s"],
    )  # fmt: skip


def listed(values: Numbers) -> str:
    """The first values of a list, for people."""
    shown = [f"{value:.4g}" for value in values[:16]]
    return ", ".join(shown) + (f", ... ({len(values)})" if len(values) > 16 else "")
