"""A plan: a mesh and, for every parameter, the box of it that each rank holds.

Pure arithmetic over names and shapes; nothing here needs a process group, so the driver, a test and
a worker compute the same plan. Engines shard by it, snapshots and checkpoints know their fragments
by it (`Plan.layout`).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise, product
from typing import Any

from trainrt.config import MeshSize
from trainrt.parallel.layout import ITEM_BYTES, Box, Fragment, Layout, LogicalTensor, contiguous_strides
from trainrt.parallel.mesh import axis_size, coordinates
from trainrt.parallel.moe.form import Form
from trainrt.parallel.moe.layout import Orders
from trainrt.parallel.sharded.owners import Split, owners_of

ALIGNMENT = 64


Run = tuple[int, int]
"""(first index, length)."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Dimension `dim` is cut over mesh axis `axis`: into torch.chunk's pieces (the last may be short), or by `runs`.

    runs: for each place on the axis the runs of indices it holds, in order (heads of a fused weight, say). An index may be
    held by all places; the first counts it.
    """

    axis: str
    dim: int
    runs: tuple[tuple[Run, ...], ...] | None = None

    def places(self, shape: tuple[int, ...], count: int) -> tuple[tuple[Run, ...], ...]:
        """For each of `count` places the runs it holds, of a tensor that nothing else has cut."""
        if self.runs is not None:
            return self.runs
        piece = -(-shape[self.dim] // count)
        starts = [min(place * piece, shape[self.dim]) for place in range(count + 1)]
        return tuple(((a, b - a),) for a, b in pairwise(starts))


@dataclass(frozen=True, slots=True)
class Held:
    """What a rank holds of a live tensor: along each dimension, runs of indices, stored one after the other."""

    spans: tuple[tuple[Run, ...], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(sum(length for _, length in span) for span in self.spans)

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def clipped(self, dim: int, start: int, length: int) -> Held:
        """A range of it along one dimension, counted in what is held."""
        clipped, at = [], 0
        for first, n in self.spans[dim]:
            low, high = max(start, at), min(start + length, at + n)
            if low < high:
                clipped.append((first + low - at, high - low))
            at += n
        return Held((*self.spans[:dim], tuple(clipped), *self.spans[dim + 1 :]))

    def pieces(self) -> Iterator[tuple[Box, tuple[int, ...]]]:
        """Each box of the live tensor that is held, and its offset in the local one."""
        starts = [list(accumulate((n for _, n in span), initial=0)) for span in self.spans]
        for chosen in product(*(range(len(span)) for span in self.spans)):
            runs = [span[i] for span, i in zip(self.spans, chosen, strict=True)]
            box = Box(tuple(first for first, _ in runs), tuple(n for _, n in runs))
            yield box, tuple(start[i] for start, i in zip(starts, chosen, strict=True))


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

    def held(self, size: MeshSize, rank: int, *, gathered: bool = False) -> Held:
        """What `rank` holds of the live tensor; empty lengths are possible. gathered: by FSDP, while it is computed with."""
        where = coordinates(size, rank)
        held = Held(tuple(((0, n),) for n in self.shape))
        for cut in self.cuts:
            if axis_size(size, cut.axis) == 1 or (gathered and cut.axis in ("fsdp", "efsdp")):
                continue
            if cut.runs is not None:
                held = Held((*held.spans[: cut.dim], cut.runs[where[cut.axis]], *held.spans[cut.dim + 1 :]))
                continue
            length = held.shape[cut.dim]
            piece = -(-length // axis_size(size, cut.axis))
            held = held.clipped(cut.dim, where[cut.axis] * piece, piece)
        return held

    def counted(self, size: MeshSize, rank: int) -> tuple[int, list[int]] | None:
        """(dimension, positions along it) of what `rank` counts of its local tensor; None: all of it.

        Not all of it is counted where several places of a cut hold the same index: the first of them counts it.
        """
        for cut in self.cuts:
            place = coordinates(size, rank)[cut.axis]
            if cut.runs is None or axis_size(size, cut.axis) == 1 or place == 0:
                continue
            with_it = [other.runs for other in self.cuts if other.axis == cut.axis and other.runs is not None]
            same = [q for q in range(place) if all(_meet(runs[q], runs[place]) for runs in with_it)]
            earlier = {i for q in same for first, n in cut.runs[q] for i in range(first, first + n)}
            if any(first + k in earlier for first, n in cut.runs[place] for k in range(n)):
                mine = [first + k for first, n in self.held(size, rank).spans[cut.dim] for k in range(n)]
                return cut.dim, [position for position, index in enumerate(mine) if index not in earlier]
        return None

    def replica(self, size: MeshSize, rank: int) -> tuple[int, int]:
        """Which of the ranks that hold the same box this one is, and how many they are."""
        where = coordinates(size, rank)
        axes = {cut.axis for cut in self.cuts}
        replicated = ("ep", "efsdp") if axes & {"ep", "efsdp"} else ("tp", "fsdp", "dp")
        number, count = 0, 1
        for axis in replicated:
            if axis not in axes:
                number += where[axis] * count
                count *= axis_size(size, axis)
        return number, count

    def primary(self, size: MeshSize, rank: int) -> bool:
        """Whether `rank` is the first of the ranks that hold its box (they are replicas)."""
        return self.replica(size, rank)[0] == 0

    def share(self, size: MeshSize, rank: int) -> Held:
        """The rows of what it holds that `rank` answers for: replicas divide them among themselves."""
        return self.held(size, rank).clipped(0, *self.rows(size, rank)) if self.shape else self.held(size, rank)

    def rows(self, size: MeshSize, rank: int) -> Run:
        """(first, number) of the local rows that `rank` answers for."""
        (number, count), rows = self.replica(size, rank), self.held(size, rank).shape[0] if self.shape else 1
        piece = -(-rows // count)
        start = min(number * piece, rows)
        return start, min(piece, rows - start)

    def placements(self, size: MeshSize) -> dict[str, str]:
        """Mesh axis to 'replicate' or 'shard(dim)', as in `plan --json`."""
        cut: dict[str, str] = {}
        for one in self.cuts:
            if axis_size(size, one.axis) > 1:
                cut[one.axis] = f"{cut[one.axis]} {_placement(one)}" if one.axis in cut else _placement(one)
        axes = ("efsdp", "ep") if {"ep", "efsdp"} & {c.axis for c in self.cuts} else ("dp", "fsdp", "tp")
        return {axis: cut.get(axis, "replicate") for axis in axes}

    def fragments(self, part: Part, mine: Held, rank: int, base: int) -> tuple[Fragment, ...]:
        """What `rank` holds of a logical tensor in `mine` of the live one, which lies at byte `base`."""
        extent = [1] * len(self.shape)
        for dim, n in zip(part.dims, part.shape, strict=True):
            extent[dim] = n
        inside = Box(part.offset, tuple(extent))
        strides = contiguous_strides(mine.shape)
        found = []
        for piece, at in mine.pieces() if mine.elements else ():
            common = piece.intersect(inside)
            if common is None:
                continue
            moved = zip(common.offset, piece.offset, at, strides, strict=True)
            start = sum((a - b + first) * s for a, b, first, s in moved)
            box = Box(
                tuple(common.offset[d] - part.offset[d] for d in part.dims), tuple(common.length[d] for d in part.dims)
            )
            found.append(Fragment(rank, box, "state", tuple(strides[d] for d in part.dims), start, base))
        return tuple(found)


def kind_of(name: str) -> str:
    """A name with its numbers blanked: that of every layer and every expert of a kind."""
    return re.sub(r"[0-9]+", "*", name)


def _meet(some: tuple[Run, ...], others: tuple[Run, ...]) -> bool:
    """Whether an index is in both."""
    return any(a < b + m and b < a + n for a, n in some for b, m in others)


def _runs_json(parameter: ParameterPlan) -> dict[str, Any]:
    """Where a cut is not into even pieces: its runs, under the axis's name, and the dimension's for a second one."""
    found: dict[str, Any] = {}
    for cut in parameter.cuts:
        if cut.runs is not None:
            key = f"{cut.axis}_runs"
            found[f"{key}_{cut.dim}" if key in found else key] = cut.runs
    return found


def _placement(cut: Cut) -> str:
    if cut.runs is None or all(len(runs) <= 1 for runs in cut.runs):
        return f"shard({cut.dim})"
    return f"shard({cut.dim}, in {max(map(len, cut.runs))} runs)"


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

    recovery: what is expected of snapshots under failures (checkpoint/policy.py). experts: modules whose experts are spread
    over ep, and how they are called (None: they know how). orders: of those whose experts are not held in their own order,
    position -> expert; placement: what they were chosen by, and what that is expected to save (training/affinity.py).
    sequence: whether activations are scattered by positions over tp between split regions. verification: for each axis that
    needs one, what the comparison with one process found (verify.py).
    """

    mesh: MeshSize
    parameters: tuple[ParameterPlan, ...]
    aliases: dict[str, str]
    memory_bytes_per_rank: int = 0
    predicted_step_seconds: float = 0.0
    estimate: dict[str, float] = field(default_factory=dict)
    alternatives: tuple[dict[str, Any], ...] = ()
    recovery: dict[str, float] = field(default_factory=dict)
    experts: Mapping[str, Form | None] = field(default_factory=dict)
    orders: Orders = field(default_factory=dict)
    placement: Mapping[str, Any] = field(default_factory=dict)
    sequence: bool = False
    verification: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

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
            shape, start = parameter.held(self.mesh, rank).shape, 0
            if shared:
                start, rows = parameter.rows(self.mesh, rank)
                # A scalar that another replica answers for is an empty row here.
                shape = (rows, *shape[1:]) if shape or not rows else ()
            for role, dtype in roles_of(parameter, roles):
                slots.append(Slot(parameter.name, role, dtype, base, shape, start))
                size = math.prod(shape) * ITEM_BYTES[dtype]
                base += -(-size // ALIGNMENT) * ALIGNMENT
        return slots, base

    def replicas(self, rank: int) -> frozenset[int]:
        """The other ranks that hold exactly what this one holds."""
        others = (other for other in range(self.mesh.world_size) if other != rank)
        held = [parameter.held(self.mesh, rank) for parameter in self.parameters]
        return frozenset(
            other
            for other in others
            if all(p.held(self.mesh, other) == mine for p, mine in zip(self.parameters, held, strict=True))
        )

    def layout(self, ranks: Iterable[int], roles: Sequence[tuple[str, str | None]], *, shared: bool = False) -> Layout:
        """Which box of which logical tensor lies where in the snapshots of these ranks."""
        by_name = {parameter.name: parameter for parameter in self.parameters}
        layout = Layout()
        for rank in ranks:
            for slot in self.slots(rank, roles, shared=shared)[0]:
                parameter = by_name[slot.name]
                mine = parameter.share(self.mesh, rank) if shared else parameter.held(self.mesh, rank)
                elsewhere = not parameter.shape and slot.shape != ()
                for part in parameter.parts:
                    tensor = LogicalTensor(part.name, slot.role, slot.dtype, part.shape)
                    layout.add(tensor, *(() if elsewhere else parameter.fragments(part, mine, rank, slot.base)))
        return layout

    def splits(self) -> dict[str, Split]:
        """What tensor parallelism cuts, as sharded execution wants it."""
        found = {}
        for parameter in self.parameters:
            for cut in parameter.cuts:
                if cut.axis == "tp":
                    found[parameter.name] = Split(cut.dim, owners_of(cut.places(parameter.shape, self.mesh.tp)))
        return found

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
                    **_runs_json(parameter),
                }
                for parameter in self.parameters
            ],
            "memory_bytes_per_rank": self.memory_bytes_per_rank,
            "predicted_step_seconds": self.predicted_step_seconds,
            "estimate": self.estimate,
            "alternatives": list(self.alternatives),
            "recovery": self.recovery,
            "sequence_parallel": self.sequence,
            "expert_orders": {name: list(order) for name, order in self.orders.items()},
            "expert_placement": dict(self.placement),
            "verification": {axis: dict(verdict) for axis, verdict in self.verification.items()},
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
        rows += [(f"verified, {axis}", _verified(verdict)) for axis, verdict in self.verification.items()]
        rows += [("not cut", text) for text in self._whole()]
        if self.placement:
            rows.append(("experts", self._placed()))
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

    def _whole(self) -> Iterator[str]:
        """The large parameters that tensor parallelism leaves whole, a line for each kind, with the reason."""
        if self.mesh.tp == 1:
            return
        total = sum(math.prod(p.shape) for p in self.parameters)
        kinds: dict[tuple[str, str], tuple[int, str]] = {}
        for parameter in self.parameters:
            if not {cut.axis for cut in parameter.cuts} & {"tp", "ep"} and not parameter.buffer:
                kind = (kind_of(parameter.name), parameter.rule)
                elements = kinds.get(kind, (0, ""))[0] + math.prod(parameter.shape)
                kinds[kind] = (elements, f"{kind[0]}: {parameter.rule}")
        for elements, text in sorted(kinds.values(), reverse=True):
            if elements > total / 100:
                yield f"{text} ({elements / total:.1%} of the model)"

    def _placed(self) -> str:
        """What the placement of experts is expected to save."""
        if "passed_over" in self.placement:
            return f"in their own order: {self.placement['passed_over']}"
        rows = [
            f"{what} {self.placement[key][0]:,.0f} -> {self.placement[key][1]:,.0f}"
            for what, key in (
                ("hosts", "rows_across_hosts"), ("ranks", "rows_across_ranks"), ("busiest rank", "rows_of_busiest")
            )
        ]  # fmt: skip
        return f"placed by the counts until step {self.placement['counted_until_step']}; rows across {', '.join(rows)}"

    def _effective_time(self) -> str:
        every, hours = self.recovery["every"], self.recovery["node_mtbf_seconds"] / 3600
        seldom = f"{hours:,.0f}" if hours >= 10 else f"{hours:.3g}"
        often = {0: "without snapshots", 1: "with a snapshot every step"}.get(
            int(every), f"with a snapshot every {every} steps"
        )
        return f"{self.recovery['effective_time']:.2%} expected, {often}, if a node fails every {seldom} h"


def _verified(verdict: Mapping[str, Any]) -> str:
    slow = f"; gathered: {', '.join(verdict['gathered'])}" if verdict["gathered"] else ""
    return (
        f"{verdict['ranks']} ranks in {verdict['precision']}: loss within {verdict['loss_error']:.0e}, every gradient within "
        f"{verdict['gradient_error']:.0e}; a rank holds {verdict['held']:.0%} of it{slow}"
    )


def roles_of(parameter: ParameterPlan, roles: Sequence[tuple[str, str | None]]) -> list[tuple[str, str]]:
    """The roles a parameter has, with dtypes: frozen ones have no optimizer state, buffers only their own."""
    if parameter.buffer:
        return [("buffer", parameter.dtype)]
    kept = roles if parameter.trainable else [(role, dtype) for role, dtype in roles if role == "parameter"]
    return [(role, dtype or parameter.dtype) for role, dtype in kept]


def mesh_json(mesh: MeshSize) -> dict[str, int]:
    return {axis: axis_size(mesh, axis) for axis in ("pp", "dp", "fsdp", "cp", "tp", "ep")}
