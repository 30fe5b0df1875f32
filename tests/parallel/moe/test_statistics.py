"""What routers say of drops and load: the counts of the definition, and the same on any number of ranks."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.jobs import engine, job, train
from tests.ranks import run_ranks
from trainrt.config import MoeConfig
from trainrt.parallel.moe.layer import MoeLayer
from trainrt.parallel.moe.router import RouterNumbers

MOE = {"experts": 4, "top_k": 2, "capacity_factor": 0.75}


@pytest.mark.parametrize("factor", [0.0, 0.5, -0.5, 9.0])
def test_they_are_the_counts_of_the_definition(factor: float) -> None:
    torch.manual_seed(0)
    made = MoeLayer(MoeConfig(experts=4, top_k=2, capacity_factor=factor), hidden_size=8, intermediate_size=12)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(1, 20, 8)
    chosen = F.linear(x[0], made.router.weight).topk(2).indices.flatten().tolist()
    counts = Counter(chosen).values()
    limit = 20 * 2 if factor == 0 else round(abs(factor) * 20 * 2 / 4)
    dropped = sum(max(count - limit, 0) for count in counts)
    numbers = made(x)[1]
    assert float(numbers.dropped) == pytest.approx(dropped / 40, abs=1e-6) and (dropped > 0) == (abs(factor) == 0.5)
    assert float(numbers.load) == pytest.approx(max(counts) / 10) and max(counts) > 10
    assert not numbers.dropped.requires_grad and not numbers.load.requires_grad


def test_over_layers_losses_are_summed_and_statistics_averaged() -> None:
    one, three = (RouterNumbers(*(torch.tensor(value) for _ in range(4))) for value in (1.0, 3.0))
    assert [float(value) for value in RouterNumbers.over([one, three], torch.device("cpu"))] == [4.0, 4.0, 2.0, 2.0]
    assert [float(value) for value in RouterNumbers.over([], torch.device("cpu"))] == [0.0] * 4


def numbers(rank: int, mesh: dict[str, int], recomputed: bool, moe: dict[str, Any]) -> list[dict[str, float]]:
    model = {"dtype": "float64", "activation_checkpointing": recomputed}
    config = job(mesh=mesh, model=model, moe=moe)
    return [result.auxiliary for result in train(engine(config, rank), config, steps=2)]


@pytest.fixture(scope="module")
def single() -> list[dict[str, float]]:
    return run_ranks(1, numbers, {}, False, MOE)[0]


@pytest.mark.parametrize(
    ("mesh", "recomputed"), [({"fsdp": 3}, False), ({"tp": 2}, False), ({"fsdp": 2, "ep": 2}, True)]
)
def test_they_do_not_depend_on_the_mesh_nor_on_recomputing(
    mesh: dict[str, int], recomputed: bool, single: list[dict[str, float]]
) -> None:
    """Three ranks do not divide the four shards: dummies must not count."""
    for found in run_ranks(max(mesh.values()), numbers, mesh, recomputed, MOE):
        for step, expected in zip(found, single, strict=True):
            assert step == pytest.approx(expected, rel=1e-12)
    assert all(0.0 < step["moe_dropped"] < 1.0 < step["moe_load"] for step in single)


def test_another_capacity_is_noticed(single: list[dict[str, float]]) -> None:
    """Negative control."""
    other = run_ranks(1, numbers, {}, False, {**MOE, "capacity_factor": 0.5})[0]
    assert other[0]["moe_dropped"] > single[0]["moe_dropped"] and other[0]["moe_load"] == single[0]["moe_load"]
