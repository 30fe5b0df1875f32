"""Which experts each rank is given when a plan is made, by what the run directory's counts say (docs/moe.md)."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import numpy as np

from trainrt.config import JobConfig, MeshSize
from trainrt.parallel.moe.counts import RoutingCounts
from trainrt.parallel.moe.layout import NO_ORDERS, ExpertLayout, Orders
from trainrt.parallel.moe.placement import cost_of_traffic, place_by_traffic
from trainrt.parallel.plan import Plan
from trainrt.run_dir import RunDir, read_json


def by_affinity(config: JobConfig, plan: Plan, *, seconds: float) -> tuple[Orders, dict[str, Any]]:
    """The orders for the plan's mesh, found within so many seconds, with what they are expected to save; or none, and why."""
    if config.moe.placement == "none" or plan.mesh.ep == 1:
        return NO_ORDERS, {}
    document = read_json(RunDir(config.run.directory.format(name=config.run.name)).experts)
    if document is None:
        return NO_ORDERS, {"passed_over": "nothing is counted yet"}
    counts = RoutingCounts.from_json(document)
    layout = ExpertLayout(config.moe.experts, plan.mesh.ep)
    own = tuple(name for name, form in plan.experts.items() if form is None)
    if own != counts.names or counts.traffic.shape[2] != layout.experts:
        return NO_ORDERS, {"passed_over": "what is counted is of another model"}
    if layout.slices > 1:
        return NO_ORDERS, {"passed_over": "each rank holds a slice of an expert"}
    traffic_LPE = counts.traffic.astype(float)
    as_counted = traffic_LPE.shape[1] == layout.ranks
    if not as_counted:
        # Whose rows these will be is not known: what is left is how many each expert gets.
        traffic_LPE = np.repeat(traffic_LPE.sum(1, keepdims=True) / layout.ranks, layout.ranks, 1)
    hosts = hosts_of_places(plan.mesh, config.cluster.workers_per_node)
    in_order = tuple(range(layout.experts))
    found = place_by_traffic(list(traffic_LPE), layout, hosts, seconds=seconds)
    before = cost_of_traffic(list(traffic_LPE), [in_order] * len(own), layout, hosts)
    after = cost_of_traffic(list(traffic_LPE), found.orders, layout, hosts)
    figures = dict(zip(("rows_across_hosts", "rows_across_ranks", "rows_of_busiest"),
                       map(list, zip(astuple(before), astuple(after), strict=True)), strict=True))  # fmt: skip
    placement = {"counted_until_step": counts.step, "homes_known": as_counted, "optimal": found.exact, **figures}
    moved = {name: order for name, order in zip(own, found.orders, strict=True) if order != in_order}
    return moved, placement


def hosts_of_places(size: MeshSize, workers_per_node: int) -> tuple[int, ...]:
    """For each place on ep the number of its host. Two places are on one host where they are so in every group of ep."""
    seats = np.arange(size.world_size).reshape(-1, size.ep) // workers_per_node
    numbers: dict[tuple[int, ...], int] = {}
    return tuple(numbers.setdefault(tuple(column), len(numbers)) for column in seats.T.tolist())
