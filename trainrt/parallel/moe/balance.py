"""Balance without an auxiliary loss: after each step the biases of the routers move against the load of that step.

arXiv 2408.15664, algorithm 1 (DeepSeek-V3, arXiv 2412.19437, section 2.1.2): b_e += rate * sign(mean load - load of e). The load
is counted over the global batch. Counts are whole numbers, so their sum is the same in any order, on any mesh.

Legend: R routers, E experts.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainrt.parallel.collectives import all_reduce
from trainrt.parallel.moe.router import Router
from trainrt.parallel.sharded.model import full


class BiasBalance:
    """The biases of a model's routers, and how many rows of a step chose each expert on this rank."""

    def __init__(self, model: nn.Module, *, rate: float) -> None:
        self._routers = [module for module in model.modules() if isinstance(module, Router) and module.bias is not None]
        self._rate = rate
        self._load_RE: Tensor | None = None

    def count(self) -> None:
        """Add the last forward pass: once for each logical shard, on one of the ranks that compute it."""
        if self._routers:
            chosen_RE = torch.stack([full(router.chosen_E) for router in self._routers])
            self._load_RE = chosen_RE if self._load_RE is None else self._load_RE + chosen_RE

    @torch.no_grad()
    def move(self, group: dist.ProcessGroup) -> None:
        """Sum the counts over all ranks and move every bias, on each rank alike."""
        if not self._routers:
            return
        biases = [router.bias for router in self._routers if router.bias is not None]
        load_RE = self._load_RE
        if load_RE is None:
            load_RE = torch.zeros((len(biases), len(biases[0])), dtype=torch.int64, device=biases[0].device)
        load_RE = all_reduce(load_RE, group, axis="world")
        # sign(mean - load), in whole numbers.
        direction_RE = (load_RE.sum(-1, keepdim=True) - load_RE.shape[-1] * load_RE).sign()
        for bias_E, direction_E in zip(biases, direction_RE, strict=True):
            bias_E += self._rate * direction_E.to(bias_E.dtype)

    def forget(self) -> None:
        """The next step is counted from nothing."""
        self._load_RE = None
