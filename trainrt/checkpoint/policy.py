"""How often to snapshot, and how much parity to keep: what failures cost against what protection costs.

All times in seconds. Rates are of failures that stop training; MTBF is the mean time between two of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from trainrt.checkpoint.store.group import choose_groups
from trainrt.config import JobConfig

NODE_MTBF_SECONDS = 6300 * 3600.0
"""Of a node of eight GPUs: 419 unexpected interruptions in 54 days on 16,384 GPUs (Llama 3, arXiv 2407.21783, section 3.3.4)."""
MOST_PARITY = 3
NEGLIGIBLE = 1e-3
"""Share of the time that may go to generations lost for good before one more parity shard is worth it."""


def node_mtbf_seconds(config: JobConfig) -> float:
    """The mean time between failures of a node, as given or as is usual."""
    given = config.cluster.node_mtbf_hours
    return NODE_MTBF_SECONDS if given == "auto" else given * 3600


def best_interval(*, snapshot_seconds: float, mtbf_seconds: float) -> float:
    """The time between two snapshots that loses least (Young 1974; Daly 2006, equation 17, first order)."""
    if snapshot_seconds >= 2 * mtbf_seconds:
        return mtbf_seconds
    return math.sqrt(2 * snapshot_seconds * mtbf_seconds) - snapshot_seconds


def best_every(*, step_seconds: float, snapshot_seconds: float, mtbf_seconds: float) -> int:
    """The same in steps, at least one."""
    return max(1, round(best_interval(snapshot_seconds=snapshot_seconds, mtbf_seconds=mtbf_seconds) / step_seconds))


def effective_time(
    *, step_seconds: float, snapshot_seconds: float, every: int, recovery_seconds: float, mtbf_seconds: float
) -> float:
    """The expected share of the time that goes to steps that count. A failure costs the recovery, and half an interval."""
    interval = every * step_seconds
    lost_to_failures = (recovery_seconds + interval / 2) / mtbf_seconds
    return 1 / ((1 + snapshot_seconds / interval) * (1 + lost_to_failures))


def loss_rate(nodes: int, parity_shards: int, *, node_mtbf_seconds: float, window_seconds: float) -> float:
    """How often a group loses a generation: one node fails, and more than the parity allows in the window after it.

    The window is the time until the group is protected again. Failures are taken as independent.
    """
    rate = 1 / node_mtbf_seconds
    more = math.comb(nodes - 1, parity_shards) * min(1.0, rate * window_seconds) ** parity_shards
    return nodes * rate * more


def best_parity(
    hosts: Mapping[str, str], *, data_shards: int | None, node_bytes: float, memory_bytes: float,
    node_mtbf_seconds: float, window_seconds: float, loss_seconds: float,
) -> int:  # fmt: skip
    """The fewest parity shards with which lost generations cost next to nothing; 0 where memory has no room for one.

    hosts: node to host. node_bytes: of state; two generations of it with their parity must fit into `memory_bytes`.
    loss_seconds: what a lost generation costs, back to the last checkpoint.
    """
    best = 0
    for parity in range(1, MOST_PARITY + 1):
        groups = choose_groups(hosts, data_shards=data_shards, parity_shards=parity)
        if any(group.m < parity for group in groups):
            break
        if 2 * node_bytes * (1 + parity / min(group.k for group in groups)) > memory_bytes:
            break
        best = parity
        rates = [
            loss_rate(len(group.nodes), parity, node_mtbf_seconds=node_mtbf_seconds, window_seconds=window_seconds)
            for group in groups
        ]
        if sum(rates) * loss_seconds < NEGLIGIBLE:
            break
    return best


@dataclass(frozen=True, slots=True)
class Forecast:
    """What is expected of a run under failures, before anything is measured. `every` 0: no snapshots."""

    every: int
    step_seconds: float
    snapshot_seconds: float
    recovery_seconds: float
    node_mtbf_seconds: float
    effective_time: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
