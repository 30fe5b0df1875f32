"""A list of expert modules over ep: found by data flow, gathered, right to the last digit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.models.listed import Listed, loss
from tests.ranks import run_ranks
from trainrt.parallel.moe.form import ListedExperts
from trainrt.parallel.planner.experts import find_experts
from trainrt.parallel.planner.probe import Blueprint, hollow
from trainrt.parallel.verify import Verdict

IDS = torch.arange(16).view(2, 8) % 13


def blueprint(make: type[nn.Module] = Listed) -> Blueprint:
    def hollowed() -> nn.Module:
        with hollow():
            return make()

    def run(model: nn.Module) -> Tensor:
        return loss(model, {"input_ids": IDS, "labels": IDS.roll(-1, 1)})[0]

    return Blueprint(hollowed, run, lambda: make.__name__)


def test_the_list_is_found_and_the_layers_are_not_taken_for_one() -> None:
    assert find_experts(blueprint()) == {"blocks.*.mixture.experts": ListedExperts(4)}


class Chained(Listed):
    """Its mixtures' modules run one after the other."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.mixture.forward = lambda x, mixture=block.mixture: self.chain(mixture, x)

    @staticmethod
    def chain(mixture: nn.Module, x: Tensor) -> Tensor:
        share = mixture.gate(x).softmax(-1)
        for number, module in enumerate(mixture.experts):
            x = x + module(x) * share[..., number : number + 1]
        return x


def test_modules_that_read_what_another_made_are_no_experts() -> None:
    assert find_experts(blueprint(Chained)) == {}


def compared(rank: int, ranks: int, spoil: bool) -> Verdict:
    from torch.distributed.device_mesh import init_device_mesh

    from trainrt.parallel.moe.listed import GatherExperts
    from trainrt.parallel.verify import compare_experts

    if spoil:
        backward = GatherExperts.backward
        GatherExperts.backward = staticmethod(  # type: ignore[method-assign]
            lambda ctx, *grads: tuple(g if g is None else g / 2 for g in backward(ctx, *grads))
        )
    return compare_experts(blueprint(), find_experts(blueprint()), init_device_mesh("cpu", (ranks,)))


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.campaign), 4])
def test_it_is_the_single_process(ranks: int) -> None:
    verdict = run_ranks(ranks, compared, ranks, False)[0]
    assert verdict.right and verdict.gradient_error < 1e-12, verdict
    assert verdict.held < 0.7


def test_a_gradient_that_is_scaled_is_noticed() -> None:
    """Negative control."""
    assert not run_ranks(2, compared, 2, True)[0].right
