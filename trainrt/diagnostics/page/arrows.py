"""Who held up whom in one step: in a collective the others wait for the member that comes last."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainrt.diagnostics.table import Roles

ARROWS_SHOWN = 400


@dataclass(frozen=True, slots=True)
class Arrow:
    """From the last to arrive at a collective, at its arrival, to one that waited, when its wait ended.

    Times: seconds since the epoch. waited: seconds between the two arrivals. Places: indices into the events of the lines.
    """

    name: str
    group: str
    source: int
    source_time: float
    source_event: int
    target: int
    target_time: float
    target_event: int
    waited: float


def arrows(lines: Mapping[int, Mapping[str, Any]], roles: Roles, *, at_most: int = ARROWS_SHOWN) -> list[Arrow]:
    """Of the lines of one step by rank: the longest waits, by falling length. Only collectives with a `sequence` are matched."""
    found = []
    for members in _collectives(lines, roles).values():
        if len(members) < 2:
            continue
        start, source, index = max(members)
        for arrival, target, place in members:
            if target == source or arrival >= start:
                continue
            event = lines[target]["events"][place]
            end = arrival + event["seconds"]
            if end >= start:
                found.append(
                    Arrow(event["name"], event["group"], source, start, index, target, end, place, start - arrival)
                )
    return sorted(found, key=lambda arrow: -arrow.waited)[:at_most]


def _collectives(lines: Mapping[int, Mapping[str, Any]], roles: Roles) -> dict[Any, list[tuple[float, int, int]]]:
    """By axis, group and sequence: (arrival, rank, index of the event) of each member.

    Groups of one axis share a name: where the seats do not tell them apart nothing is matched.
    """
    numbers: dict[str, Any] = {}
    members: dict[Any, list[tuple[float, int, int]]] = defaultdict(list)
    for rank, line in lines.items():
        for index, event in enumerate(line["events"]):
            if event["kind"] != "collective" or event.get("sequence") is None:
                continue
            # torch names the group of a mesh's axis so.
            axis = event["group"].removeprefix("mesh_")
            if axis not in numbers:
                numbers[axis] = roles.groups(axis) if axis in (*roles.coordinates, "world") else None
            if numbers[axis] is not None and rank < roles.ranks:
                key = (axis, int(numbers[axis][rank]), event["sequence"])
                members[key].append((line["time"] + event["start"], rank, index))
    return members
