"""One grouped product for all experts is the experts one by one, and is left to those where the kernel does not take it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.jobs import engine, job, train
from tests.ranks import run_ranks
from trainrt.parallel.moe import feed_forward as module
from trainrt.parallel.moe.feed_forward import feed_forward, grouped_products

WIDTH, INNER = 16, 24
COUNTS = {"uneven": [5, 1, 9], "empty experts": [0, 7, 0], "one row": [0, 0, 1], "no rows": [0, 0, 0]}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


def problem(counts: list[int], dtype: torch.dtype, device: str = "cpu", inner: int = INNER) -> list[torch.Tensor]:
    """Rows, the three weights, and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    shapes = [
        (sum(counts), WIDTH),
        *[(len(counts), inner, WIDTH)] * 2,
        (len(counts), WIDTH, inner),
        (sum(counts), WIDTH),
    ]
    return [torch.randn(shape, generator=generator).to(device, dtype) * 0.5 for shape in shapes]


def gradients(function: Any, counts: list[int], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    x, *weights, outer = (tensor.clone().requires_grad_() for tensor in tensors)
    y = function(x, counts, weights)
    return [y.detach(), *torch.autograd.grad(y, [x, *weights], outer.detach())]


def one_by_one(x: torch.Tensor, counts: list[int], weights: list[torch.Tensor]) -> torch.Tensor:
    gate, up, down = weights
    rows = x.split(counts)
    return torch.cat([F.silu(r @ gate[e].T) * (r @ up[e].T) @ down[e].T for e, r in enumerate(rows)])


def error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    scale = max(float(tensor.norm()) for tensor in expected)
    return max(
        float((a.double() - b.double()).norm()) / max(float(b.norm()), 1e-3 * scale, 1e-9)
        for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.bfloat16, 2e-2), (torch.float64, 1e-12)]
)
@pytest.mark.parametrize("rows", COUNTS)
def test_output_and_gradients_are_those_of_the_experts_one_by_one(
    rows: str, dtype: torch.dtype, tolerance: float, device: str
) -> None:
    tensors = problem(COUNTS[rows], dtype, device)
    found = gradients(feed_forward, COUNTS[rows], tensors)
    assert all(tensor.dtype == dtype for tensor in found)
    assert error(found, gradients(one_by_one, COUNTS[rows], tensors)) < tolerance


def test_rows_of_another_expert_are_noticed() -> None:
    """Negative control."""
    tensors = problem([5, 1, 9], torch.bfloat16)
    assert error(gradients(feed_forward, [6, 0, 9], tensors), gradients(one_by_one, [5, 1, 9], tensors)) > 0.1


@pytest.mark.parametrize(
    ("dtype", "inner", "counts", "expected"),
    [
        (torch.float32, 24, [2, 3], True), (torch.bfloat16, 24, [2, 3], True), (torch.float64, 24, [2, 3], False),
        (torch.float32, 22, [2, 3], False), (torch.bfloat16, 20, [2, 3], False), (torch.float32, 24, [0, 0], False),
    ],
)  # fmt: skip
def test_where_the_kernel_does_not_take_them_each_expert_has_its_own(
    dtype: torch.dtype, inner: int, counts: list[int], expected: bool
) -> None:
    tensors = problem(counts, dtype, inner=inner)
    assert grouped_products(tensors[0], tensors[1]) == expected
    assert error(gradients(feed_forward, counts, tensors), gradients(one_by_one, counts, tensors)) < 2e-2


def curve(rank: int, mesh: dict[str, int], grouped: bool) -> list[tuple[float, float]]:
    if not grouped:
        module.grouped_products = lambda *_: False
    config = job(mesh=mesh)
    return [(result.loss, result.grad_norm) for result in train(engine(config, rank), config, steps=3)]


@pytest.mark.parametrize("mesh", [{"tp": 2}, {"fsdp": 2, "ep": 2}], ids=str)
def test_meshes_with_grouped_products_follow_one_process_without(mesh: dict[str, int]) -> None:
    """In float32, which the kernel takes; under tp each rank has half of every expert's width."""
    (one,), found = run_ranks(1, curve, {}, False), run_ranks(2, curve, mesh, True)
    assert found[0] == [pytest.approx(step, rel=1e-5) for step in one]
