"""MoE++ against its definition, token by token, and what it spares the exchange."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.parallel.moe.spreading import spread
from tests.ranks import run_ranks
from trainrt.config import MoeConfig
from trainrt.parallel.moe.layer import MoeLayer
from trainrt.parallel.moe.zero_computation import Kinds, capacities

WIDTH, FFN, TOP_K, TAU = 8, 3, 2, 0.75
CONFIG = {"experts": FFN, "top_k": TOP_K, "zero_experts": 1, "copy_experts": 1, "constant_experts": 2, "tau": TAU}
KINDS = Kinds(FFN, 1, 1, 2)


def layer(factor: float = 0.0) -> MoeLayer:
    torch.manual_seed(0)
    made = MoeLayer(MoeConfig(**CONFIG, capacity_factor=factor), hidden_size=WIDTH, intermediate_size=12).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made


def tokens(number: int = 24, seed: int = 1) -> torch.Tensor:
    return torch.randn(1, number, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def one(made: MoeLayer, expert: int, x: torch.Tensor) -> torch.Tensor:
    """What an expert makes of a token (equations 3 to 5)."""
    if expert < FFN:
        e = made.experts
        return e.down_proj[expert] @ (F.silu(e.gate_proj[expert] @ x) * (e.up_proj[expert] @ x))
    if expert == FFN:
        return torch.zeros_like(x)
    if expert == FFN + 1:
        return x
    assert made.free is not None
    number = expert - FFN - 2
    a, b = (made.free.mixing[2 * number : 2 * number + 2] @ x).softmax(0)
    return a * x + b * made.free.vector[number]


def by_definition(made: MoeLayer, x_TD: Any, before: Any, limits: list[int] | None) -> tuple[Any, Any, Any]:
    """Output, balance loss and scores; an expert takes the first that choose it, up to its limit."""
    scores = F.linear(x_TD, made.router.weight) + before @ made.router.residual.T
    probability = scores.softmax(-1)
    taken, chosen_by, out = [0] * KINDS.all, [0] * KINDS.all, torch.zeros_like(x_TD)
    for token, x in enumerate(x_TD):
        weights, chosen = probability[token].topk(TOP_K)
        for weight, expert in zip(weights, chosen.tolist(), strict=True):
            chosen_by[expert] += 1
            if limits is None or taken[expert] < limits[expert]:
                taken[expert] += 1
                out[token] = out[token] + weight * one(made, expert, x)
    balance = sum(
        (1.0 if expert < FFN else TAU) * chosen_by[expert] / len(x_TD) * probability[:, expert].mean()
        for expert in range(KINDS.all)
    )
    return out, balance, scores


@pytest.mark.parametrize("factor", [0.0, 1.0, 0.5])
def test_output_balance_scores_and_gradients_are_those_of_the_definition(factor: float) -> None:
    made, x = layer(factor), tokens()
    before = torch.randn(24, KINDS.all, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    limits = None
    if factor:
        share = factor * 24 * TOP_K / (TAU * FFN + KINDS.free)
        limits = [-int(-TAU * share // 1)] * FFN + [-int(-share // 1)] * KINDS.free
    y, (balance, *_), scores = made(x, before)
    wanted, wanted_balance, wanted_scores = by_definition(made, x[0], before, limits)
    torch.testing.assert_close(y[0], wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(balance, wanted_balance, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(scores, wanted_scores, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(y.square().sum() + balance, list(made.parameters()), retain_graph=True)
    theirs = torch.autograd.grad(wanted.square().sum() + wanted_balance, list(made.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_capacity_is_shared_by_tau() -> None:
    """8 + 4 experts, tau 0.75: an FFN expert takes three quarters of what a zero-computation expert takes."""
    ffn, free = capacities(1.0, tokens=1000, top_k=2, kinds=Kinds(8, 2, 1, 1), tau=0.75)
    assert (ffn, free) == (150, 200) and 8 * 150 + 4 * 200 == 2 * 1000
    assert capacities(0.0, tokens=1000, top_k=2, kinds=Kinds(8, 4), tau=0.75) == (None, None)


def test_the_path_through_the_layer_before_matters() -> None:
    """Negative control for the gating residual."""
    made, x = layer(), tokens()
    first, second = made(x, None)[0], made(x, torch.ones(24, KINDS.all, dtype=torch.float64).cumsum(1))[0]
    assert not torch.allclose(first, second)


def exchanged(rank: int) -> tuple[int, int, int, float]:
    """Rows that this rank sent, that its tokens gave to FFN experts, choices in all; and the error against one process."""
    from trainrt.parallel.moe.exchange import Exchange
    from trainrt.parallel.moe.strategy import Strategy

    made, x = layer(), tokens(seed=rank)
    wanted = made(x)[0].detach()
    chosen = made.router(x[0]).rows.expert_N
    sent: list[int] = []
    plan = Exchange.plan.__func__

    def counted(cls: Any, *args: Any, **kwargs: Any) -> Exchange:
        found = plan(cls, *args, **kwargs)
        sent.append(int(found.rows_WW[rank].sum()))
        return found

    Exchange.plan = classmethod(counted)  # type: ignore[method-assign, assignment]
    spread(made, "experts", 3, Strategy(degree=2, backward_degree=2))
    error = float((made(x)[0] - wanted).norm() / wanted.norm())
    return sent[0], int((chosen < FFN).sum()), chosen.numel(), error


def test_rows_of_zero_computation_experts_are_not_exchanged() -> None:
    for sent, of_ffn, choices, error in run_ranks(3, exchanged):
        assert sent == of_ffn < choices and error < 1e-12
