"""Objectives: what a batch costs, as a sum and the weight to divide it by.

Sums, not means: the mean over the global batch is taken once, whatever the mesh.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainrt.config import JobConfig
from trainrt.parallel.sharded.model import full
from trainrt.training.models.moe_lm import LmOutput


class Loss(NamedTuple):
    """Sum of losses, weight (tokens), and auxiliary terms: name -> (mean over the weight, coefficient).

    statistics: means that are reported as auxiliary terms are, and learned from by nobody.
    """

    sum: Tensor
    weight: Tensor
    auxiliary: Mapping[str, tuple[Tensor, float]] = {}
    statistics: Mapping[str, Tensor] = {}

    def total(self) -> Tensor:
        """What is differentiated: the sum and, per token, the auxiliary terms."""
        total = self.sum
        for mean, coefficient in self.auxiliary.values():
            total = total + coefficient * mean * self.weight
        return total


LossFunction = Callable[[nn.Module, Mapping[str, Any]], Any]


def cross_entropy_sum(logits_BSV: Tensor, labels_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of token losses in fp32 at least, and the number of labels that are not -100."""
    precise = torch.promote_types(logits_BSV.dtype, torch.float32)
    logits = logits_BSV.flatten(0, 1).to(precise)
    loss = F.cross_entropy(logits, labels_BS.flatten(), ignore_index=-100, reduction="sum")
    return loss, (labels_BS != -100).sum().to(precise)


def causal(config: JobConfig) -> LossFunction:
    """Next-token prediction; labels come shifted from the data. Adds the router's losses and statistics of `moe_lm`."""
    moe = config.moe

    def loss(model: nn.Module, batch: Mapping[str, Any]) -> Loss:
        if config.model.kind == "huggingface":
            logits = model(input_ids=batch["input_ids"], use_cache=False).logits
            return Loss(*cross_entropy_sum(logits, batch["labels"]))
        output: LmOutput = model(batch["input_ids"])
        router = output.router
        auxiliary = {"balance_loss": (router.balance, moe.balance_loss), "z_loss": (router.z, moe.z_loss)}
        statistics = {"moe_dropped": router.dropped, "moe_load": router.load}
        return Loss(*cross_entropy_sum(output.logits, batch["labels"]), auxiliary, statistics)

    return loss


def evaluate_loss(function: LossFunction, model: nn.Module, batch: Mapping[str, Any]) -> Loss:
    """Call a loss function, ours or a user's (sum, weight)."""
    # Of a split model's outputs a loss may be a sum that is split too: outside it is a plain tensor.
    result = full(function(model, batch))
    if isinstance(result, Loss):
        return result
    total, weight = result
    return Loss(total, torch.as_tensor(weight, dtype=torch.float64, device=total.device))
