"""The events of all ranks of one step, on one clock, with arrows from those that came last to those that waited."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trainrt.diagnostics.page.arrows import arrows
from trainrt.diagnostics.page.reader import RunReader
from trainrt.diagnostics.table import Roles

RANKS_SHOWN = 64
AXES = ("tp", "cp", "pp", "ep", "fsdp", "dp")
"""Whose groups are shown first, where not all ranks can be."""


def timeline(reader: RunReader, step: int | None = None, rank: int | None = None) -> dict[str, Any]:
    """The document of one step (if none is named, the newest that all have). Of more than RANKS_SHOWN: the groups of `rank`.

    Events are columns: `name`, `kind` and `group` are indices into `names`; times are seconds from the step's first start.
    """
    step = reader.windows.newest_whole() if step is None else step
    chosen = chosen_rank(reader, rank)
    lines = lines_of(reader, step, rank) if step is not None else {}
    start = min((line["time"] for line in lines.values()), default=0.0)
    names: dict[str, int] = {}
    return {
        "step": step,
        "steps": reader.windows.steps(),
        "rank": chosen,
        "shown": len(lines),
        "with_events": len(reader.windows.ranks),
        "world_size": reader.summaries.roles.ranks or len(reader.windows.ranks),
        "ranks": [_row(number, line, start, names) for number, line in lines.items()],
        "arrows": _arrows(lines, reader.summaries.roles, start),
        "names": list(names),
    }


def lines_of(reader: RunReader, step: int, rank: int | None) -> dict[int, dict[str, Any]]:
    """By rank the lines of a step; of a large run those of the groups of one rank."""
    chosen = chosen_rank(reader, rank)
    if chosen is None:
        return reader.windows.lines(step)
    return reader.windows.lines(step, companions(reader.summaries.roles, chosen, reader.windows.ranks))


def chosen_rank(reader: RunReader, rank: int | None) -> int | None:
    """Whose groups are shown: `rank`, or else the first culprit, or else the first that has events; None where all can be."""
    having = reader.windows.ranks
    if len(having) <= RANKS_SHOWN:
        return None
    verdicts = (reader.diagnosis.read() or {}).get("verdicts", [])
    culprits = [culprit["rank"] for verdict in verdicts for culprit in verdict["culprits"]]
    able = set(having)
    return next(one for one in (rank, *culprits, having[0]) if one in able)


def companions(roles: Roles, rank: int, among: Sequence[int], *, number: int = RANKS_SHOWN) -> list[int]:
    """A rank, and those of its groups, the smallest kinds of groups first; of a group too large those beside the rank."""
    able = set(among)
    found = {rank: None}
    if rank < roles.ranks:
        for axis in (axis for axis in AXES if axis in roles.coordinates):
            group = roles.groups(axis)
            near = np.flatnonzero(group == group[rank])
            for other in near[np.argsort(np.abs(near - rank), kind="stable")].tolist():
                if other in able and len(found) < number:
                    found[other] = None
    if len(found) == 1:
        found = dict.fromkeys(sorted(able, key=lambda other: (abs(other - rank), other))[:number])
    return sorted(found)


def _row(rank: int, line: Mapping[str, Any], start: float, names: dict[str, int]) -> dict[str, Any]:
    events = sorted(line["events"], key=lambda event: (event["depth"], event["start"]))
    offset = line["time"] - start

    def number(name: str) -> int:
        return names.setdefault(name, len(names))

    return {
        "rank": rank,
        "host": line["node"],
        "offset_seconds": round(offset, 7),
        "seconds": line["seconds"],
        "self_seconds": line["self_seconds"],
        "waiting_seconds": line["waiting_seconds"],
        "name": [number(event["name"]) for event in events],
        "kind": [number(event["kind"]) for event in events],
        "group": [number(event["group"]) for event in events],
        "depth": [event["depth"] for event in events],
        "start": [round(offset + event["start"], 7) for event in events],
        "duration": [event["seconds"] for event in events],
        "bytes": [event["bytes"] for event in events],
        "waiting": [int(event["waiting"]) for event in events],
    }


def _arrows(lines: Mapping[int, Mapping[str, Any]], roles: Roles, start: float) -> list[dict[str, Any]]:
    return [
        {
            "name": arrow.name,
            "group": arrow.group,
            "from": arrow.source,
            "from_seconds": round(arrow.source_time - start, 7),
            "to": arrow.target,
            "to_seconds": round(arrow.target_time - start, 7),
            "waited_seconds": round(arrow.waited, 7),
        }
        for arrow in arrows(lines, roles)
    ]
