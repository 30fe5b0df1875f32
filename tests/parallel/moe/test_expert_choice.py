"""Expert choice against its definition: every expert ranks the tokens and takes its best."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.jobs import engine, job, train
from tests.parallel.moe.routed import layer_of, tokens_of
from tests.ranks import run_ranks
from trainrt.config import MoeConfig
from trainrt.parallel.moe.layer import MoeLayer

EXPERTS, TOKENS = 4, 18
MOE = {"experts": EXPERTS, "top_k": 2, "routing": "expert_choice"}


def layer(factor: float, routing: str = "expert_choice") -> MoeLayer:
    config = MoeConfig(experts=EXPERTS, top_k=2, capacity_factor=factor, routing=routing)
    return layer_of(config)


def by_definition(made: MoeLayer, x_TD: torch.Tensor, taken: int) -> tuple[Any, set[int]]:
    """The output, and the tokens that some expert took."""
    probability_TE = F.linear(x_TD, made.router.weight).softmax(-1)
    out, seen = torch.zeros_like(x_TD), set()
    for expert in range(EXPERTS):
        order = sorted(range(TOKENS), key=lambda token: -probability_TE[token, expert].item())
        for token in order[:taken]:
            e, x = made.experts, x_TD[token]
            y = e.down_proj[expert] @ (F.silu(e.gate_proj[expert] @ x) * (e.up_proj[expert] @ x))
            out = out.index_add(0, torch.tensor([token]), (probability_TE[token, expert] * y).unsqueeze(0))
            seen.add(token)
    return out, seen


@pytest.mark.parametrize(("factor", "taken"), [(0.0, 9), (1.0, 5), (-1.5, 7), (9.0, TOKENS)])
def test_output_and_gradients_are_those_of_the_definition(factor: float, taken: int) -> None:
    """C = ceil(18 c / 4), c being top_k = 2 where no factor is given."""
    made, x = layer(factor), tokens_of(TOKENS)
    y, numbers, _ = made(x)
    expected, seen = by_definition(made, x[0], taken)
    torch.testing.assert_close(y[0], expected, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(y.square().sum(), list(made.parameters()), retain_graph=True)
    theirs = torch.autograd.grad(expected.square().sum(), list(made.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    assert float(numbers.dropped) == pytest.approx(1 - len(seen) / TOKENS) and float(numbers.load) == 1.0
    assert float(numbers.balance) == 0.0 and numbers.z > 0
    assert factor == 9.0 or not torch.allclose(y, layer(0.0, "top_k")(x)[0]), "negative control"


def test_an_earlier_token_depends_on_later_ones() -> None:
    """What the documentation warns of; with top-k routing it does not."""
    x = tokens_of(TOKENS)
    changed = torch.cat((x[:, :9], -2.0 * x[:, 9:]), 1)
    early = [torch.equal(made(x)[0][:, :9], made(changed)[0][:, :9]) for made in (layer(0.0), layer(0.0, "top_k"))]
    assert early == [False, True]


def curve(rank: int, mesh: dict[str, int]) -> list[tuple[float, float]]:
    config = job(mesh=mesh, model={"dtype": "float64"}, moe=MOE)
    return [(result.loss, result.grad_norm) for result in train(engine(config, rank), config, steps=3)]


@pytest.mark.parametrize("mesh", [{"tp": 2}, {"fsdp": 2, "ep": 2}], ids=str)
def test_meshes_are_the_single_process(mesh: dict[str, int]) -> None:
    (one,), found = run_ranks(1, curve, {}), run_ranks(2, curve, mesh)
    assert found[0] == found[1]
    assert found[0] == [pytest.approx(step, rel=1e-11) for step in one]
