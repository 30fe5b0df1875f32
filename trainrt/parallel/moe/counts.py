"""What routers chose, counted while training: rows from home ranks to experts, and from mixture to mixture.

A rank counts one logical shard a step, in its first forward pass alone: what activation checkpointing computes again during
backward is not counted again.

Legend: L mixtures, E their FFN experts, A all their experts, P places on ep, T tokens, K choices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from trainrt.config import MeshSize
from trainrt.parallel.collectives import all_gather, all_reduce
from trainrt.parallel.mesh import coordinates
from trainrt.parallel.moe.layer import MoeLayer
from trainrt.parallel.moe.router import Routing


@dataclass(frozen=True, slots=True)
class RoutingCounts:
    """The counts of all ranks. names: the modules of experts. traffic (L, P, E): rows from a place on ep to an expert.

    transitions (L - 1, E, E): of tokens, every choice in a mixture with every choice in the next one.
    """

    step: int
    names: tuple[str, ...]
    traffic: NDArray[np.int64]
    transitions: NDArray[np.int64]

    def to_json(self) -> dict[str, Any]:
        """The document of experts.json."""
        return {
            "step": self.step, "modules": list(self.names), "traffic": self.traffic.tolist(),
            "transitions": self.transitions.tolist(),
        }  # fmt: skip

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> RoutingCounts:
        traffic, transitions = (np.array(document[key], np.int64) for key in ("traffic", "transitions"))
        return cls(document["step"], tuple(document["modules"]), traffic, transitions)


class RoutingCounter:
    """The counts of this rank, taken where the model's mixtures are called inside `counting`."""

    def __init__(self, model: nn.Module, size: MeshSize, rank: int, device: torch.device) -> None:
        layers = {name: module for name, module in model.named_modules() if isinstance(module, MoeLayer)}
        self.names = tuple(f"{name}.experts" for name in layers)
        self._size, self._where, self._on = size, coordinates(size, rank), False
        self._before: Tensor | None = None
        kinds = {(layer.kinds.ffn, layer.kinds.all) for layer in layers.values()}
        # Mixtures of different sizes are a user's own model.
        self._kinds = kinds.pop() if len(kinds) == 1 else None
        if self._kinds is None:
            return
        ffn = self._kinds[0]
        self._traffic_LE = torch.zeros((len(layers), ffn), dtype=torch.int64, device=device)
        self._transitions_LEE = torch.zeros((len(layers) - 1, ffn, ffn), dtype=torch.int64, device=device)
        for index, layer in enumerate(layers.values()):
            layer.router.register_forward_hook(partial(self._chosen, index))
            layer.experts.register_forward_pre_hook(partial(self._sent, index))

    @contextmanager
    def counting(self, wanted: bool) -> Iterator[None]:
        """Count inside, if wanted."""
        self._on = wanted
        try:
            yield
        finally:
            self._on, self._before = False, None

    def _chosen(self, index: int, router: nn.Module, args: Any, routing: Routing) -> None:
        # Tensor-parallel ranks route the same tokens.
        if not self._on or self._where["tp"] or self._kinds is None:
            return
        ffn, every = self._kinds
        meets_TA = torch.zeros((len(args[0]), every), device=args[0].device)
        meets_TA[routing.rows.token_N, routing.rows.expert_N] = 1.0
        if self._before is not None:
            self._transitions_LEE[index - 1] += (self._before.T @ meets_TA)[:ffn, :ffn].to(torch.int64)
        self._before = meets_TA

    def _sent(self, index: int, experts: nn.Module, args: Any) -> None:
        if self._on:
            # Of rows that tensor-parallel ranks hold in common, sorted by expert, they send each other one in turn.
            end_E, turn, ranks = args[1].cumsum(0), self._where["tp"], self._size.tp
            until_E = (end_E - turn + ranks - 1) // ranks
            self._traffic_LE[index] += until_E.diff(prepend=until_E.new_zeros(1))

    def gather(self, step: int) -> RoutingCounts | None:
        """The counts of all ranks, which all call this; None where there is nothing to count.

        What was counted before weighs half from then on, so that the last steps say most.
        """
        if self._kinds is None:
            return None
        world = dist.distributed_c10d._get_default_group()
        of_rank_WLE = all_gather(self._traffic_LE, world, axis="world")
        transitions_LEE = all_reduce(self._transitions_LEE.clone(), world, axis="world")
        self._traffic_LE //= 2
        self._transitions_LEE //= 2
        of_place_PLE = of_rank_WLE.unflatten(0, (-1, self._size.ep)).sum(0)
        return RoutingCounts(
            step, self.names, of_place_PLE.transpose(0, 1).cpu().numpy(), transitions_LEE.cpu().numpy()
        )
