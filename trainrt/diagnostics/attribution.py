"""Who the waiting of one step goes back to, from the arrivals of all ranks at all collectives.

In a collective everybody waits for the member that comes last. Where that one is late only because it waited for somebody else
before, it is a victim too: seconds go back to the rank that lost them by itself. Legend: R ranks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from trainrt.diagnostics.table import Numbers, Roles

NEVER = 1e-9


@dataclass(frozen=True, slots=True)
class Meeting:
    """One collective of one group: for each member when it arrived and when it was over, on one clock, in seconds.

    base: what its transfer usually takes.
    """

    name: str
    ranks: Sequence[int]
    arrivals: Sequence[float]
    ends: Sequence[float]
    base: float = 0.0

    @property
    def lateness_share(self) -> float:
        """P = (Tmax - Tmin) / (Tmax - Tbase): near 1 a member came late, near 0 the transfer itself was slow."""
        seconds = np.subtract(self.ends, self.arrivals)
        longest, shortest = float(seconds.max()), float(seconds.min())
        beyond = longest - self.base
        return min(1.0, (longest - shortest) / beyond) if beyond > NEVER else 0.0

    @property
    def last(self) -> int:
        """The rank that came last."""
        return self.ranks[int(np.argmax(self.arrivals))]


@dataclass(frozen=True, slots=True)
class Origins:
    """seconds: that others waited because of a rank, by rank, (R,). waited: that each rank waited, (R,)."""

    seconds: Numbers
    waited: Numbers

    @property
    def share(self) -> Numbers:
        """Of all waiting."""
        return self.seconds / max(float(self.waited.sum()), NEVER)


def origins(meetings: Sequence[Meeting], ranks: int) -> Origins:
    """Follow the meetings of a step in the order in which they took place.

    Each rank carries debts: for whom, and how long, it was held up so far. What all members of a group owe alike makes none of
    them late. The lateness of the last is paid from its debts first; the rest is its own. Quadratic in ranks.
    """
    debts = np.zeros((ranks, ranks))
    caused, waited = np.zeros(ranks), np.zeros(ranks)
    for meeting in sorted(meetings, key=lambda m: max(m.arrivals)):
        members, arrivals = np.asarray(meeting.ranks), np.asarray(meeting.arrivals)
        last = int(arrivals.argmax())
        late = float(arrivals[last] - arrivals.min())
        if late <= NEVER:
            continue
        reason = debts[members[last]] - debts[members].min(0)
        owed = float(reason.sum())
        if owed > late:
            reason *= late / owed
        else:
            reason[members[last]] += late - owed
        waits = arrivals[last] - arrivals
        shares = waits[:, None] * (reason / late)
        caused += shares.sum(0)
        waited[members] += waits
        debts[members] += shares
        # The last one itself is as late as it is by its own doing, for whomever it meets next.
        debts[members[last], members[last]] += float(reason[members[last]])
    return Origins(caused, waited)


def collectives(lines: Mapping[int, Mapping[str, Any]], roles: Roles) -> dict[Any, list[tuple[float, int, int]]]:
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


def meetings(lines: Mapping[int, Mapping[str, Any]], roles: Roles) -> list[Meeting]:
    """The collectives of a step to which several members came, from the lines of events by rank.

    What a transfer usually takes is the median over those of the same name of the least that any member spent in one.
    """
    found = []
    for members in collectives(lines, roles).values():
        if len(members) < 2:
            continue
        arrivals, ranks, places = zip(*members, strict=True)
        events = [lines[rank]["events"][place] for rank, place in zip(ranks, places, strict=True)]
        ends = [arrival + event["seconds"] for arrival, event in zip(arrivals, events, strict=True)]
        found.append(Meeting(events[0]["name"], ranks, arrivals, ends))
    least: dict[str, list[float]] = defaultdict(list)
    for meeting in found:
        least[meeting.name].append(float(np.subtract(meeting.ends, meeting.arrivals).min()))
    return [replace(meeting, base=float(np.median(least[meeting.name]))) for meeting in found]


def lateness(met: Sequence[Meeting]) -> float:
    """P of a whole step: of what its collectives took beyond the usual transfer, the share that members were late."""
    seconds = [float(np.subtract(m.ends, m.arrivals).max()) - m.base for m in met]
    beyond = np.maximum(seconds, 0.0)
    return float(beyond @ [m.lateness_share for m in met]) / max(float(beyond.sum()), NEVER)
