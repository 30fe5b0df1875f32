"""What detectors work on: for every step and rank the seconds of its parts, the seconds it spent in collectives, and its work.

A summary is 112 bytes a rank and step. The driver appends what the ranks send it to `events/summaries.bin`; who sat where is in
`events/seats.jsonl`, a line an incarnation; what stores measured of links is in `events/links.jsonl`.

Legend: S steps, R ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
Indices = NDArray[np.int64]

PARTS = (
    "forward", "backward", "optimizer", "data", "snapshot", "checkpoint", "evaluation", "compile", "garbage_collection", "other",
)  # fmt: skip
"""What a rank does by itself. Time is that of the innermost event, so the parts and the collectives add up to the step."""
AXES = ("tp", "fsdp", "dp", "cp", "pp", "ep", "world")
"""Groups of collectives: the wait for the last member and what then travels are one number until the ranks are compared."""
WORK = ("tokens", "squares", "rows")
"""Tokens, the sum of the squared lengths of sequences, and rows that experts computed here."""
COMPUTE = ("forward", "backward", "optimizer")
EXPERT_AXES = ("ep", "efsdp")

SUMMARY = np.dtype(
    [("step", "<u4"), ("rank", "<u4"), ("incarnation", "<u4"), ("start", "<f8"), ("seconds", "<f4")]
    + [(name, "<f4") for name in (*PARTS, *AXES, *WORK, "bytes", "memory")]
)
"""start: seconds since the epoch on the clock of the driver's host. bytes: sent in collectives. memory: most bytes in use."""


@dataclass(frozen=True, slots=True)
class Roles:
    """Who the ranks are. host: index into `hosts`; coordinates: along each axis of the mesh, by rank."""

    mesh: Mapping[str, int]
    hosts: tuple[str, ...]
    host: Indices
    coordinates: Mapping[str, Indices]

    @property
    def ranks(self) -> int:
        return len(self.host)

    def groups(self, axis: str) -> Indices:
        """For each rank, the number of its group along an axis: ranks that differ in this coordinate alone.

        Experts see the ranks of a stage as efsdp * ep: where the dense axes alone tell all ranks apart, ep and efsdp are no axes
        beside them but the same ranks once more.
        """
        if axis == "world":
            return np.zeros(self.ranks, dtype=np.int64)
        if axis not in self.coordinates:
            return np.arange(self.ranks)
        dense = {name: place for name, place in self.coordinates.items() if name not in EXPERT_AXES}
        folded = np.prod([place.max() + 1 for place in dense.values()]) == self.ranks
        if folded and axis in EXPERT_AXES:
            return self._expert_groups(axis)
        among = dense if folded else self.coordinates
        others = [among[name] for name in sorted(among) if name != axis]
        return _numbered(others) if others else np.zeros(self.ranks, dtype=np.int64)

    def _expert_groups(self, axis: str) -> Indices:
        """ep varies fastest: the n-th rank of a stage with some place on ep is in the n-th group. efsdp: of one place."""
        stage = self.coordinates.get("pp", np.zeros(self.ranks, dtype=np.int64))
        if axis == "efsdp":
            return _numbered([stage, self.coordinates.get("ep", np.zeros_like(stage))])
        same = _numbered([stage, self.coordinates["ep"]])
        order = np.argsort(same, kind="stable")
        counts = np.bincount(same)
        turn = np.empty_like(order)
        turn[order] = np.arange(self.ranks) - np.repeat(np.cumsum(counts) - counts, counts)
        return _numbered([stage, turn])

    def peers(self) -> Indices:
        """For each rank, the number of its role: ranks that do the same work on other data."""
        alike = [self.coordinates[name] for name in ("pp", "tp", "cp") if name in self.coordinates]
        if not alike:
            return np.zeros(self.ranks, dtype=np.int64)
        return _numbered(alike)


def _numbered(places: Sequence[Indices]) -> Indices:
    """For each rank, the number of its tuple of coordinates, in the order of tuples."""
    key = np.zeros(len(places[0]), dtype=np.int64)
    for place in places:
        key = key * (place.max(initial=0) + 1) + place
    return np.unique(key, return_inverse=True)[1].reshape(-1)


@dataclass(frozen=True, slots=True)
class Links:
    """Transfers between hosts: by step, from host to host (indices into Roles.hosts)."""

    step: Indices
    source: Indices
    target: Indices
    bytes: Numbers
    seconds: Numbers

    @classmethod
    def none(cls) -> Links:
        whole, real = np.zeros(0, dtype=np.int64), np.zeros(0)
        return cls(whole, whole, whole, real, real)


@dataclass(frozen=True, slots=True)
class StepTable:
    """The summaries of the ranks of one incarnation, steps by ranks; NaN where nothing was heard.

    parts, communication: seconds, (S, R) each; work: amounts, (S, R).
    """

    steps: Indices
    roles: Roles
    start: Numbers
    seconds: Numbers
    parts: Mapping[str, Numbers]
    communication: Mapping[str, Numbers]
    work: Mapping[str, Numbers]
    links: Links = field(default_factory=Links.none)

    @classmethod
    def of(cls, records: NDArray[Any], roles: Roles, links: Links | None = None) -> StepTable:
        """From summaries of one incarnation, in any order; of one that came twice, the last."""
        steps = np.unique(records["step"]).astype(np.int64)
        row = np.searchsorted(steps, records["step"])

        def spread(name: str) -> Numbers:
            table = np.full((len(steps), roles.ranks), np.nan)
            table[row, records["rank"]] = records[name]
            return table

        return cls(
            steps, roles, spread("start"), spread("seconds"), {name: spread(name) for name in PARTS},
            {name: spread(name) for name in AXES if (records[name] > 0).any()}, {name: spread(name) for name in WORK},
            links or Links.none(),
        )  # fmt: skip

    def last(self, number: int) -> StepTable:
        """The last steps."""
        return self.only(np.arange(len(self.steps)) >= len(self.steps) - number)

    def only(self, keep: NDArray[np.bool_]) -> StepTable:
        """The steps that are kept, (S,)."""
        if keep.all():
            return self
        parts, communication, work = (
            {name: table[keep] for name, table in kind.items()} for kind in (self.parts, self.communication, self.work)
        )
        meant = np.isin(self.links.step, self.steps[keep])
        links = Links(*(getattr(self.links, name)[meant] for name in ("step", "source", "target", "bytes", "seconds")))
        return StepTable(
            self.steps[keep], self.roles, self.start[keep], self.seconds[keep], parts, communication, work, links
        )


def roles_of(mesh: Mapping[str, int], hosts: Sequence[str], coordinates: Sequence[Mapping[str, int]]) -> Roles:
    """From the host and the coordinates of each rank."""
    names = tuple(dict.fromkeys(hosts))
    axes = [axis for axis in coordinates[0] if mesh.get(axis, 1) > 1] if coordinates else []
    return Roles(
        mesh, names, np.array([names.index(host) for host in hosts], dtype=np.int64),
        {axis: np.array([place[axis] for place in coordinates], dtype=np.int64) for axis in axes},
    )  # fmt: skip
