"""One layer of experts in doubles, and tokens for it: what tests of routing hold against its definition."""

from __future__ import annotations

import torch

from trainrt.config import MoeConfig
from trainrt.parallel.moe.layer import MoeLayer


def layer_of(config: MoeConfig) -> MoeLayer:
    """Of width 8 and inner width 12, with weights that are the same at every call."""
    torch.manual_seed(0)
    made = MoeLayer(config, hidden_size=8, intermediate_size=12).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made


def tokens_of(number: int) -> torch.Tensor:
    """(1, number, 8)."""
    return torch.randn(1, number, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
