"""Where the seconds of a step went: own parts, waiting for others, and what travelled.

Seconds in collectives hold both the wait for the last member and the transfer. Of the members of a group the one that came last
waited least, so the least time that any of them spent there is the transfer, and the rest of everybody's is waiting
(MegaScale, NSDI'24, section 5.2, aligns ranks of a group the same way).

Legend: S steps, R ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from trainrt.diagnostics.table import Numbers, StepTable


@dataclass(frozen=True, slots=True)
class Accounting:
    """Seconds, (S, R) each; NaN where nothing was heard. parts, waiting and transfer add up to the step."""

    parts: Mapping[str, Numbers]
    waiting: Mapping[str, Numbers]
    transfer: Mapping[str, Numbers]


def account(table: StepTable) -> Accounting:
    """Split the time in collectives of each axis into waiting and transfer."""
    waiting, transfer = {}, {}
    for axis, seconds in table.communication.items():
        group = table.roles.groups(axis)
        order = np.argsort(group, kind="stable")
        firsts = np.flatnonzero(np.diff(group[order], prepend=-1))
        least = np.fmin.reduceat(seconds[:, order], firsts, axis=1)
        transfer[axis] = np.where(np.isnan(seconds), np.nan, least[:, group])
        waiting[axis] = seconds - transfer[axis]
    return Accounting(table.parts, waiting, transfer)
