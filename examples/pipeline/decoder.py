"""A language model of one's own, with a bias by distance and a gated network that looks back.

`trainrt launch examples/pipeline/decoder.toml` splits it over tensor-parallel ranks.

Legend: B samples, S positions, D width, H heads, C head width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainrt import Pipeline


class Attention(nn.Module):
    """One fused projection, a learned scale for each head, and a bias by distance."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.scale = nn.Parameter(torch.ones(heads, 1, 1))
        self.distance = nn.Embedding(64, heads)

    def forward(self, x_BSD: Tensor) -> Tensor:
        B, S, D = x_BSD.shape
        q, k, v = self.qkv(x_BSD).view(B, S, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        apart = torch.arange(S, device=x_BSD.device)
        apart = apart.unsqueeze(1) - apart
        scores = q @ k.transpose(-1, -2) * self.scale / (D // self.heads) ** 0.5
        scores = scores + self.distance(apart.clamp(0, 63)).permute(2, 0, 1)
        weights = scores.masked_fill(apart < 0, float("-inf")).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(B, S, D))


class Gated(nn.Module):
    """A gate and a value from one matrix; the value looks back over four positions."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * inner)
        self.look = nn.Conv1d(inner, inner, 4, groups=inner, padding=3)
        self.down = nn.Linear(inner, width)

    def forward(self, x_BSD: Tensor) -> Tensor:
        gate, value = self.up(x_BSD).chunk(2, -1)
        looked = self.look(value.transpose(1, 2))[..., : x_BSD.shape[1]].transpose(1, 2)
        return self.down(F.silu(gate) * looked)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(width), Attention(width, 8)
        self.norm2, self.mlp = nn.LayerNorm(width), Gated(width, 256)

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = x_BSD + self.mix(self.norm(x_BSD))
        return x_BSD + self.mlp(self.norm2(x_BSD))


class Decoder(nn.Module):
    def __init__(self, vocabulary: int = 320, width: int = 128, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, ids_BS: Tensor) -> Tensor:
        x_BSD = self.embed(ids_BS)
        for block in self.blocks:
            x_BSD = block(x_BSD)
        return F.linear(self.norm(x_BSD), self.embed.weight)


def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    logits = model(batch["input_ids"])
    labels = batch["labels"].flatten()
    return F.cross_entropy(logits.flatten(0, 1), labels, reduction="sum"), labels.numel()


pipeline = Pipeline(model=Decoder, loss=loss)
