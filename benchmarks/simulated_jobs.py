"""Simulated jobs: what a mesh of 8 to 16,384 ranks reports of its steps, from the physics of who computes and who waits for whom.

A rank computes by its work. Members of tp, cp and ep meet in every microbatch, stages of a pipeline by 1F1B, members of fsdp in
every microbatch (one stage) or at both ends of a step (more stages), dp and the world at its end. Who arrives early waits: a slow
rank is seen in its own parts and in the communication of others.

A step of a rank lasts from its previous step's end to its own end. Times of a step are counted from the moment at which the world
has met in the step before.

Legend: S steps, R ranks, M microbatches; P stages, D data ranks (dp by fsdp), C cp, T tp, so that R = P D C T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.simulated_noise import one_off, packed_squares, residuals
from benchmarks.simulated_pipeline import pipeline
from trainrt.diagnostics.table import PARTS, WORK, Links, Roles, StepTable
from trainrt.parallel.mesh import MeshSize, coordinates

Array = NDArray[Any]

FORWARD_SECONDS, BACKWARD = 0.05, 2.0
"""Of a microbatch on a rank without tp and cp's help in it, tokens alone; and backward over forward."""
TRANSFERS = {"tp": 0.08, "cp": 0.06, "ep": 0.10, "fsdp": 0.04, "pp": 0.02}
"""Transfer seconds that nothing hides, of a microbatch's forward, over its compute."""
ENDS = {"fsdp": 0.040, "dp": 0.060, "world": 0.0005}
"""Transfer seconds at the end of a step: gradients, and the norm."""
OWN = {"data": 0.004, "other": 0.006, "optimizer": 0.030}
"""Seconds of a step, every step. Collections are planned: all ranks at once, every COLLECT steps."""
SNAPSHOT, SNAPSHOT_SECONDS, COLLECT, COLLECT_SECONDS, CHECKPOINT, CHECKPOINT_SECONDS = 5, 0.020, 10, 0.030, 20, 0.150
LINK_BYTES, LINK_BYTES_PER_SECOND = 64e6, 12e9
EPOCH = 1.8e9


@dataclass(frozen=True, slots=True)
class Noise:
    """scale: of the residuals. chips, hosts: standard deviation of what a rank and a host always are. transfers, own: of the
    log-seconds of transfers and of parts that are no compute.

    jitter: one-off stalls a rank and step (0.01 to 1 s, in forward); drift: amplitude of the slow common wave of compute.
    """

    scale: float = 1.0
    chips: float = 0.005
    hosts: float = 0.002
    transfers: float = 0.03
    own: float = 0.05
    jitter: float = 1e-5
    drift: float = 0.01
    drift_steps: int = 2000
    file: Path | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """tokens: of a microbatch. documents: "fixed" (`pieces` of equal length), "packed" (heavy-tailed lengths that fill it) or
    "level" (as packed, each microbatch with the mean of the squares).

    attention: seconds of one document of `tokens` over those of its tokens. experts: seconds of balanced experts over the same.
    """

    mesh: MeshSize
    microbatches: int = 8
    tokens: int = 8192
    documents: str = "fixed"
    pieces: int = 1
    attention: float = 0.25
    experts: float = 0.5
    ranks_per_host: int = 8
    noise: Noise = field(default_factory=Noise)

    @property
    def ranks(self) -> int:
        return self.mesh.world_size

    @property
    def hosts(self) -> int:
        return -(-self.ranks // self.ranks_per_host)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.mesh.pp, self.mesh.data_ranks, self.mesh.cp, self.mesh.tp

    def roles(self) -> Roles:
        size = self.mesh
        mesh = {axis: getattr(size, axis) for axis in ("pp", "dp", "fsdp", "cp", "tp", "ep")}
        places = [coordinates(size, rank) for rank in range(self.ranks)]
        seats = {axis: np.array([place[axis] for place in places]) for axis, length in mesh.items() if length > 1}
        hosts = tuple(f"host{number:04d}" for number in range(self.hosts))
        return Roles(mesh, hosts, np.arange(self.ranks) // self.ranks_per_host, seats)

    def members(self, axis: str) -> Array:
        """Ranks by group along an axis, (groups, members)."""
        size, ranks = self.mesh, np.arange(self.ranks)
        if axis in ("ep", "world"):
            return ranks.reshape(-1, size.ep if axis == "ep" else self.ranks)
        names = ("pp", "dp", "fsdp", "cp", "tp")
        grid = ranks.reshape([getattr(size, name) for name in names])
        return np.moveaxis(grid, names.index(axis), -1).reshape(-1, getattr(size, axis))


@dataclass(frozen=True, slots=True)
class Conditions:
    """What is not as it should be. Arrays broadcast to (S, R) unless said; seconds add to a step, factors multiply.

    compute: factor of own compute. stage: the same by stage, (P,). squares: factor of the sum of squared lengths. rows: factor of
    the rows of experts. stall: seconds inside forward, in one microbatch. collections: the same, told as garbage_collection.
    data, other, snapshot, checkpoint: seconds. links: factor of transfer seconds by pair of hosts, (S,) or a number. nics: the
    same by host. network: the same of all transfers between hosts. clock: seconds that a rank's clock is ahead, (R,). missing:
    not heard, (S, R).
    """

    compute: Any = 1.0
    stage: Any = None
    squares: Any = 1.0
    rows: Any = 1.0
    stall: Any = 0.0
    collections: Any = 0.0
    data: Any = 0.0
    other: Any = 0.0
    snapshot: Any = 0.0
    checkpoint: Any = 0.0
    links: dict[tuple[int, int], Any] = field(default_factory=dict)
    nics: dict[int, Any] = field(default_factory=dict)
    network: Any = 1.0
    clock: Any = 0.0
    missing: Any = None


def simulate(job: Job, steps: int, conditions: Conditions | None = None, *, seed: int, first: int = 0) -> StepTable:
    """`steps` steps from step `first` on. The same seed gives the same job with and without conditions; windows that follow each
    other (`first`) are the same chips."""
    return _Run(job, steps, conditions or Conditions(), seed, first).table()


class _Run:
    """One window of steps: draws, then the steps from data to optimizer, adding up what each rank did and waited for."""

    def __init__(self, job: Job, steps: int, conditions: Conditions, seed: int, first: int) -> None:
        self.job, self.S, self.conditions, self.first = job, steps, conditions, first
        self.steps = np.arange(first, first + steps)
        self.seed = seed
        self.pool = residuals(job.noise.file) * np.float32(job.noise.scale)
        always = self._of("chips", of_window=False)
        hosts = always.normal(0, job.noise.hosts, job.hosts)[np.arange(job.ranks) // job.ranks_per_host]
        self.chips = np.exp(always.normal(0, job.noise.chips, job.ranks) + hosts)
        self.parts = {name: np.zeros((steps, job.ranks)) for name in PARTS}
        self.waits: dict[str, Array] = {}
        self.work = dict(zip(WORK, self._work(), strict=True))

    def _of(self, name: str, *, of_window: bool = True) -> np.random.Generator:
        """A stream of its own for every kind of draw, so that a fault moves no other draw."""
        key = [self.seed, sum(ord(letter) * 31**place for place, letter in enumerate(name))]
        return np.random.default_rng([*key, self.first] if of_window else key)

    def _grid(self, by_rank: Array) -> Array:
        return by_rank.reshape(*by_rank.shape[:-1], *self.job.shape)

    def _flat(self, by_place: Array) -> Array:
        return by_place.reshape(*by_place.shape[:-4], self.job.ranks)

    def _spread(self, value: Any) -> Array:
        return np.broadcast_to(np.asarray(value, dtype=np.float64), (self.S, self.job.ranks))

    # Work: what is to be computed.

    def _work(self) -> tuple[Array, Array, Array]:
        """Tokens, squares and rows of each step and rank, (S, R). `self.dense`: by microbatch, over those of balanced tokens."""
        job, size = self.job, self.job.mesh
        count = (self.S, job.microbatches, size.data_ranks)
        whole = float(job.tokens) ** 2
        squares = np.full(count, whole / job.pieces)
        if job.documents != "fixed":
            packs = packed_squares(job.tokens, np.random.default_rng(7))
            drawn = packs[self._of("documents").integers(len(packs), size=count)]
            squares = drawn if job.documents == "packed" else np.full(count, packs.mean())
        places = np.broadcast_to(squares[:, :, None, :, None, None], (*count[:2], *job.shape))
        factor = self._grid(self._spread(self.conditions.squares))[:, None]
        squares = self._flat(places * factor)
        self.dense = (1 + job.attention * squares / whole).astype(np.float32)
        tokens = np.full((self.S, job.ranks), job.microbatches * job.tokens / size.cp)
        rows = tokens * self._spread(self.conditions.rows) if size.ep > 1 else np.zeros_like(tokens)
        if size.ep > 1:
            rows = rows * np.exp(self._of("routes").normal(0, 0.01, rows.shape))
            groups = rows.reshape(self.S, -1, size.ep)
            rows = (groups / groups.mean(2, keepdims=True)).reshape(rows.shape) * tokens
        return tokens, squares.sum(1) / size.cp, rows

    # Durations: what that takes.

    def _compute(self, name: str, scale: float) -> tuple[Array, Array]:
        """Seconds of each microbatch before experts, (S, M, R) float32, and in them: zeros, (S, 1, R), where there are none."""
        job, conditions = self.job, self.conditions
        slow = self._spread(conditions.compute) * self.chips * self._drift()[:, None]
        if conditions.stage is not None:
            slow = slow * np.repeat(conditions.stage, job.ranks // job.mesh.pp)
        unit = (slow * FORWARD_SECONDS * scale).astype(np.float32)[:, None]
        noise = np.exp(self.pool)
        dense = self.dense * unit * self._drawn(noise, name)
        if job.mesh.ep == 1:
            return dense, np.zeros((self.S, 1, job.ranks), dtype=np.float32)
        share = (self.work["rows"] / self.work["tokens"]).astype(np.float32)[:, None] * np.float32(job.experts)
        return dense, share * unit * self._drawn(noise, name + " experts")

    def _drawn(self, pool: Array, name: str) -> Array:
        count = (self.S, self.job.microbatches, self.job.ranks)
        return pool[self._of(name).integers(len(pool), size=count, dtype=np.uint16)]

    def _drift(self) -> Array:
        noise = self.job.noise
        return 1 + noise.drift * np.sin(2 * np.pi * self.steps / noise.drift_steps)

    def _own(self, name: str, more: Any, base: Any) -> Array:
        """Seconds of a part that is no compute, by step and rank."""
        drawn = np.exp(self._of(name).normal(0, self.job.noise.own, (self.S, self.job.ranks)))
        self.parts[name] += np.asarray(base) * drawn + self._spread(more)
        return self.parts[name]

    def _every(self, number: int, seconds: float) -> Array:
        return np.where((self.steps + 1) % number == 0, seconds, 0.0)[:, None]

    def _stalls(self) -> tuple[Array, Array]:
        """Seconds that a rank stands still inside forward, and the microbatch in which it does, (S, R) each."""
        job, conditions = self.job, self.conditions
        stall = np.array(self._spread(conditions.stall))
        if job.noise.jitter:
            stall += one_off(self._of("jitter"), stall.shape, job.noise.jitter)
        collections = self._spread(conditions.collections)
        self.parts["garbage_collection"] += collections
        where = self._of("where").integers(job.microbatches, size=stall.shape)
        self.parts["forward"] += stall
        return stall + collections, where

    # Transfers: how long what the groups send is under way.

    def _transfer(self, axis: str, seconds: Any, name: str) -> Array:
        """Seconds of a group's transfer by step and rank: a ring is as slow as its slowest pair of hosts."""
        members = self.job.members(axis)
        hosts = members // self.job.ranks_per_host
        drawn = np.exp(self._of(f"{axis} {name}").normal(0, self.job.noise.transfers, (self.S, len(members))))
        drawn *= self._ring(hosts)
        by_rank = np.empty((self.S, self.job.ranks))
        by_rank[:, members] = drawn[:, :, None]
        return by_rank * seconds

    def _ring(self, hosts: Array) -> Array:
        """Factor of the seconds of rings over hosts (groups, members), by step and group."""
        conditions = self.conditions
        factor = np.ones((self.S, len(hosts)))
        after = np.roll(hosts, -1, axis=1)
        factor[:, (hosts != after).any(1)] *= self._column(conditions.network)
        for (a, b), slow in conditions.links.items():
            through = (((hosts == a) & (after == b)) | ((hosts == b) & (after == a))).any(1)
            factor[:, through] = np.maximum(factor[:, through], self._column(slow))
        for host, slow in conditions.nics.items():
            through = ((hosts == host) & (after != host)).any(1)
            factor[:, through] = np.maximum(factor[:, through], self._column(slow))
        return factor

    def _column(self, factor: Any) -> Array:
        return np.broadcast_to(np.asarray(factor, dtype=np.float64), (self.S,))[:, None]

    # Meeting: who arrives early waits.

    def _meet(self, axis: str, arrival: Array, transfer: Array | float = 0.0) -> Array:
        """When all members of each group may go on, from when each arrives, (..., R); the waits are added up by step and rank."""
        job = self.job
        if axis == "world":
            last = arrival.max(-1, keepdims=True)
        elif axis == "ep":
            groups = arrival.reshape(*arrival.shape[:-1], -1, job.mesh.ep)
            last = np.broadcast_to(groups.max(-1, keepdims=True), groups.shape).reshape(arrival.shape)
        else:
            names = ("pp", "dp", "fsdp", "cp", "tp")
            places = arrival.reshape(*arrival.shape[:-1], *[getattr(job.mesh, name) for name in names])
            latest = places.max(names.index(axis) - len(names), keepdims=True)
            last = np.broadcast_to(latest, places.shape).reshape(arrival.shape)
        after = last + transfer
        waited = after - arrival
        self._wait(axis, waited.sum(1, dtype=np.float64) if waited.ndim == 3 else waited)
        return after

    def _wait(self, axis: str, seconds: Array) -> None:
        self.waits[axis] = self.waits.get(axis, 0.0) + seconds

    def _inner(self) -> list[str]:
        """Axes whose members meet in every microbatch."""
        size = self.job.mesh
        gathers = ["fsdp"] if size.fsdp > 1 and size.pp == 1 else []
        return [axis for axis in ("tp", "cp", "ep") if getattr(size, axis) > 1] + gathers

    def _microbatches(self, name: str, scale: float, stalls: tuple[Array, Array] | None) -> Array:
        """Seconds of each microbatch on each stage once its members have met, (S, M, R)."""
        dense, experts = self._compute(name, scale)
        self.parts[name] += dense.sum(1, dtype=np.float64) + experts.sum(1, dtype=np.float64)
        if stalls is not None:
            seconds, where = stalls
            step, rank = np.nonzero(seconds)
            dense[step, where[step, rank], rank] += seconds[step, rank].astype(np.float32)
        after = dense
        for axis in self._inner():
            per = TRANSFERS[axis] * FORWARD_SECONDS * scale
            transfer = self._transfer(axis, per, name).astype(np.float32)[:, None]
            after = self._meet(axis, after, transfer)
            if axis == "ep":
                after = self._meet("ep", after + experts, transfer)
        return after

    def _steps(self) -> tuple[Array, Array]:
        """When each rank begins its step and when the world meets, (S, R) both, from its meeting in the step before."""
        size, conditions = self.job.mesh, self.conditions
        end = self._own("optimizer", 0.0, OWN["optimizer"] * self.chips)
        end = end + self._own("snapshot", conditions.snapshot, self._every(SNAPSHOT, SNAPSHOT_SECONDS))
        end = end + self._own("checkpoint", conditions.checkpoint, self._every(CHECKPOINT, CHECKPOINT_SECONDS))
        end = end + self._own("garbage_collection", 0.0, self._every(COLLECT, COLLECT_SECONDS))
        self.end = end
        begin = np.concatenate([np.broadcast_to(OWN["optimizer"] * self.chips, (1, self.job.ranks)), end[:-1]])
        ready = (
            begin + self._own("data", conditions.data, OWN["data"]) + self._own("other", conditions.other, OWN["other"])
        )
        for axis in ("tp", "cp", "ep", "fsdp"):
            if getattr(size, axis) > 1:
                ready = self._meet(axis, ready, self._transfer(axis, TRANSFERS[axis] * FORWARD_SECONDS, "start"))
        forward = self._microbatches("forward", 1.0, self._stalls())
        backward = self._microbatches("backward", BACKWARD, None)
        done = self._through_stages(ready, forward, backward)
        for axis in ("fsdp", "dp"):
            if getattr(size, axis) > 1:
                done = self._meet(axis, done, self._transfer(axis, ENDS[axis], "gradients"))
        return begin, self._meet("world", done, ENDS["world"])

    def _through_stages(self, ready: Array, forward: Array, backward: Array) -> Array:
        if self.job.mesh.pp == 1:
            return ready + forward.sum(1, dtype=np.float64) + backward.sum(1, dtype=np.float64)
        send = self._transfer("pp", TRANSFERS["pp"] * FORWARD_SECONDS, "stages")
        stages = [self._grid(table).max((-2, -1)) for table in (ready, forward, backward, send)]
        done = np.broadcast_to(pipeline(*stages)[..., None, None], (self.S, *self.job.shape))
        done = self._flat(done)
        busy = forward.sum(1, dtype=np.float64) + backward.sum(1, dtype=np.float64)
        self._wait("pp", done - ready - busy)
        return done

    # What is told of it.

    def table(self) -> StepTable:
        begin, met = self._steps()
        seconds = met - begin + self.end
        world = np.concatenate([[0.0], np.cumsum(met[:-1, 0])])
        start = EPOCH + world[:, None] + begin + self._spread(self.conditions.clock)
        missing = self.conditions.missing
        silent = np.zeros(seconds.shape, dtype=bool) if missing is None else np.broadcast_to(missing, seconds.shape)

        def told(kind: dict[str, Array]) -> dict[str, Array]:
            return {name: np.where(silent, np.nan, table) for name, table in kind.items()}

        whole = told({"start": start, "seconds": seconds})
        roles = self.job.roles()
        return StepTable(
            self.steps, roles, whole["start"], whole["seconds"], told(self.parts), told(self.waits), told(self.work),
            self._links(),
        )  # fmt: skip

    def _links(self) -> Links:
        """What transfers between the hosts took that the rings go through, every step."""
        pairs = host_pairs(self.job)
        count = (self.S, len(pairs))
        drawn = np.exp(self._of("links").normal(0, self.job.noise.transfers, count))
        drawn *= self._ring(pairs)
        amount = np.full(count, LINK_BYTES)
        step = np.broadcast_to(self.steps[:, None], count)
        source, target = (np.broadcast_to(pairs[:, side], count) for side in (0, 1))
        seconds = amount / LINK_BYTES_PER_SECOND * drawn
        return Links(step.reshape(-1), source.reshape(-1), target.reshape(-1), amount.reshape(-1), seconds.reshape(-1))


def host_pairs(job: Job, axes: Sequence[str] = ("pp", "dp", "fsdp", "cp", "tp", "ep")) -> Array:
    """Neighbours on the rings of axes, each pair of hosts once in the order of the ring, (pairs, 2)."""
    found = []
    for axis in axes:
        if getattr(job.mesh, axis) > 1:
            hosts = job.members(axis) // job.ranks_per_host
            found.append(np.stack([hosts, np.roll(hosts, -1, axis=1)], axis=-1).reshape(-1, 2))
    pairs = np.concatenate(found) if found else np.zeros((0, 2), dtype=np.int64)
    return np.unique(pairs[pairs[:, 0] != pairs[:, 1]], axis=0)
