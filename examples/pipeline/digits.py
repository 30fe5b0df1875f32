"""A pipeline of one's own: a small network that learns to add two digits. `trainrt launch examples/pipeline/job.toml`"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from trainrt import Pipeline


class Adder(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, width)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(2 * width, 2 * width), nn.GELU()) for _ in range(2))
        self.head = nn.Linear(2 * width, 19)

    def forward(self, pair: Tensor) -> Tensor:
        hidden = self.embed(pair).flatten(1)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return self.head(hidden)


class Sums:
    """All pairs of digits, a hundred times."""

    def __len__(self) -> int:
        return 10_000

    def __getitem__(self, index: int) -> tuple[int, int]:
        return index // 10 % 10, index % 10


def collate(samples: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    pair = torch.tensor(samples)
    return {"pair": pair, "sum": pair.sum(1)}


def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    return nn.functional.cross_entropy(model(batch["pair"]), batch["sum"], reduction="sum"), len(batch["sum"])


def predict(model: nn.Module, batch: Mapping[str, Tensor]) -> list[int]:
    return model(batch["pair"]).argmax(-1).tolist()


pipeline = Pipeline(model=Adder, samples=Sums, collate=collate, loss=loss, predict=predict)
