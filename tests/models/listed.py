"""A mixture whose experts are a list of modules, written as one would without a thought of parallelism.

Legend: B samples, S positions, D width, N rows, E experts, K choices.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainrt import Pipeline


class Expert(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x)))


class Mixture(nn.Module):
    """Calls an expert only if a row chose it: ranks do not agree on which are called."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(Expert(width, 2 * width) for _ in range(experts))

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_ND = x_BSD.flatten(0, 1)
        weight_NK, chosen_NK = self.gate(x_ND).softmax(-1).topk(2, -1)
        y_ND = torch.zeros_like(x_ND)
        for number, expert in enumerate(self.experts):
            row, choice = torch.where(chosen_NK == number)
            if len(row):
                y_ND = y_ND.index_add(0, row, expert(x_ND[row]) * weight_NK[row, choice].unsqueeze(1))
        return y_ND.view_as(x_BSD)


class Block(nn.Module):
    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.mixture = nn.LayerNorm(width), Mixture(width, experts)

    def forward(self, x_BSD: Tensor) -> Tensor:
        heads = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(self.norm(x_BSD)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        x_BSD = x_BSD + self.out(mixed.transpose(1, 2).flatten(-2))
        return x_BSD + self.mixture(self.norm2(x_BSD))


class Listed(nn.Module):
    def __init__(self, vocabulary: int = 64, width: int = 32, layers: int = 2, experts: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, experts) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids_BS: Tensor) -> Tensor:
        x_BSD = self.embed(ids_BS)
        for block in self.blocks:
            x_BSD = block(x_BSD)
        return self.head(x_BSD)


def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    logits, labels = model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten()
    return F.cross_entropy(logits, labels, reduction="sum"), (labels != -100).sum()


pipeline = Pipeline(model=Listed, loss=loss)
