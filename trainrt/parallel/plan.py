"""A plan: a mesh and, for every parameter, the box of it that each rank holds.

Pure arithmetic over names and shapes; nothing here needs a process group, so the driver, a test and
a worker compute the same plan. Engines shard by it, snapshots and checkpoints know their fragments
by it (`Plan.layout`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainrt.config import MeshSize
from trainrt.parallel.layout import ITEM_BYTES, Box, Fragment, Layout, LogicalTensor, contiguous_strides
from trainrt.parallel.mesh import axis_size, coordinates

ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Cut:
    """Dimension `dim` is cut over mesh axis `axis` into torch.chunk's pieces (the last may be short)."""

    axis: str
    dim: int


@dataclass(frozen=True, slots=True)
class Part:
    """A logical tensor that lives inside a live one (a transposed expert of a stacked weight, say).

    Logical dimension i runs along live dimension `dims[i]`, from `offset[dims[i]]`; the other live
    dimensions are fixed at `offset`.
    """

    name: str
    shape: tuple[int, ...]
    dims: tuple[int, ...]
    offset: tuple[int, ...]

    @classmethod
    def whole(cls, name: str, shape: tuple[int, ...]) -> Part:
        return cls(name, shape, tuple(range(len(shape))), (0,) * len(shape))


@dataclass(frozen=True, slots=True)
class ParameterPlan:
    """Where a live parameter (or persistent buffer) lies. `cuts` apply in order, each inside the last.

    `parts` are the logical tensors stored in it: itself, unless the model packs several into one.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    cuts: tuple[Cut, ...]
    rule: str
    parts: tuple[Part, ...]
    trainable: bool = True
    buffer: bool = False

    def box(self, size: MeshSize, rank: int) -> Box:
        """The box of the live tensor that `rank` holds; empty lengths are possible."""
        where = coordinates(size, rank)
        offset, length = [0] * len(self.shape), list(self.shape)
        for cut in self.cuts:
            pieces = axis_size(size, cut.axis)
            piece = -(-length[cut.dim] // pieces)
            start = min(where[cut.axis] * piece, length[cut.dim])
            length[cut.dim] = min(piece, length[cut.dim] - start)
            offset[cut.dim] += start
        return Box(tuple(offset), tuple(length))

    def replica(self, size: MeshSize, rank: int) -> tuple[int, int]:
        """Which of the ranks that hold the same box this one is, and how many they are."""
        where = coordinates(size, rank)
        axes = {cut.axis for cut in self.cuts}
        replicated = ("tp", "ep", "efsdp") if axes & {"ep", "efsdp"} else ("tp", "fsdp", "dp")
        number, count = 0, 1
        for axis in replicated:
            if axis not in axes:
                number += where[axis] * count
                count *= axis_size(size, axis)
        return number, count

    def primary(self, size: MeshSize, rank: int) -> bool:
        """Whether `rank` is the first of the ranks that hold its box (they are replicas)."""
        return self.replica(size, rank)[0] == 0

    def share(self, size: MeshSize, rank: int) -> Box:
        """The rows of its box that `rank` answers for: replicas divide them among themselves."""
        box, (number, count) = self.box(size, rank), self.replica(size, rank)
        if not self.shape:
            return box if number == 0 else Box((0,), (0,))
        piece = -(-box.length[0] // count)
        start = min(number * piece, box.length[0])
        rows = min(piece, box.length[0] - start)
        return Box((box.offset[0] + start, *box.offset[1:]), (rows, *box.length[1:]))

    def placements(self, size: MeshSize) -> dict[str, str]:
        """Mesh axis to 'replicate' or 'shard(dim)', as in `plan --json`."""
        cut = {cut.axis: f"shard({cut.dim})" for cut in self.cuts if axis_size(size, cut.axis) > 1}
        axes = ("efsdp", "ep", "tp") if {"ep", "efsdp"} & {c.axis for c in self.cuts} else ("dp", "fsdp", "tp")
        return {axis: cut.get(axis, "replicate") for axis in axes}

    def fragments(self, part: Part, mine: Box, rank: int, base: int) -> tuple[Fragment, ...]:
        """What `rank` holds of a logical tensor in the box `mine` of the live one, which lies at byte `base`."""
        extent = [1] * len(self.shape)
        for dim, n in zip(part.dims, part.shape, strict=True):
            extent[dim] = n
        common = mine.intersect(Box(part.offset, tuple(extent))) if mine.elements else None
        if common is None:
            return ()
        strides = contiguous_strides(mine.length)
        start = sum((a - b) * s for a, b, s in zip(common.offset, mine.offset, strides, strict=True))
        box = Box(
            tuple(common.offset[d] - part.offset[d] for d in part.dims), tuple(common.length[d] for d in part.dims)
        )
        return (Fragment(rank, box, "state", tuple(strides[d] for d in part.dims), start, base),)


@dataclass(frozen=True, slots=True)
class Slot:
    """Where the local tensor of one (parameter, role), or `shape[0]` rows of it from `start` on, lies in a buffer."""

    name: str
    role: str
    dtype: str
    base: int
    shape: tuple[int, ...]
    start: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """A mesh and the placement of every parameter, with what was estimated and what was passed over.

    recovery: what is expected of snapshots under failures (checkpoint/policy.py).
    """

    mesh: MeshSize
    parameters: tuple[ParameterPlan, ...]
    aliases: dict[str, str]
    memory_bytes_per_rank: int = 0
    predicted_step_seconds: float = 0.0
    estimate: dict[str, float] = field(default_factory=dict)
    alternatives: tuple[dict[str, Any], ...] = ()
    recovery: dict[str, float] = field(default_factory=dict)

    def __getitem__(self, name: str) -> ParameterPlan:
        return next(parameter for parameter in self.parameters if parameter.name == name)

    def slots(
        self, rank: int, roles: Sequence[tuple[str, str | None]], *, shared: bool = False
    ) -> tuple[list[Slot], int]:
        """The local tensors of a rank one after the other, aligned, and their bytes in all.

        `roles` are (role, dtype); dtype None: the parameter's own. Buffers have the one role `buffer`.
        `shared`: of what replicas hold, only the rank's share.
        """
        slots: list[Slot] = []
        base = 0
        for parameter in self.parameters:
            box, whole = self._held(parameter, rank, shared=shared), parameter.box(self.mesh, rank)
            start = box.offset[0] - whole.offset[0] if parameter.shape else 0
            for role, dtype in roles_of(parameter, roles):
                slots.append(Slot(parameter.name, role, dtype, base, box.length, start))
                size = Box.whole(box.length).elements * ITEM_BYTES[dtype]
                base += -(-size // ALIGNMENT) * ALIGNMENT
        return slots, base

    def replicas(self, rank: int) -> frozenset[int]:
        """The other ranks that hold exactly what this one holds."""
        others = (other for other in range(self.mesh.world_size) if other != rank)
        boxes = [parameter.box(self.mesh, rank) for parameter in self.parameters]
        return frozenset(
            other
            for other in others
            if all(p.box(self.mesh, other) == box for p, box in zip(self.parameters, boxes, strict=True))
        )

    def layout(self, ranks: Iterable[int], roles: Sequence[tuple[str, str | None]], *, shared: bool = False) -> Layout:
        """Which box of which logical tensor lies where in the snapshots of these ranks."""
        by_name = {parameter.name: parameter for parameter in self.parameters}
        layout = Layout()
        for rank in ranks:
            for slot in self.slots(rank, roles, shared=shared)[0]:
                parameter = by_name[slot.name]
                mine = self._held(parameter, rank, shared=shared)
                for part in parameter.parts:
                    tensor = LogicalTensor(part.name, slot.role, slot.dtype, part.shape)
                    layout.add(tensor, *parameter.fragments(part, mine, rank, slot.base))
        return layout

    def _held(self, parameter: ParameterPlan, rank: int, *, shared: bool) -> Box:
        return parameter.share(self.mesh, rank) if shared else parameter.box(self.mesh, rank)

    def to_json(self) -> dict[str, Any]:
        """The document of `trainrt plan --json` and plan.json."""
        return {
            "mesh": mesh_json(self.mesh),
            "world_size": self.mesh.world_size,
            "parameters": [
                {
                    "name": parameter.name,
                    "shape": list(parameter.shape),
                    "placements": parameter.placements(self.mesh),
                    "rule": parameter.rule,
                }
                for parameter in self.parameters
            ],
            "memory_bytes_per_rank": self.memory_bytes_per_rank,
            "predicted_step_seconds": self.predicted_step_seconds,
            "estimate": self.estimate,
            "alternatives": list(self.alternatives),
            "recovery": self.recovery,
        }

    def sha256(self) -> str:
        """A digest of the mesh and the placements."""
        document = {key: self.to_json()[key] for key in ("mesh", "parameters")}
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()

    def table(self) -> list[tuple[str, str]]:
        """Rows for the terminal: what a person wants to know of a plan."""
        count = sum(Box.whole(p.shape).elements for p in self.parameters if not p.buffer)
        axes = " x ".join(f"{axis} {n}" for axis, n in mesh_json(self.mesh).items() if n > 1) or "one rank"
        rows = [
            ("mesh", f"{axes} ({self.mesh.world_size} ranks)"),
            ("parameters", f"{count / 1e6:.2f} M in {len(self.parameters)} tensors"),
            ("memory per rank", f"{self.memory_bytes_per_rank / 2**20:.0f} MiB, estimated"),
            ("step", f"{self.predicted_step_seconds:.3f} s, predicted"),
        ]
        if self.recovery:
            rows.append(("effective time", self._effective_time()))
        considered = [a for a in self.alternatives if not a["rejected"]]
        if considered:
            rows.append(
                (
                    "passed over",
                    f"{len(considered)} slower meshes, {len(self.alternatives) - len(considered)} that do not fit",
                )
            )
        return rows

    def _effective_time(self) -> str:
        every, hours = self.recovery["every"], self.recovery["node_mtbf_seconds"] / 3600
        seldom = f"{hours:,.0f}" if hours >= 10 else f"{hours:.3g}"
        often = {0: "without snapshots", 1: "with a snapshot every step"}.get(
            int(every), f"with a snapshot every {every} steps"
        )
        return f"{self.recovery['effective_time']:.2%} expected, {often}, if a node fails every {seldom} h"


def roles_of(parameter: ParameterPlan, roles: Sequence[tuple[str, str | None]]) -> list[tuple[str, str]]:
    """The roles a parameter has, with dtypes: frozen ones have no optimizer state, buffers only their own."""
    if parameter.buffer:
        return [("buffer", parameter.dtype)]
    kept = roles if parameter.trainable else [(role, dtype) for role, dtype in roles if role == "parameter"]
    return [(role, dtype or parameter.dtype) for role, dtype in kept]


def mesh_json(mesh: MeshSize) -> dict[str, int]:
    return {axis: axis_size(mesh, axis) for axis in ("pp", "dp", "fsdp", "cp", "tp", "ep")}
