"""Shared experts: one wide network is their sum, and meshes give the numbers of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.jobs import engine, job, train
from tests.ranks import run_ranks
from trainrt.config import MoeConfig
from trainrt.parallel.moe.layer import MoeLayer
from trainrt.parallel.plan import Plan
from trainrt.training.planning import place

MOE = {"experts": 4, "top_k": 2, "shared_experts": 2}
INNER = 12


def layer(shared: int) -> MoeLayer:
    made = MoeLayer(MoeConfig(experts=4, shared_experts=shared), hidden_size=8, intermediate_size=INNER).double()
    torch.manual_seed(0)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made


def test_the_output_is_the_mixture_and_the_sum_over_the_shared_experts() -> None:
    made, x = layer(2), torch.randn(1, 10, 8, dtype=torch.float64)
    wide = made.shared
    assert wide is not None
    total = layer(0)(x)[0]
    for expert in range(2):
        part = slice(expert * INNER, (expert + 1) * INNER)
        inner = F.silu(x @ wide.gate_proj.weight[part].T) * (x @ wide.up_proj.weight[part].T)
        total = total + inner @ wide.down_proj.weight[:, part].T
    torch.testing.assert_close(made(x)[0], total, rtol=1e-12, atol=1e-12)


def curve(rank: int, mesh: dict[str, int], moe: dict[str, Any]) -> list[tuple[float, float]]:
    config = job(mesh=mesh, model={"dtype": "float64"}, moe=moe)
    return [(result.loss, result.grad_norm) for result in train(engine(config, rank), config, steps=3)]


@pytest.fixture(scope="module")
def single() -> list[tuple[float, float]]:
    return run_ranks(1, curve, {}, MOE)[0]


def error(one: list[tuple[float, float]], other: list[tuple[float, float]]) -> float:
    return max(abs(a - b) / abs(b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("mesh", [{"tp": 2}, {"fsdp": 2, "ep": 2}, {"tp": 2, "fsdp": 2, "ep": 2}], ids=str)
def test_meshes_are_the_single_process(mesh: dict[str, int], single: list[tuple[float, float]]) -> None:
    ranks = mesh.get("tp", 1) * mesh.get("fsdp", 1)
    assert max(error(found, single) for found in run_ranks(ranks, curve, mesh, MOE)) < 1e-11


def test_without_them_the_numbers_are_others(single: list[tuple[float, float]]) -> None:
    """Negative control."""
    assert error(run_ranks(1, curve, {}, {**MOE, "shared_experts": 0})[0], single) > 1e-6


def cut_dims(plan: Plan) -> dict[str, int]:
    named = ((p.name.rpartition("shared.")[2], p.cuts) for p in plan.parameters if ".0.mlp.shared." in p.name)
    return {name: cut.dim for name, cuts in named for cut in cuts if cut.axis == "tp"}


def test_tensor_parallelism_splits_them() -> None:
    plan = place(job(mesh={"tp": 2}, moe=MOE), job(mesh={"tp": 2}).mesh())  # type: ignore[arg-type]
    assert cut_dims(plan) == {"gate_proj.weight": 0, "up_proj.weight": 0, "down_proj.weight": 1}
