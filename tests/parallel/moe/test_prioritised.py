"""Batch-prioritised routing against its definition: an expert takes the rows that want it most."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.parallel.moe.routed import layer_of, tokens_of
from trainrt.config import MoeConfig
from trainrt.parallel.moe.layer import MoeLayer
from trainrt.parallel.moe.router import capacity

EXPERTS, TOKENS = 4, 20


def layer(factor: float, top_k: int, *, prioritised: bool = True, **moe: int) -> MoeLayer:
    config = MoeConfig(experts=EXPERTS, top_k=top_k, capacity_factor=factor, prioritised=prioritised, **moe)
    return layer_of(config)


def by_definition(made: MoeLayer, x_TD: torch.Tensor, top_k: int, limit: int) -> Any:
    """Each expert in turn ranks the tokens that chose it, and takes the first `limit`."""
    probability_TE = F.linear(x_TD, made.router.weight).softmax(-1)
    chosen = [probability_TE[token].topk(top_k).indices.tolist() for token in range(TOKENS)]
    out = torch.zeros_like(x_TD)
    for expert in range(EXPERTS):
        wanting = [token for token in range(TOKENS) if expert in chosen[token]]
        wanting.sort(key=lambda token: -probability_TE[token, expert].item())
        for token in wanting[:limit]:
            e, x = made.experts, x_TD[token]
            y = e.down_proj[expert] @ (F.silu(e.gate_proj[expert] @ x) * (e.up_proj[expert] @ x))
            weight = probability_TE[token, expert] / probability_TE[token, chosen[token]].sum()
            out = out.index_add(0, torch.tensor([token]), (weight * y).unsqueeze(0))
    return out


@pytest.mark.parametrize(("factor", "top_k"), [(0.5, 2), (-0.5, 2), (0.6, 1)])
def test_output_and_gradients_are_those_of_the_definition(factor: float, top_k: int) -> None:
    made, x = layer(factor, top_k), tokens_of(TOKENS)
    limit = capacity(factor, tokens=TOKENS, top_k=top_k, experts=EXPERTS)
    assert limit is not None
    y, numbers, _ = made(x)
    expected = by_definition(made, x[0], top_k, limit).unsqueeze(0)
    assert numbers.dropped > 0
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    parameters = [p for p in made.parameters() if top_k > 1 or p is not made.router.weight]
    ours = torch.autograd.grad(y.square().sum(), parameters)
    theirs = torch.autograd.grad(expected.square().sum(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_the_order_of_the_batch_does_not_say_who_is_dropped() -> None:
    """And without priorities it does: the negative control."""
    x, reverse = tokens_of(TOKENS), torch.arange(TOKENS - 1, -1, -1)
    made, plain = layer(0.5, 2), layer(0.5, 2, prioritised=False)
    torch.testing.assert_close(made(x[:, reverse])[0], made(x)[0][:, reverse], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(plain(x[:, reverse])[0], plain(x)[0][:, reverse])


def test_as_many_are_dropped_as_without_priorities_of_every_kind_of_expert() -> None:
    free = {"zero_experts": 1, "copy_experts": 1, "constant_experts": 1}
    for more in ({}, free):
        one, other = (layer(0.5, 2, prioritised=p, **more)(tokens_of(TOKENS)) for p in (True, False))
        assert one[1].dropped == other[1].dropped > 0 and not torch.equal(one[0], other[0])
