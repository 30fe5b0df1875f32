"""What the page says beside the steps: the plan and how groups lie over hosts, snapshots, memory."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from trainrt.diagnostics.page.packed import packed
from trainrt.diagnostics.page.reader import RunReader
from trainrt.diagnostics.table import Roles

AXES = ("pp", "dp", "fsdp", "cp", "tp", "ep")
STALL_STEPS = 20


def plan_document(reader: RunReader) -> dict[str, Any]:
    """The plan in force, and who sits where: for each rank its host, its coordinates and its group along each axis."""
    plan = dict(reader.plan.read() or {})
    plan.pop("parameters", None)
    roles, seats = reader.summaries.roles, reader.summaries.seats
    axes = [axis for axis in AXES if axis in roles.coordinates]
    return {
        "plan": plan,
        "incarnation": reader.summaries.incarnation,
        "mesh": dict(roles.mesh) or plan.get("mesh", {}),
        "hosts": list(roles.hosts),
        "host": packed(roles.host),
        "coordinates": {axis: packed(roles.coordinates[axis]) for axis in axes},
        "groups": {axis: packed(roles.groups(axis)) for axis in axes},
        "topology": [_spread(roles, axis) for axis in axes],
        "first_step": seats.first_step if seats else None,
    }


def _spread(roles: Roles, axis: str) -> dict[str, Any]:
    """How the groups of an axis lie: how many there are, ranks and hosts of each (the most of any)."""
    group = roles.groups(axis)
    pairs = np.unique(group * max(1, len(roles.hosts)) + roles.host)
    hosts = np.bincount(pairs // max(1, len(roles.hosts)))
    return {
        "axis": axis,
        "groups": int(group.max() + 1),
        "ranks": int(np.bincount(group).max()),
        "hosts": int(hosts.max()),
    }


def health_document(reader: RunReader) -> dict[str, Any]:
    """Snapshots as the last steps had them, and by host the most memory that a rank of it uses."""
    return {"snapshots": _snapshots(reader), "memory": _memory(reader)}


def _snapshots(reader: RunReader) -> dict[str, Any]:
    recent = [reader.metrics[step] for step in sorted(reader.metrics)[-STALL_STEPS:]]
    last = recent[-1] if recent else {}
    seconds = sum(line["step_seconds"] for line in recent)
    stall = sum(line["snapshot_stall_seconds"] for line in recent)
    cluster = reader.cluster.read() or {}
    stores = [process for process in cluster.get("processes", []) if process["role"] == "store"]
    return {
        "protection": reader.status().get("protection"),
        "every": last.get("snapshot_every"),
        "stall_seconds": stall / len(recent) if recent else None,
        "stall_share": stall / seconds if seconds else None,
        "skipped": last.get("snapshots_skipped"),
        "stores": len(stores),
        "restores": dict(Counter(incident["restored_from"] for incident in reader.incidents)),
        "checkpoints": _checkpoints(reader),
    }


def _checkpoints(reader: RunReader) -> list[int]:
    """The steps of the whole checkpoints on disk, newest last."""
    found = reader.run_dir.checkpoints.glob("step-*/COMMIT")
    return sorted(int(path.parent.name.removeprefix("step-")) for path in found)


def _memory(reader: RunReader) -> dict[str, Any]:
    roles, steps = reader.summaries.roles, reader.summaries.steps
    by_host = np.full(len(roles.hosts), np.nan)
    whole = next((step for step in reversed(steps) if reader.summaries.complete(step)), None)
    if whole is not None:
        most = np.zeros(len(roles.hosts))
        np.maximum.at(most, roles.host, reader.summaries.column_of("memory", whole))
        by_host = most
    plan = reader.plan.read() or {}
    return {"step": whole, "most_bytes": packed(by_host), "planned_bytes": plan.get("memory_bytes_per_rank")}
