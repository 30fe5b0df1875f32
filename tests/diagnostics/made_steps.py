"""A step of many ranks, made up: each computes, collectives end when the last of the group has come and the transfer is over.

Legend: R ranks.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainrt.diagnostics.table import SUMMARY, Roles

Numbers = NDArray[np.float64]


class MadeStep:
    """The clock of every rank as its step goes by, and what it did: names, kinds and depths are the same for all."""

    def __init__(self, roles: Roles) -> None:
        self.roles = roles
        self.start = time.time()
        self.clock = np.zeros(roles.ranks)
        self.parts: dict[str, Numbers] = {}
        self.communication: dict[str, Numbers] = {}
        self.log: list[tuple[str, str, int, str, int | None, Numbers, Numbers]] = []
        self._sequence: dict[str, int] = {}

    @property
    def seconds(self) -> Numbers:
        return self.clock

    def compute(self, name: str, seconds: Numbers, *, depth: int = 1) -> None:
        self.parts[name] = self.parts.get(name, 0.0) + seconds
        self.log.append((name, name, depth, "", None, self.clock.copy(), seconds))
        self.clock = self.clock + seconds

    def collective(self, name: str, axis: str, transfer: float, *, depth: int = 2) -> None:
        group = self.roles.groups(axis)
        last = np.zeros(group.max() + 1)
        np.maximum.at(last, group, self.clock)
        spent = last[group] + transfer - self.clock
        self._sequence[axis] = self._sequence.get(axis, 0) + 1
        self.log.append((name, "collective", depth, axis, self._sequence[axis], self.clock.copy(), spent))
        self.communication[axis] = self.communication.get(axis, 0.0) + spent
        self.clock = self.clock + spent

    def around(self, name: str, since: Numbers) -> None:
        """An event of depth 1 around all that came after."""
        self.log.append((name, name, 1, "", None, since, self.clock - since))

    def events(self, rank: int) -> list[dict[str, Any]]:
        """As a line of events holds them."""
        log = [*self.log, ("step", "step", 0, "", None, np.zeros_like(self.clock), self.clock)]
        return [
            {
                "name": name, "kind": kind, "depth": depth, "start": round(float(start[rank]), 7),
                "seconds": round(float(seconds[rank]), 7), "bytes": 1 << 20 if sequence else 0, "group": group,
                "waiting": kind == "collective", **({} if sequence is None else {"sequence": sequence}),
            }
            for name, kind, depth, group, sequence, start, seconds in log
        ]  # fmt: skip

    def records(self, step: int, incarnation: int) -> NDArray[Any]:
        """The summaries of all ranks, (R,)."""
        records = np.zeros(self.roles.ranks, dtype=SUMMARY)
        records["step"], records["rank"], records["incarnation"] = step, np.arange(self.roles.ranks), incarnation
        records["start"], records["seconds"] = self.start, self.clock
        for name, seconds in {**self.parts, **self.communication}.items():
            records[name] = seconds
        records["tokens"], records["bytes"] = 4096 / self.roles.ranks, 1 << 24
        records["memory"] = (2 + 0.5 * (np.arange(self.roles.ranks) % 3)) * 2**30
        return records


def made_step(roles: Roles, noise: np.random.Generator, *, slow: Mapping[int, float], layers: int = 4) -> MadeStep:
    """slow: by rank how many times as long it computes."""
    made = MadeStep(roles)
    factor = np.ones(roles.ranks)
    for rank, times in slow.items():
        factor[rank] = times

    def about(seconds: float) -> Numbers:
        return seconds * noise.normal(1.0, 0.02, roles.ranks).clip(0.9)

    made.compute("data", about(0.002))
    axes = roles.coordinates
    for phase, seconds in (("forward", 0.008), ("backward", 0.016)):
        since = made.clock.copy()
        for _ in range(layers):
            if "fsdp" in axes and phase == "forward":
                made.collective("fsdp_all_gather", "fsdp", 0.0006)
            made.compute(phase, about(seconds) * factor, depth=2)
            if "tp" in axes:
                made.collective("all_reduce", "tp", 0.0008)
            if "ep" in axes:
                made.collective("all_to_all", "ep", 0.0007)
            if "fsdp" in axes and phase == "backward":
                made.collective("fsdp_reduce_scatter", "fsdp", 0.0009)
        if "pp" in axes:
            made.collective("send_receive", "pp", 0.001)
        made.around(phase, since)
    if "dp" in axes:
        made.collective("all_reduce_gradients", "dp", 0.004, depth=1)
    made.compute("optimizer", about(0.004))
    made.compute("snapshot", about(0.002))
    return made
