"""Traces of made-up jobs: pipelines run by the clock, with durations that a test chooses.

Times are arrays (steps, dp), so that ten thousand ranks take as many calls as one replica.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trainrt.diagnostics.replay.trace import OPTYPES, Trace

Seconds = np.ndarray[Any, np.dtype[np.float64]]
Turn = tuple[str, int, int]
"""Direction, chunk of the stage, microbatch."""

LENGTHS = {
    "forward-compute": 0.1, "backward-compute": 0.2, "forward": 0.001, "backward": 0.001, "params-all-gather": 0.02, "gc": 0.0,
    "grads-reduce-scatter": 0.03, "separate-grads-all-reduce": 0.003, "optimizer": 0.01,
    "optimizer-clip-main-grad": 0.002, "embedding-grads-all-reduce": 0.004,
}  # fmt: skip


@dataclass
class Job:
    """A pipeline of pp stages of vpp chunks, dp replicas.

    seconds: changes durations, (job, name, stage, chunk, microbatch, usual) -> seconds, both (steps, dp); a transfer's stage is
    the sender's. noops: note receives that never were. overlap: reduce a chunk's gradients behind its last backward. post: what
    a worker does behind its last backward.
    """

    dp: int = 4
    pp: int = 4
    microbatches: int = 8
    steps: int = 4
    vpp: int = 1
    noise: float = 0.0
    seed: int = 0
    noops: bool = False
    overlap: bool = False
    post: tuple[str, ...] = ("grads-reduce-scatter", "optimizer")
    seconds: Callable[[Job, str, int, int, int, Seconds], Seconds] | None = None
    rows: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)
        self.counts: dict[tuple[str, int], int] = defaultdict(int)

    def takes(self, name: str, stage: int, chunk: int = -1, microbatch: int = -1) -> Seconds:
        usual = np.full((self.steps, self.dp), LENGTHS[name])
        if self.noise:
            usual = usual * self.random.normal(1, self.noise, usual.shape).clip(0.5, 2)
        return usual if self.seconds is None else self.seconds(self, name, stage, chunk, microbatch, usual)

    def note(
        self, name: str, stage: int, start: Seconds, end: Seconds, *, chunk: int = -1, microbatch: int = -1
    ) -> None:
        number = self.counts[name, stage]
        self.counts[name, stage] += 1
        gmc = chunk * self.pp + stage if name.endswith("-compute") else -1
        facts = {
            "stage": stage,
            "optype": OPTYPES.index(name),
            "seq_id": number,
            "mc": chunk,
            "gmc": gmc,
            "mb_id": microbatch,
        }
        for key, value in facts.items():
            self.rows[key].append(value)
        self.rows["start_ts"].append(np.broadcast_to(start, (self.steps, self.dp)))
        self.rows["duration"].append(np.broadcast_to(end - start, (self.steps, self.dp)))

    def columns(self) -> dict[str, Any]:
        """The job, run: columns of a trace by name, optype as codes."""
        _run(self)
        operations, lanes = len(self.rows["stage"]), self.steps * self.dp
        made = {
            name: np.repeat(np.array(values), lanes)
            for name, values in self.rows.items()
            if name not in ("start_ts", "duration")
        }
        step, replica = (np.tile(some.reshape(-1), operations) for some in np.mgrid[0 : self.steps, 0 : self.dp])
        made |= {name: np.stack(self.rows[name]).reshape(-1) for name in ("start_ts", "duration")}
        made["start_ts"] = made["start_ts"] + 1000.0 * step
        return made | {"step": step + 7, "dp_rank": replica, "rank": made["stage"] * self.dp + replica}

    def trace(self) -> Trace:
        return Trace.of(self.columns())


def turns(job: Job, stage: int) -> list[Turn]:
    """The order in which a stage computes: 1F1B, interleaved where vpp > 1."""
    pp, vpp, count = job.pp, job.vpp, job.microbatches
    order = (
        [((k // pp) % vpp, (k // (pp * vpp)) * pp + k % pp) for k in range(count * vpp)]
        if vpp > 1
        else [(0, k) for k in range(count)]
    )
    forwards = [("forward", chunk, microbatch) for chunk, microbatch in order]
    backwards = [("backward", vpp - 1 - chunk, microbatch) for chunk, microbatch in order]
    early = min((pp - stage - 1) * (2 if vpp > 1 else 1) + (vpp - 1) * pp, len(forwards))
    made: list[Turn] = forwards[:early]
    for place, forward in enumerate(forwards[early:]):
        made += [forward, backwards[place]]
    return made + backwards[len(forwards) - early :]


def _run(job: Job) -> None:
    """Each stage in its order, a turn as soon as what it receives was computed."""
    done: dict[tuple[str, int, int], Seconds] = {}
    zero = np.zeros((job.steps, job.dp))
    clock = [zero] * job.pp
    stream: dict[tuple[str, int], Seconds] = defaultdict(lambda: zero)
    posted: dict[tuple[str, int], Seconds] = defaultdict(lambda: zero)
    left = [turns(job, stage) for stage in range(job.pp)]
    gathered = {}
    for stage in range(job.pp):
        for chunk in range(job.vpp):
            start = stream["dp", stage]
            end = start.max(axis=1, keepdims=True) + job.takes("params-all-gather", stage, chunk)
            job.note("params-all-gather", stage, start, end, chunk=chunk)
            stream["dp", stage] = gathered[stage, chunk] = end
    while any(left):
        moved = False
        for stage in range(job.pp):
            while left[stage] and _turn(job, stage, left[stage][0], done, clock, stream, posted, gathered):
                left[stage].pop(0)
                moved = True
        assert moved, "the schedule waits for itself"
    _close(job, clock, stream)


def _turn(
    job: Job, stage: int, turn: Turn, done: dict[Any, Seconds], clock: list[Seconds], stream: Any, posted: Any, gathered: Any
) -> bool:  # fmt: skip
    direction, chunk, microbatch = turn
    gmc, step = chunk * job.pp + stage, 1 if direction == "forward" else -1
    source = gmc - step
    ready = clock[stage]
    if 0 <= source < job.pp * job.vpp:
        if (direction, source, microbatch) not in done:
            return False
        sender = source % job.pp
        sent = np.maximum(done[direction, source, microbatch], stream[f"{direction}-send", sender])
        waits = np.maximum(posted[direction, stage], stream[f"{direction}-recv", stage])
        end = np.maximum(sent, waits) + job.takes(direction, sender, chunk, microbatch)
        job.note(f"{direction}-send", sender, sent, end)
        job.note(f"{direction}-recv", stage, waits, end)
        stream[f"{direction}-send", sender] = stream[f"{direction}-recv", stage] = end
        ready = np.maximum(ready, end)
    elif job.noops and job.vpp > 1:
        waits = np.maximum(posted[direction, stage], stream[f"{direction}-recv", stage])
        job.note(f"{direction}-recv", stage, waits, waits)
        stream[f"{direction}-recv", stage] = waits
    if direction == "forward" and microbatch == 0:
        ready = np.maximum(ready, gathered[stage, chunk])
    end = ready + job.takes(f"{direction}-compute", stage, chunk, microbatch)
    job.note(f"{direction}-compute", stage, ready, end, chunk=chunk, microbatch=microbatch)
    done[direction, gmc, microbatch] = clock[stage] = posted[direction, stage] = end
    if job.overlap and direction == "backward" and microbatch == job.microbatches - 1:
        start = np.maximum(end, stream["dp", stage])
        stream["dp", stage] = start.max(axis=1, keepdims=True) + job.takes("grads-reduce-scatter", stage, chunk)
        job.note("grads-reduce-scatter", stage, start, stream["dp", stage], chunk=chunk)
    return True


def _close(job: Job, clock: list[Seconds], stream: Any) -> None:
    for place, name in enumerate(job.post):
        joined = {"embedding-grads-all-reduce": [0, job.pp - 1], "optimizer-clip-main-grad": list(range(job.pp))}
        behind = name == "grads-reduce-scatter" or (job.overlap and not place)
        starts = {
            stage: np.maximum(clock[stage], stream["dp", stage]) if behind else clock[stage] for stage in range(job.pp)
        }
        for stage in range(job.pp):
            members = joined.get(name, [stage])
            if name in joined and stage not in members:
                continue
            arrived = np.maximum.reduce([starts[one] for one in members])
            if name in ("grads-reduce-scatter", "separate-grads-all-reduce", "optimizer-clip-main-grad"):
                arrived = arrived.max(axis=1, keepdims=True)
            end = arrived + job.takes(name, stage)
            job.note(name, stage, starts[stage], end)
            clock[stage] = end
