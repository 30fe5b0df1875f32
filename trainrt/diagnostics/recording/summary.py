"""A rank's summary of a step: every moment belongs to the innermost event, so parts and collectives add up to the step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from trainrt.diagnostics.table import AXES, PARTS, SUMMARY
from trainrt.events import Event

AXIS_OF = {
    **{axis: axis for axis in AXES}, "efsdp": "fsdp", "inside": "ep", "across": "ep", "slices": "ep",
}  # fmt: skip
"""The axis of a group of ranks. Experts have their own fsdp groups, and their exchange groups along ep."""


def exclusive(events: Sequence[Event]) -> list[float]:
    """Of each event its seconds without those of the events inside it. `events`: in order of their ends.

    What lies inside is found by time, so events may be missing, and a depth may be wrong by one.
    """
    own: list[float] = []
    # What has ended and has no parent yet: start and seconds.
    orphans: list[tuple[float, float]] = []
    for _, _, _, start, end, *_ in events:
        seconds = rest = end - start
        while orphans and orphans[-1][0] >= start:
            rest -= orphans.pop()[1]
        orphans.append((start, seconds))
        own.append(rest)
    return own


def summary(
    events: Sequence[Event], *, step: int, rank: int, incarnation: int, epoch: float, work: Mapping[str, float],
    memory: int,
) -> np.ndarray:  # fmt: skip
    """The record (shape 1, dtype SUMMARY) of a step from its events, the last of which is the step itself.

    epoch: seconds since the epoch at zero of the events' clock.
    """
    whole = events[-1]
    found = dict.fromkeys((*PARTS, *AXES), 0.0)
    sent = 0
    for (_, kind, _, _, _, bytes, group, *_), seconds in zip(events, exclusive(events), strict=True):
        if kind == "collective":
            sent += bytes
            kind = AXIS_OF.get(group, "world")
        if kind in found:
            found[kind] += seconds
    found["other"] = max(0.0, whole.seconds - (sum(found.values()) - found["other"]))
    values = {
        **found, **work, "step": step, "rank": rank, "incarnation": incarnation, "start": epoch + whole.start,
        "seconds": whole.seconds, "bytes": sent, "memory": memory,
    }  # fmt: skip
    return np.array([tuple(values[name] for name in SUMMARY.names or ())], dtype=SUMMARY)
