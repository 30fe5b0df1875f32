"""The plan of each family, derived without a word on it, run on real ranks: loss and every gradient of one process.

By default a few families that between them have every trap; all of them at tp 2 and 4 and the mixtures at ep 2 with
`--campaign`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.cases import cases
from tests.parallel.architectures import FAMILIES, batch, loss, model
from tests.ranks import run_ranks
from trainrt.errors import PlanError
from trainrt.parallel.moe.exchange import Chunk
from trainrt.parallel.moe.strategy import PLAIN, Strategy
from trainrt.parallel.planner.probe import Blueprint, hollow
from trainrt.parallel.sharded.owners import Owners, Split
from trainrt.parallel.sharded.tensor import Axis
from trainrt.parallel.verify import Verdict

WHOLE = {("vit", 4): 0.14}
"""What is not cut, where it is more than a tenth: the small model's patches and positions, which the residual reads whole."""

SHORT = ["qwen3", "falcon_mqa", "t5", "deepseek_v2", "gpt_oss", "mamba"]
STRATEGIES = [PLAIN, Strategy(r=0), Strategy(1, 2, 4), Strategy(1, 2, 2)]
MIXTURES = ["mixtral", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss", "dbrx"]
SPREAD = [(family, strategy) for family in MIXTURES for strategy in STRATEGIES]
FEW = [("mixtral", STRATEGIES[0]), ("mixtral", STRATEGIES[1]), ("gpt_oss", STRATEGIES[2]), ("dbrx", STRATEGIES[0])]


def blueprint(family: str) -> Blueprint:
    """A family's model as the planner takes it. Grouped products have no kernel for doubles."""

    def make() -> torch.nn.Module:
        with hollow():
            made = model(family)
        made.config._experts_implementation = "eager"
        return made

    return Blueprint(make, lambda made: loss(family, made, batch(family)), lambda: family)


def split(rank: int, family: str, ranks: int, spoil: str = "") -> Verdict:
    from torch.distributed.device_mesh import init_device_mesh

    from trainrt.parallel.planner.sharding import find_sharding
    from trainrt.parallel.verify import compare_split

    plan = blueprint(family)
    sharding = find_sharding(plan, ranks)
    if spoil == "gradients":
        Axis.enter = lambda self, tensor: tensor  # type: ignore[method-assign]
    if spoil == "heads":
        name = next(name for name, cut in sharding.splits.items() if "q_proj" in name)
        turned = Split(sharding.splits[name].dim, Owners(sharding.splits[name].owners.array[::-1], ranks))
        sharding = replace(sharding, splits={**sharding.splits, name: turned})
    return compare_split(plan, sharding, init_device_mesh("cpu", (ranks,)))


def spread(rank: int, family: str, strategy: Strategy = PLAIN, spoil: bool = False) -> tuple[Verdict, float]:
    """The verdict, and the share of the model that is experts."""
    from torch.distributed.device_mesh import init_device_mesh

    from trainrt.parallel.planner.experts import experts_of, find_experts
    from trainrt.parallel.verify import compare_experts

    if spoil:
        Chunk.unsorted = lambda self, y: y  # type: ignore[method-assign]
    plan = blueprint(family)
    forms = find_experts(plan)
    made = plan.make()
    experts = sum(p.numel() for name in experts_of(made, forms) for p in made.get_submodule(name).parameters())
    share = experts / sum(p.numel() for p in made.parameters())
    return compare_experts(plan, forms, init_device_mesh("cpu", (2,)), strategy), share


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.campaign)])
@pytest.mark.parametrize("family", cases(list(FAMILIES), SHORT))
def test_tensor_parallelism_is_the_single_process(family: str, ranks: int) -> None:
    verdict = run_ranks(ranks, split, family, ranks)[0]
    assert verdict.right, verdict
    assert verdict.held <= 1 / ranks + WHOLE.get((family, ranks), 0.1)


@pytest.mark.parametrize("case", cases(SPREAD, FEW), ids=lambda case: f"{case[0]}: {case[1]}")
def test_experts_of_any_mixture_are_spread(case: tuple[str, Strategy]) -> None:
    verdict, share = run_ranks(2, spread, *case)[0]
    assert verdict.right, verdict
    assert verdict.held == pytest.approx(1 - share / 2) and share > 0.2


def test_rows_that_come_back_in_another_order_are_noticed() -> None:
    """Negative control for the exchange."""
    assert not run_ranks(2, spread, "mixtral", PLAIN, True)[0][0].right


def test_a_plan_that_does_not_fit_is_slow_and_not_wrong() -> None:
    """Each rank gets the other's query heads: what does not meet is gathered, and counted."""
    verdict = run_ranks(2, split, "llama", 2, "heads")[0]
    assert verdict.right and verdict.gathered


def test_a_gradient_that_is_not_summed_is_noticed() -> None:
    """Negative control: what flows into a split region gets one rank's gradient only."""
    verdict = run_ranks(2, split, "llama", 2, "gradients")[0]
    assert verdict.loss_error < 1e-12 and not verdict.right
    with pytest.raises(PlanError, match="norm"):
        verdict.require("parallel.tp = 2")
