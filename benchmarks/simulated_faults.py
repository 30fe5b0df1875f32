"""What goes wrong in simulated jobs, and the truth about it: the cause, whom it names, and which answers are acceptable.

A fault begins after HISTORY steps in which nothing is wrong, or with the job: then there is no before to compare with.
Severity is the factor less one by which the culprit's own compute is slower, where that is the fault.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.simulated_jobs import Conditions, Job, Noise, host_pairs
from trainrt.parallel.mesh import MeshSize

Array = NDArray[Any]

HISTORY = 20
WINDOWS = (3, 5, 10, 20, 40)
NETWORK = ("dp", "fsdp")


@dataclass(frozen=True, slots=True)
class Truth:
    """One thing that is wrong. causes, actions: acceptable ones, the best first.

    Whom it names: ranks (any of them), hosts (all of them, of a link both), or a stage; nothing where all are concerned.
    """

    causes: tuple[str, ...]
    actions: tuple[str, ...]
    ranks: frozenset[int] = frozenset()
    hosts: frozenset[int] = frozenset()
    stage: int | None = None
    severity: float | None = None

    @property
    def placed(self) -> bool:
        return bool(self.ranks or self.hosts or self.stage is not None)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a fault is put: a job, its steps, the first step of the fault, and the draws."""

    job: Job
    steps: int
    since: int
    random: np.random.Generator

    def on(self, ranks: Any, value: Any, rest: float = 0.0) -> Array:
        """`value` (or one a step) from the fault's first step on at these ranks, `rest` elsewhere, (S, R)."""
        table = np.full((self.steps, self.job.ranks), rest)
        column = np.broadcast_to(np.asarray(value, dtype=np.float64), (self.steps,))
        table[self.since :, ranks] = column[self.since :].reshape(-1, *([1] * np.ndim(ranks)))
        return table

    def then(self, value: Any, rest: float = 1.0) -> Array:
        """By step: `rest`, then `value`, (S,)."""
        return np.where(np.arange(self.steps) < self.since, rest, value)

    def rank(self) -> int:
        return int(self.random.integers(self.job.ranks))

    def host(self) -> tuple[int, Array]:
        """One of the hosts, and its ranks."""
        host = int(self.random.integers(self.job.hosts))
        return host, np.arange(host * self.job.ranks_per_host, (host + 1) * self.job.ranks_per_host)

    def pair(self) -> tuple[int, int]:
        """Two hosts between which the gradients' ring goes."""
        pairs = host_pairs(self.job, NETWORK)
        a, b = pairs[self.random.integers(len(pairs))]
        return int(a), int(b)


Fault = tuple[Conditions, list[Truth]]


def _truth(causes: str, actions: str, **named: Any) -> Truth:
    return Truth(tuple(causes.split()), tuple(actions.split()), **named)


def _remedy(severity: float) -> str:
    """What to do about a slow machine: below 10 %, to go on is acceptable too."""
    return "evict repartition rebalance" + (" wait none" if severity < 0.1 else "")


def clean(place: Place) -> Fault:
    return Conditions(), []


def slow_rank(place: Place, severity: float) -> Fault:
    rank = place.rank()
    told = _truth("slow_worker", _remedy(severity), ranks=frozenset({rank}), severity=severity)
    return Conditions(compute=place.on(rank, 1 + severity, 1.0)), [told]


def pulses(place: Place) -> Fault:
    """As under a quota of the CPU: about every other step is slower, by 10 to 50 %."""
    rank = place.rank()
    throttled = place.random.random(place.steps) < 0.5
    slow = np.where(throttled, 1 + place.random.uniform(0.1, 0.5, place.steps), 1.0)
    told = _truth("slow_worker", _remedy(0.15), ranks=frozenset({rank}), severity=0.15)
    return Conditions(compute=place.on(rank, slow, 1.0)), [told]


def slow_host(place: Place, severity: float) -> Fault:
    host, ranks = place.host()
    told = _truth("slow_host", _remedy(severity), hosts=frozenset({host}), severity=severity)
    return Conditions(compute=place.on(ranks, 1 + severity, 1.0)), [told]


def slow_link(place: Place) -> Fault:
    pair = place.pair()
    told = _truth("slow_link", "check_network", hosts=frozenset(pair))
    return Conditions(links={pair: place.then(4.0)}), [told]


def flapping_link(place: Place) -> Fault:
    """Eight times slower in three of ten steps."""
    pair = place.pair()
    down = np.where(place.random.random(place.steps) < 0.3, 8.0, 1.0)
    told = _truth("slow_link", "check_network wait", hosts=frozenset(pair))
    return Conditions(links={pair: place.then(down)}), [told]


def slow_nic(place: Place) -> Fault:
    host, _ = place.host()
    told = _truth("slow_nic", "check_network evict", hosts=frozenset({host}))
    return Conditions(nics={host: place.then(3.0)}), [told]


def congestion(place: Place) -> Fault:
    return Conditions(network=place.then(2.5)), [_truth("congestion", "check_network wait")]


def slow_loader(place: Place) -> Fault:
    rank = place.rank()
    late = place.random.gamma(2.0, 0.1, place.steps)
    told = _truth("slow_data", "check_storage evict", ranks=frozenset({rank}))
    return Conditions(data=place.on(rank, late)), [told]


def slow_loaders(place: Place) -> Fault:
    late = place.random.gamma(4.0, 0.075, (place.steps, place.job.ranks))
    late[: place.since] = 0
    return Conditions(data=late), [_truth("slow_data", "check_storage")]


def collections(place: Place) -> Fault:
    """Each rank collects garbage when it happens to: about every twelfth step, 0.1 to 0.3 s."""
    count = (place.steps, place.job.ranks)
    stopped = place.random.uniform(0.1, 0.3, count) * (place.random.random(count) < 0.08)
    stopped[: place.since] = 0
    return Conditions(collections=stopped), [_truth("garbage_collection", "plan_gc")]


def slow_storage(place: Place, everywhere: bool) -> Fault:
    """Snapshots (every 5 steps) and checkpoints (every 20) stall for longer than they do."""
    host, ranks = place.host()
    at = np.arange(place.steps) + 1
    where = np.arange(place.job.ranks) if everywhere else ranks
    snapshot, checkpoint = (place.on(where, np.where(at % n == 0, s, 0.0)) for n, s in ((5, 0.4), (20, 2.0)))
    hosts = frozenset() if everywhere else frozenset({host})
    told = _truth("slow_storage", "check_storage" + ("" if everywhere else " evict"), hosts=hosts)
    return Conditions(snapshot=snapshot, checkpoint=checkpoint), [told]


def long_sequences(place: Place) -> Fault:
    """One data rank (on all stages and tp and cp ranks) always gets one long document for many short ones."""
    size = place.job.mesh
    number = int(place.random.integers(size.data_ranks))
    inside = size.cp * size.tp
    ranks = np.flatnonzero(np.arange(place.job.ranks) // inside % size.data_ranks == number)
    told = _truth("sequence_imbalance", "rebalance repartition", ranks=frozenset(map(int, ranks)))
    return Conditions(squares=place.on(ranks, place.job.pieces, 1.0)), [told]


def sequence_imbalance(place: Place) -> Fault:
    """The job's documents are packed."""
    return Conditions(), [_truth("sequence_imbalance", "rebalance repartition")]


def last_stage(place: Place) -> Fault:
    stages = np.ones(place.job.mesh.pp)
    stages[-1] = 1.3
    told = _truth("stage_imbalance", "repartition rebalance", stage=place.job.mesh.pp - 1)
    return Conditions(stage=stages), [told]


def expert_skew(place: Place) -> Fault:
    """Experts of one place in every group get 80 % more rows."""
    hot = int(place.random.integers(place.job.mesh.ep))
    ranks = np.flatnonzero(np.arange(place.job.ranks) % place.job.mesh.ep == hot)
    told = _truth("expert_imbalance", "rebalance repartition", ranks=frozenset(map(int, ranks)))
    return Conditions(rows=place.on(ranks, 1.8, 1.0)), [told]


def one_stall(place: Place) -> Fault:
    """Half a second, once, on one rank: nothing to act upon."""
    stall = np.zeros((place.steps, place.job.ranks))
    stall[place.since + 1, place.rank()] = 0.5
    return Conditions(stall=stall), []


def drift(place: Place) -> Fault:
    rank = place.rank()
    slower = 1 + 0.001 * np.maximum(0, np.arange(place.steps) - place.since)
    told = _truth("drift slow_worker", _remedy(0.05), ranks=frozenset({rank}))
    return Conditions(compute=place.on(rank, slower, 1.0)), [told]


def regression(place: Place) -> Fault:
    return Conditions(compute=place.then(1.10)[:, None]), [_truth("regression", "none wait")]


def clock_skew(place: Place) -> Fault:
    _, ranks = place.host()
    ahead = np.zeros(place.job.ranks)
    ahead[ranks] = place.random.uniform(1, 5)
    return Conditions(clock=ahead), []


def missing(place: Place, severity: float) -> Fault:
    """1 % of the ranks are never heard, and 5 % of the others' summaries are lost; one that is heard is slow, or none."""
    conditions, told = slow_rank(place, severity) if severity else clean(place)
    lost = place.random.random((place.steps, place.job.ranks)) < 0.05
    silent = place.random.choice(place.job.ranks, max(1, place.job.ranks // 100), replace=False)
    lost[:, [rank for rank in silent if not any(rank in truth.ranks for truth in told)]] = True
    return replace(conditions, missing=lost), told


def launch_skew(place: Place) -> Fault:
    """Ranks begin a step late, others every time: 40 ms on average, exponentially."""
    late = place.random.exponential(0.04, (place.steps, place.job.ranks))
    late[: place.since] = 0
    return Conditions(other=late), [_truth("launch_skew", "wait none")]


def straggler_and_imbalance(place: Place) -> Fault:
    """The job's documents are packed, and a rank is slow."""
    conditions, told = slow_rank(place, 0.3)
    return conditions, told + sequence_imbalance(place)[1]


def two_stragglers(place: Place) -> Fault:
    """A rank that computes slowly and another that waits for its data."""
    slow, one = slow_rank(place, 0.2)
    late, other = slow_loader(place)
    return replace(slow, data=late.data), one + other


@dataclass(frozen=True, slots=True)
class Scenario:
    """A fault and the job it needs. mesh: of `meshes`, None for any. twin: how the job differs to which its cost is compared."""

    fault: Callable[[Place], Fault]
    mesh: str | None = None
    job: Mapping[str, Any] = field(default_factory=dict)
    twin: Mapping[str, Any] = field(default_factory=dict)
    windows: Sequence[int] = WINDOWS
    history: bool | None = None


LONG: dict[str, Any] = {"tokens": 32768, "documents": "packed", "attention": 1.5}
SHORT: dict[str, Any] = {"pieces": 8, "attention": 0.5}

SCENARIOS: dict[str, Scenario] = {
    "clean": Scenario(clean),
    **{f"slow rank {share:.0%}": Scenario(partial(slow_rank, severity=share)) for share in (0.02, 0.05, 0.1, 0.2, 0.5)},
    "slow rank in pulses": Scenario(pulses),
    **{f"slow host {share:.0%}": Scenario(partial(slow_host, severity=share)) for share in (0.05, 0.1, 0.2)},
    "slow link": Scenario(slow_link),
    "flapping link": Scenario(flapping_link),
    "slow NIC": Scenario(slow_nic),
    "congestion": Scenario(congestion, history=True),
    "slow loader": Scenario(slow_loader),
    "slow loaders, all": Scenario(slow_loaders),
    "collections unplanned": Scenario(collections),
    "slow storage, a host": Scenario(partial(slow_storage, everywhere=False)),
    "slow storage, all": Scenario(partial(slow_storage, everywhere=True)),
    "long sequences, a rank": Scenario(long_sequences, job=SHORT),
    "sequence imbalance": Scenario(sequence_imbalance, job=LONG, twin={"documents": "level"}, history=False),
    "last stage": Scenario(last_stage, mesh="stages", history=False),
    "expert skew": Scenario(expert_skew, mesh="experts"),
    "one stall": Scenario(one_stall),
    "drift of a rank": Scenario(drift, windows=(10, 20, 40, 100), history=True),
    "regression": Scenario(regression, history=True),
    "clock skew": Scenario(clock_skew),
    "missing telemetry": Scenario(partial(missing, severity=0.0)),
    "missing, slow rank 10%": Scenario(partial(missing, severity=0.1)),
    "launch skew": Scenario(launch_skew),
    "straggler and imbalance": Scenario(straggler_and_imbalance, job=LONG, twin={"documents": "level"}),
    "two stragglers": Scenario(two_stragglers),
}


def meshes(ranks: int) -> dict[str, Job]:
    """Jobs of so many ranks (a power of two from 64 on): data parallel, stages with tensor parallel, experts, long context."""
    return {
        "data": Job(MeshSize(dp=max(1, ranks // 256), fsdp=min(ranks, 256))),
        "stages": Job(MeshSize(pp=4, fsdp=ranks // 32, tp=8), microbatches=16),
        "experts": Job(MeshSize(fsdp=ranks, ep=16), microbatches=4),
        "context": Job(MeshSize(dp=2, fsdp=ranks // 16, cp=2, tp=4)),
    }


@dataclass(frozen=True, slots=True)
class Instance:
    """A scenario in a mesh at a seed. since: the fault's first step."""

    name: str
    mesh: str
    seed: int
    job: Job
    twin: Job
    steps: int
    since: int
    conditions: Conditions
    truths: list[Truth]
    windows: Sequence[int]


def instance(name: str, ranks: int, seed: int, *, mesh: str | None = None, noise: Noise | None = None) -> Instance:
    """Seeds take turns over the meshes, and over faults that begin later and those that begin with the job."""
    scenario = SCENARIOS[name]
    jobs = meshes(ranks)
    mesh = mesh or scenario.mesh or list(jobs)[seed % len(jobs)]
    job = replace(jobs[mesh], noise=noise or Noise(), **scenario.job)
    later = scenario.history if scenario.history is not None else seed // len(jobs) % 2 == 0
    since = HISTORY if later else 0
    steps = since + max(scenario.windows)
    conditions, truths = scenario.fault(Place(job, steps, since, np.random.default_rng([seed, 99])))
    return Instance(
        name, mesh, seed, job, replace(job, **scenario.twin), steps, since, conditions, truths, scenario.windows
    )
