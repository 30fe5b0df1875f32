"""Who held up whom in one step: in a collective the others wait for the member that comes last."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainrt.diagnostics.attribution import collectives
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
    for members in collectives(lines, roles).values():
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
