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
    if grouped_products(x_ND, gate_LFD):
        stop_L = torch.tensor(counts, device=x_ND.device).cumsum(0).to(torch.int32)
        gate_NF = F.grouped_mm(x_ND, gate_LFD.transpose(1, 2), offs=stop_L)
        up_NF = F.grouped_mm(x_ND, up_LFD.transpose(1, 2), offs=stop_L)
        return F.grouped_mm(F.silu(gate_NF) * up_NF, down_LDF.transpose(1, 2), offs=stop_L)
    outputs = []
    # Unbound and not indexed: the gradient of each index would be as large as all experts.
    for rows_ND, gate_FD, up_FD, down_DF in zip(
        x_ND.split(counts), gate_LFD.unbind(), up_LFD.unbind(), down_LDF.unbind(), strict=True
    ):
        outputs.append(F.linear(F.silu(F.linear(rows_ND, gate_FD)) * F.linear(rows_ND, up_FD), down_DF))
    return torch.cat(outputs)


def grouped_products(x_ND: Tensor, inner_LFD: Tensor) -> bool:
    """Whether one product for all experts takes these rows, and pays; otherwise each expert has its own.

    The kernel takes rows of whole 16 bytes in and out, and its backward needs a row at least. It has none for doubles; on
    CUDA it is one kernel for bfloat16 only.
    """
    dtype, device = x_ND.dtype, x_ND.device.type
    if device == "cuda":
        known = dtype == torch.bfloat16 and torch.cuda.get_device_capability(x_ND.device) >= (8, 0)
    else:
        known = device == "cpu" and dtype in (torch.float32, torch.bfloat16)
    whole = all(width * dtype.itemsize % 16 == 0 for width in inner_LFD.shape[1:])
    return known and whole and len(x_ND) > 0
