"""Mixtures on a mesh: their experts spread, and who says by which strategy each call is computed."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from trainrt.config import JobConfig, MeshSize
from trainrt.events import ring
from trainrt.parallel.collectives import all_gather
from trainrt.parallel.layout import ITEM_BYTES
from trainrt.parallel.mesh import Groups, make_expert_groups, places_on_host
from trainrt.parallel.moe.cost import Rates, Sizes, predict
from trainrt.parallel.moe.experts import layout_of
from trainrt.parallel.moe.form import ListedExperts
from trainrt.parallel.moe.layout import ExpertLayout
from trainrt.parallel.moe.parallel import spread_experts
from trainrt.parallel.moe.strategy import Chooser, Fixed, Lattice, Strategy
from trainrt.parallel.moe.tuner import Tuner
from trainrt.parallel.plan import Plan
from trainrt.parallel.profile import device_of, own_device
from trainrt.training.models.build import hidden_size_of


def spread_mixtures(
    model: nn.Module, plan: Plan, groups: Groups, config: JobConfig
) -> tuple[list[nn.Module], list[Tuner]]:
    """The modules of experts, of which each rank has its part now, and what tunes them. Every rank calls this."""
    if groups.experts is None:
        return [], []
    stacked = {name: form for name, form in plan.experts.items() if not isinstance(form, ListedExperts)}
    layouts = [layout_of(model.get_submodule(name), form, plan.mesh.ep) for name, form in stacked.items()]
    widths = sorted({width for layout in layouts for width in layout.widths})
    mesh = groups.experts["ep"]
    places = places_on_host(plan.mesh.ep, config.cluster.workers_per_node)
    between = make_expert_groups(plan.mesh, mesh, widths=widths, places=places)
    tuners: dict[Sizes, Tuner] = {}

    def chooser(module: nn.Module, layout: ExpertLayout) -> Chooser:
        sizes = _sizes(module, layout, places, config, hidden_size_of(config, model))
        again = config.model.activation_checkpointing
        open_ways = list(Lattice(layout, places, config.moe, apart=again))
        if len(open_ways) == 1:
            return Fixed(open_ways[0])
        if config.run.deterministic:
            return Fixed(_usual(replace(sizes, places=1), config, plan.mesh))
        if sizes not in tuners:
            tuners[sizes] = Tuner(open_ways, sizes, _rates_of_all(groups.device), between.ep, recomputed=again)
        return tuners[sizes]

    spread = spread_experts(
        model, plan.experts, mesh, between, tp=groups.tp, chooser=chooser,
        recomputed=config.model.activation_checkpointing, orders=plan.orders,
    )  # fmt: skip
    return spread, list(tuners.values())


def learn(tuners: list[Tuner], device: torch.device) -> None:
    """At the end of a step: all ranks learn what each observed."""
    with ring.span("tune_mixtures", kind="other"):
        for tuner in tuners:
            tuner.learn(
                all_gather(tuner.observed(device), dist.distributed_c10d._get_default_group(), axis="world").cpu()
            )


def recall(tuners: list[Tuner], documents: list[dict[str, Any]]) -> None:
    """What was learned before, where it was of the same sizes on as many ranks. Every rank calls this with the same."""
    for tuner in tuners:
        for document in documents:
            if document["sizes"] == asdict(tuner.sizes):
                tuner.restore(document)


def said(tuners: list[Tuner]) -> list[dict[str, Any]]:
    """By which strategies this rank's calls of the last step were computed, how many by each, and why."""
    return [
        {"strategy": str(strategy), "calls": calls, "why": why}
        for tuner in tuners for (strategy, why), calls in sorted(tuner.last.items())
    ]  # fmt: skip


def _sizes(module: nn.Module, layout: ExpertLayout, places: int, config: JobConfig, width: int) -> Sizes:
    """Of a module whose weights are whole still. A row's operations are two for each weight of its expert."""
    elements = sum(parameter.numel() for parameter in module.parameters()) // layout.experts
    item = ITEM_BYTES[config.model.dtype]
    return Sizes(replace(layout, order=None), places, width * item, elements * item, 2.0 * elements)


def _usual(sizes: Sizes, config: JobConfig, size: MeshSize) -> Strategy:
    """The strategy that is predicted to be fastest for an even load, from what is known of the kind of device: the same in every
    incarnation of a job, over whatever hosts its ranks are spread."""
    way = "linear" if config.moe.all_to_all == "auto" else config.moe.all_to_all
    strategies = Lattice(sizes.layout, sizes.places, config.moe.model_copy(update={"all_to_all": way}))
    rates = Rates.of(device_of("cpu" if config.cluster.device == "cpu" or not torch.cuda.is_available() else "h100"))
    key = sizes.even(config.data.microbatch * config.data.sequence_length * config.moe.top_k // size.tp)
    return min(strategies, key=lambda s: (sum(predict(key, s, sizes, rates, recomputed=False)), s))


def _rates_of_all(device: torch.device) -> Rates:
    """What one rank knows of its device, for all."""
    box = [Rates.of(own_device(device.type)) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, 0)
    assert box[0] is not None
    return box[0]
