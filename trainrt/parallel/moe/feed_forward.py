"""SwiGLU (arXiv 2002.05202), of one network and of several whose weights are stacked.

Legend: N rows, D width, F inner width, L experts here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FeedForward(nn.Module):
    """One network, for every token. `forward` takes (..., D) and returns the same."""

    def __init__(self, *, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def feed_forward(x_ND: Tensor, counts: list[int], weights: Sequence[Tensor]) -> Tensor:
    """Rows sorted by expert, each through its own network: `counts` rows for each of the stacked weights."""
    gate_LFD, up_LFD, down_LDF = weights
    outputs = []
    for expert, rows_ND in enumerate(x_ND.split(counts)):
        inner = F.silu(F.linear(rows_ND, gate_LFD[expert])) * F.linear(rows_ND, up_LFD[expert])
        outputs.append(F.linear(inner, down_LDF[expert]))
    return torch.cat(outputs)
