"""The choice of a mesh: enumerate, refuse with a reason, rank by the cost model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from trainrt.config import MeshSize
from trainrt.errors import PlanError
from trainrt.parallel.cost import Device, Work, estimate
from trainrt.parallel.plan import Plan, mesh_json

ActivationBytes = Callable[[Plan], float | None]
"""Of one sample on a rank of the plan's mesh; None where they cannot be counted."""


def meshes(world_size: int) -> Iterator[MeshSize]:
    """Every mesh of the forms that are built: dp x fsdp x tp, with experts over ep of all of them."""
    for tp in _divisors(world_size):
        for dp in _divisors(world_size // tp):
            fsdp = world_size // tp // dp
            for ep in _divisors(world_size):
                yield MeshSize(pp=1, dp=dp, fsdp=fsdp, cp=1, tp=tp, ep=ep)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def choose(
    derive: Callable[[MeshSize], Plan], world_size: int, work: Work, device: Device, activations: ActivationBytes
) -> Plan:
    """The fastest mesh that is allowed and fits in memory, with the others as alternatives.

    `derive` gives the plan of a mesh or raises PlanError. Raises PlanError where none is left.
    """
    fitting: list[Plan] = []
    rejected: list[dict[str, Any]] = []
    for size in meshes(world_size):
        try:
            plan = assess(derive(size), work, device, activations)
        except PlanError as error:
            rejected.append(_alternative(size, 0, 0.0, str(error)))
            continue
        if plan.memory_bytes_per_rank > device.memory_bytes:
            reason = f"needs {plan.memory_bytes_per_rank} bytes a rank, {device.name} has {device.memory_bytes}"
            rejected.append(_alternative(size, plan.memory_bytes_per_rank, plan.predicted_step_seconds, reason))
            continue
        fitting.append(plan)
    if not fitting:
        raise PlanError(f"no mesh of {world_size} ranks fits: {rejected[0]['rejected']}")
    # Ties go to fewer replicas: the memory saved costs nothing.
    best, *rest = sorted(fitting, key=lambda plan: (plan.predicted_step_seconds, plan.mesh.dp))
    slower = [_alternative(p.mesh, p.memory_bytes_per_rank, p.predicted_step_seconds, None) for p in rest]
    return replace(best, alternatives=(*slower, *rejected))


def assess(plan: Plan, work: Work, device: Device, activations: ActivationBytes) -> Plan:
    """The plan with its estimate filled in."""
    parts = estimate(plan, work, device, activations(plan))
    return replace(
        plan,
        memory_bytes_per_rank=int(parts["memory_bytes"]),
        predicted_step_seconds=parts["step_seconds"],
        estimate=parts,
    )


def _alternative(size: MeshSize, memory: int, seconds: float, rejected: str | None) -> dict[str, Any]:
    return {
        "mesh": mesh_json(size),
        "memory_bytes_per_rank": memory,
        "predicted_step_seconds": seconds,
        "rejected": rejected,
    }
