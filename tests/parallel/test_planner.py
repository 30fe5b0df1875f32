"""Plans of small modules of a user's own, each with something that no list of families is sure to have."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.ranks import run_ranks
from trainrt.parallel.planner.probe import Blueprint, hollow
from trainrt.parallel.verify import Verdict


class Scaled(nn.Module):
    """A parameter without dimensions beside split channels."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)) * self.scale)


class Chosen(nn.Module):
    """One number of a weight, taken out of it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32, bias=False), nn.Linear(32, 8, bias=False)
        self.mix = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mix[0] + self.down(self.up(x).relu() * self.mix[1]) + self.mix[2]


MODULES = {"a scalar parameter": Scaled, "numbers of a vector": Chosen}


def compared(rank: int, kind: str) -> Verdict:
    from torch.distributed.device_mesh import init_device_mesh

    from trainrt.parallel.planner.sharding import find_sharding
    from trainrt.parallel.verify import compare_split

    def make() -> nn.Module:
        with hollow():
            return MODULES[kind]()

    def loss(model: nn.Module) -> Tensor:
        dtype = next(model.parameters()).dtype
        return model(torch.linspace(-1, 1, 24, dtype=dtype).view(3, 8)).square().sum()

    plan = Blueprint(make, loss, lambda: kind)
    return compare_split(plan, find_sharding(plan, 2), init_device_mesh("cpu", (2,)))


@pytest.mark.parametrize("kind", MODULES)
def test_it_is_split_and_right(kind: str) -> None:
    verdict = run_ranks(2, compared, kind)[0]
    assert verdict.right and not verdict.gathered, verdict
    assert verdict.held < 0.6
