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

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gate, up and down, as `swiglu` takes them."""
        return self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The same as a function of its weights."""
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def feed_forward(x_ND: Tensor, counts: list[int], weights: Sequence[Tensor]) -> Tensor:
    """Rows sorted by expert, each through its own network: `counts` rows for each of the stacked weights."""
    gate_LFD, up_LFD, down_LDF = weights
    return projected(gated(x_ND, counts, (gate_LFD, up_LFD)), counts, (down_LDF,))


def gated(x_ND: Tensor, counts: list[int], weights: Sequence[Tensor]) -> Tensor:
    """The first part of it, with the weights gate and up."""
    gate_LFD, up_LFD = weights
    return F.silu(_product(x_ND, counts, gate_LFD)) * _product(x_ND, counts, up_LFD)


def projected(inner_NF: Tensor, counts: list[int], weights: Sequence[Tensor]) -> Tensor:
    """The second part, with the weights down."""
    (down_LDF,) = weights
    return _product(inner_NF, counts, down_LDF)


def _product(x_NK: Tensor, counts: list[int], weight_LMK: Tensor) -> Tensor:
    """Rows of each expert with its matrix: in one product for all where that pays, else one after the other."""
    if grouped_products(x_NK, weight_LMK):
        stop_L = torch.tensor(counts, device=x_NK.device).cumsum(0).to(torch.int32)
        return F.grouped_mm(x_NK, weight_LMK.transpose(1, 2), offs=stop_L)
    # Unbound and not indexed: the gradient of each index would be as large as all experts.
    return torch.cat(
        [F.linear(rows, matrix) for rows, matrix in zip(x_NK.split(counts), weight_LMK.unbind(), strict=True)]
    )


def grouped_products(x_NK: Tensor, weight_LMK: Tensor) -> bool:
    """Whether one product for all experts takes these rows, and pays; otherwise each expert has its own.

    The kernel takes rows of whole 16 bytes in and out, and its backward needs a row at least. It has none for doubles; on
    CUDA it is one kernel for bfloat16 only.
    """
    dtype, device = x_NK.dtype, x_NK.device.type
    if device == "cuda":
        known = dtype == torch.bfloat16 and torch.cuda.get_device_capability(x_NK.device) >= (8, 0)
    else:
        known = device == "cpu" and dtype in (torch.float32, torch.bfloat16)
    whole = all(width * dtype.itemsize % 16 == 0 for width in weight_LMK.shape[1:])
    return known and whole and len(x_NK) > 0
