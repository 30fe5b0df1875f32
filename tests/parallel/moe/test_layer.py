"""The mixture of experts against its definition: every token through its experts, one at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.parallel.moe.spreading import spread
from tests.ranks import run_ranks
from trainrt.config import MoeConfig
from trainrt.parallel.moe.layer import MoeLayer
from trainrt.parallel.moe.router import capacity

SIZES: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 12}
EXPERTS, TOP_K = 4, 2


def layer(factor: float = 0.0) -> MoeLayer:
    torch.manual_seed(0)
    made = MoeLayer(MoeConfig(experts=EXPERTS, top_k=TOP_K, capacity_factor=factor), **SIZES).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made


def by_definition(made: MoeLayer, x_TD: torch.Tensor, limit: int | None) -> torch.Tensor:
    """Each token in turn; an expert takes the first `limit` that choose it."""
    taken = [0] * EXPERTS
    probability_TE = F.linear(x_TD, made.router.weight).softmax(-1)
    out = torch.zeros_like(x_TD)
    for token, x in enumerate(x_TD):
        weights, chosen = probability_TE[token].topk(TOP_K)
        for weight, expert in zip(weights / weights.sum(), chosen.tolist(), strict=True):
            if limit is not None and taken[expert] >= limit:
                continue
            taken[expert] += 1
            e = made.experts
            inner = F.silu(e.gate_proj[expert] @ x) * (e.up_proj[expert] @ x)
            out[token] += weight * (e.down_proj[expert] @ inner)
    return out


@pytest.mark.parametrize(("factor", "limit"), [(0.0, None), (1.0, 10), (0.5, 5), (-0.5, 5), (-9.0, 90)])
def test_output_and_gradients_are_those_of_the_definition(factor: float, limit: int | None) -> None:
    made, x = layer(factor), torch.randn(2, 10, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert capacity(factor, tokens=20, top_k=2, experts=4) == limit
    y, numbers, _ = made(x)
    expected = by_definition(made, x.flatten(0, 1), limit).view_as(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(y.square().sum(), list(made.parameters()), retain_graph=True)
    theirs = torch.autograd.grad(expected.square().sum(), list(made.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    assert numbers.balance > 0 and numbers.z > 0


def test_capacity_that_drops_changes_the_output() -> None:
    """Negative control for the definition above."""
    x = torch.randn(1, 20, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(layer(0.0)(x)[0], layer(0.5)(x)[0])


def test_an_even_router_has_a_balance_loss_of_one_per_choice_and_a_skewed_one_more() -> None:
    made = layer()
    x = torch.randn(1, 4000, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        made.router.weight.mul_(1e-6)
        even = float(made(x)[1].balance)
        made.router.weight[0] += 5.0 * torch.sign(made.router.weight[0])
        skewed = float(made(x.abs())[1].balance)
    assert even == pytest.approx(1.0, abs=0.05)
    assert skewed > 1.1


def exchanged(rank: int, skew: bool) -> Any:
    """Two ranks, two experts each; with `skew` every token goes to expert 0, so rank 1 gets none."""

    from trainrt.parallel.moe.experts import local

    made = layer()
    if skew:
        with torch.no_grad():
            made.router.weight[0] += 50.0
            made.router.weight[1] += 40.0
    spread(made, "experts", 2)
    x = torch.randn(2, 5 + 3 * rank, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(rank)).abs()
    y = made(x)[0]
    y.square().sum().backward()
    return y.detach().numpy(), [local(parameter.grad).numpy() for parameter in made.experts.parameters()]


@pytest.mark.parametrize("skew", [False, True])
def test_experts_over_ranks_are_the_experts_of_one_process(skew: bool) -> None:
    results = run_ranks(2, exchanged, skew)
    made = layer()
    if skew:
        with torch.no_grad():
            made.router.weight[0] += 50.0
            made.router.weight[1] += 40.0
    for rank, (y, _) in enumerate(results):
        x = torch.randn(2, 5 + 3 * rank, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(rank)).abs()
        expected = made(x)[0]
        torch.testing.assert_close(torch.from_numpy(y), expected, rtol=1e-12, atol=1e-12)
        expected.square().sum().backward()
    for index, parameter in enumerate(made.experts.parameters()):
        spread = torch.cat([torch.from_numpy(results[rank][1][index]) for rank in range(2)])
        torch.testing.assert_close(spread, parameter.grad, rtol=1e-11, atol=1e-12)
