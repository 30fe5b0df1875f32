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
from trainrt.parallel.moe.spread import Spread
from trainrt.parallel.moe.strategy import PLAIN, Strategy
from trainrt.parallel.planner.probe import Blueprint, hollow, source_of
from trainrt.parallel.sharded.owners import Owners, Split
from trainrt.parallel.sharded.tensor import Axis
from trainrt.parallel.verify import Verdict

WHOLE = {("vit", 4): 0.14}
"""What is not cut, where it is more than a tenth: the small model's patches and positions, which the residual reads whole."""

SHORT = ["qwen3", "falcon_mqa", "t5", "deepseek_v2", "gpt_oss", "mamba"]
STRATEGIES = [PLAIN, Strategy(r=0), Strategy(1, 2, 4), Strategy(1, 2, 2)]
MIXTURES = ["mixtral", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss", "dbrx"]
SPREAD = [(family, strategy) for family in MIXTURES for strategy in STRATEGIES]
SLICED = [(family, strategy) for family in MIXTURES for strategy in (*STRATEGIES, Strategy(2), Strategy(2, 2, 4))]
FEW_SLICED = [("mixtral", PLAIN), ("gpt_oss", Strategy(2, 2, 4)), ("gpt_oss", Strategy(r=0)), ("dbrx", Strategy(2))]
FEW = [("mixtral", STRATEGIES[0]), ("mixtral", STRATEGIES[1]), ("gpt_oss", STRATEGIES[2]), ("dbrx", STRATEGIES[0])]


def blueprint(family: str, experts: int | None = None) -> Blueprint:
    """A family's model as the planner takes it. Grouped products have no kernel for doubles."""

    def make() -> torch.nn.Module:
        with hollow():
            made = model(family, experts=experts)
        made.config._experts_implementation = "eager"
        return made

    return Blueprint(make, lambda made: loss(family, made, batch(family)), lambda: source_of(make()))


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


def spread(
    rank: int, family: str, strategy: Strategy = PLAIN, spoil: str = "", ranks: int = 2, experts: int | None = None
) -> tuple[Verdict, float]:  # fmt: skip
    """The verdict, and the share of the model that is experts."""
    from torch.distributed.device_mesh import init_device_mesh

    from trainrt.parallel.planner.experts import experts_of, find_experts
    from trainrt.parallel.verify import compare_experts

    if spoil == "order":
        Chunk.unsorted = lambda self, y: y  # type: ignore[method-assign]
    if spoil == "bias":
        Spread._some_slices = lambda self, name, held, r: held  # type: ignore[method-assign]
    plan = blueprint(family, experts)
    forms = find_experts(plan)
    made = plan.make()
    elements = sum(p.numel() for name in experts_of(made, forms) for p in made.get_submodule(name).parameters())
    share = elements / sum(p.numel() for p in made.parameters())
    return compare_experts(plan, forms, init_device_mesh("cpu", (ranks,)), strategy), share


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


@pytest.mark.parametrize("case", cases(SLICED, FEW_SLICED), ids=lambda case: f"{case[0]}: {case[1]}")
def test_experts_of_any_mixture_are_cut(case: tuple[str, Strategy]) -> None:
    """Two experts on four ranks. What is not cut, a bias after the last product, is on both ranks of its expert."""
    family, strategy = case
    verdict, share = run_ranks(4, spread, family, strategy, "", 4, 2)[0]
    assert verdict.right and verdict.gradient_error < 1e-12, verdict
    assert verdict.held == pytest.approx(1 - share * 3 / 4, abs=0.01)


def test_a_bias_that_is_added_by_every_slice_is_noticed() -> None:
    """Negative control: as though it were cut like the rest."""
    assert not run_ranks(4, spread, "gpt_oss", Strategy(2), "bias", 4, 2)[0][0].right


def test_rows_that_come_back_in_another_order_are_noticed() -> None:
    """Negative control for the exchange."""
    assert not run_ranks(2, spread, "mixtral", PLAIN, "order")[0][0].right


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
