"""Decisions after a fault, as pure functions of what is known: whether to go on, where, and from what state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainrt.checkpoint.store.inventory import Holding
from trainrt.config import JobConfig, MeshSize
from trainrt.errors import PlanError, StoreError
from trainrt.launch.symptoms import Fault

TRIES_WITHOUT_PROGRESS = 6
ROLLBACKS = 2
"""How often a step is done again because its numbers, or its replicas, were not to be believed."""
FIRST_DELAY_SECONDS = 0.5
LONGEST_DELAY_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an incarnation's state comes from: `memory` (a generation), `parity` (one that had to be decoded first),
    `disk` (a checkpoint) or `none`.
    """

    kind: str
    step: int
    path: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """The `restore` of a worker's spec."""
        if self.kind in ("memory", "parity"):
            return {"from": "memory", "step": self.step}
        if self.kind == "disk":
            return {"from": "disk", "path": str(self.path)}
        return {"from": "none"}


def choose_origin(
    holdings: Sequence[Holding], checkpoint: tuple[int, Path] | None, *, rebuild: Callable[[Holding], None]
) -> tuple[Origin, str]:
    """The newest state there is: in memory as it stands, in memory once `rebuild` has decoded what was lost, on disk.

    Memory comes before disk where both hold a step. `holdings` are the newest first. The text says what was in the way
    of each, which `rebuild` does by a StoreError.
    """
    missing = []
    for holding in holdings:
        if checkpoint is not None and holding.step < checkpoint[0]:
            break
        if not holding.lost:
            return Origin("memory", holding.step), ""
        if not holding.recoverable:
            missing.append(holding.missing())
            continue
        try:
            rebuild(holding)
            return Origin("parity", holding.step), ""
        except StoreError as error:
            missing.append(str(error))
    if checkpoint is not None:
        return Origin("disk", *checkpoint), ""
    return Origin("none", 0), "; ".join(missing) or "no store holds a generation"


def last_compared(config: JobConfig, *, completed: int) -> int:
    """The newest of the completed steps after which replicas were compared and found equal; 0: none."""
    every, checkpoints = config.diagnostics.corruption_check_every, config.checkpoint.every
    return max((completed // n * n for n in (every, checkpoints) if n), default=0)


class Patience:
    """How often a job may fail without getting further, and whether an error repeats itself."""

    def __init__(self) -> None:
        self._furthest = -1
        self._failures = 0
        self._last: tuple[str, int] | None = None
        self._rollbacks: tuple[int, int] = (-1, 0)

    def fault(self, fault: Fault, *, completed: int) -> str | None:
        """Count a fault after `completed` steps. Returns why the job must stop, or None to try again."""
        signature = None if fault.signature is None else (fault.signature, completed)
        repeated = signature is not None and signature == self._last
        self._last = signature
        if not fault.survivable:
            return fault.message
        if fault.action == "rollback":
            return self._rollback(fault, repeated=repeated, completed=completed)
        if repeated:
            return f"{fault.message} (twice at the same step, from the same state)"
        if completed > self._furthest:
            self._furthest, self._failures = completed, 0
        self._failures += 1
        if self._failures >= TRIES_WITHOUT_PROGRESS:
            return f"{fault.message} ({self._failures} faults in a row without a step between them)"
        return None

    def _rollback(self, fault: Fault, *, repeated: bool, completed: int) -> str | None:
        """Bounded: what comes again bit for bit, or a third time at the same step, is no accident."""
        at, count = self._rollbacks
        count = count + 1 if at == completed else 1
        self._rollbacks = (completed, count)
        if repeated:
            return f"{fault.message} (the same again, bit for bit, from the same state: it is deterministic)"
        if count > ROLLBACKS:
            return f"{fault.message} (again after {ROLLBACKS} rollbacks)"
        return None

    @property
    def delay_seconds(self) -> float:
        """How long to wait before the next try: not at all at first, then doubling."""
        if self._failures <= 1:
            return 0.0
        return min(FIRST_DELAY_SECONDS * 2 ** (self._failures - 2), LONGEST_DELAY_SECONDS)


def largest_world(config: JobConfig, *, available: int) -> MeshSize | int:
    """What fits on `available` ranks: the explicit mesh with fsdp, then dp, made smaller; or, in mode auto,
    the number of ranks, for the planner to find a mesh. Raises PlanError where nothing fits.
    """
    mesh = config.mesh()
    if mesh is None:
        if available < 1:
            raise PlanError("no node is left")
        return available
    fixed = mesh.pp * mesh.cp * mesh.tp
    for dp in range(mesh.dp, 0, -1):
        for fsdp in range(mesh.fsdp, 0, -1):
            data = dp * fsdp
            if data * fixed <= available and (data * mesh.cp * mesh.tp) % mesh.ep == 0:
                return MeshSize(pp=mesh.pp, dp=dp, fsdp=fsdp, cp=mesh.cp, tp=mesh.tp, ep=mesh.ep)
    raise PlanError(
        f"{available} ranks are left; the mesh needs a multiple of pp*cp*tp = {fixed}"
        + (f" that ep = {mesh.ep} divides" if mesh.ep > 1 else "")
    )


def seat_ranks(world_size: int, nodes: Sequence[str], *, workers_per_node: int) -> dict[int, str]:
    """Which node each rank runs on: nodes are filled in order."""
    return {rank: nodes[rank // workers_per_node] for rank in range(world_size)}


class Progress:
    """Steps completed by all ranks of an incarnation."""

    def __init__(self, world_size: int, *, done: int) -> None:
        self._last = dict.fromkeys(range(world_size), done)
        self.completed = done

    def step(self, rank: int, step: int) -> bool:
        """A rank completed a step. Returns whether all ranks have now completed one more."""
        self._last[rank] = step
        completed = min(self._last.values())
        grown = completed > self.completed
        self.completed = max(self.completed, completed)
        return grown
