"""Where the seconds of a step go: what a rank does by itself, what it waits for others, what travels.

A rank sees one number a group: how long it was in collectives. The last member to come waits for nobody, so the least time that
any member of the group spent in that axis's collectives of a step is what the transfers took; the rest is waiting.

Legend: S steps, R ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from trainrt.diagnostics.table import COMPUTE, Indices, Numbers, StepTable

BANDS = ("compute", "waiting", "data", "snapshot", "checkpoint", "other")
"""What the page stacks, beside the transfers of each axis."""


@dataclass(frozen=True, slots=True)
class Accounting:
    """Seconds by step and rank, (S, R) each; NaN where nothing was heard.

    own: the parts a rank spends by itself; `other` among them takes what no part claims, so that all add up to the step.
    """

    steps: Indices
    seconds: Numbers
    own: Mapping[str, Numbers]
    waiting: Mapping[str, Numbers]
    transfer: Mapping[str, Numbers]

    def waited(self) -> Numbers:
        """The seconds spent waiting for others, over all axes."""
        return sum(self.waiting.values(), self.seconds * 0)

    def self_seconds(self) -> Numbers:
        """The step less its collectives: what a rank spends by itself, whoever it waits for."""
        return sum(self.own.values(), np.zeros_like(self.seconds))

    def bands(self) -> dict[str, Numbers]:
        """By step the mean over the ranks that were heard, (S,): BANDS and a band `transfer AXIS` an axis."""
        own = {name: mean_over_ranks(part) for name, part in self.own.items()}
        named = {name: own.pop(name) for name in ("data", "snapshot", "checkpoint")}
        compute = sum((own.pop(name) for name in COMPUTE), np.zeros(len(self.steps)))
        transfer = {f"transfer {axis}": mean_over_ranks(part) for axis, part in self.transfer.items()}
        rest = sum(own.values(), np.zeros(len(self.steps)))
        return {"compute": compute, **transfer, "waiting": mean_over_ranks(self.waited()), **named, "other": rest}


def account(table: StepTable) -> Accounting:
    """Split each axis's communication by its groups; the parts of a rank add up to the seconds of its step."""
    waiting, transfer = {}, {}
    for axis, spent in table.communication.items():
        transfer[axis] = least_of_group(spent, table.roles.groups(axis))
        waiting[axis] = spent - transfer[axis]
    own = dict(table.parts)
    claimed = sum(own.values(), np.zeros_like(table.seconds)) + sum(
        table.communication.values(), np.zeros_like(table.seconds)
    )
    own["other"] = own["other"] + (table.seconds - claimed)
    return Accounting(table.steps, table.seconds, own, waiting, transfer)


def least_of_group(values: Numbers, group: Indices) -> Numbers:
    """For each step and rank the least value of the ranks of its group that were heard; NaN where the rank was not. (S, R)."""
    order = np.argsort(group, kind="stable")
    first = np.flatnonzero(np.diff(group[order], prepend=-1))
    least = np.fmin.reduceat(values[:, order], first, axis=1) if len(first) else values
    place = np.empty_like(order)
    place[order] = np.cumsum(np.diff(group[order], prepend=group[order][:1]) != 0)
    return np.where(np.isnan(values), np.nan, least[:, place] if len(first) else values)


def mean_over_ranks(values: Numbers) -> Numbers:
    """The mean over the ranks that were heard, (S,); NaN where none was."""
    heard = ~np.isnan(values)
    count = heard.sum(axis=1)
    total = np.where(heard, values, 0.0).sum(axis=1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
