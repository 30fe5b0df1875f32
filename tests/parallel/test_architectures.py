"""The plan of each family, derived without a word on it, run on real ranks: loss and every gradient of one process.

By default a few families that between them have every trap; all of them at tp 2 and 4 and the mixtures at ep 2 with
`--campaign`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.cases import cases
from tests.parallel.architectures import FAMILIES, batch, loss, model
from tests.ranks import run_ranks
from trainrt.config import MeshSize
from trainrt.errors import PlanError
from trainrt.parallel.moe.exchange import Chunk
from trainrt.parallel.moe.parallel import SliceBySlice
from trainrt.parallel.moe.spread import Spread
from trainrt.parallel.moe.strategy import PLAIN, Strategy
from trainrt.parallel.planner.derive import derive
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


def sliced(rank: int, family: str, ranks: int, spoil: bool = False) -> Verdict:
    from torch.distributed.device_mesh import init_device_mesh

    from trainrt.parallel.planner.experts import find_experts
    from trainrt.parallel.verify import compare_slices

    if spoil:
        cut = SliceBySlice._slice
        SliceBySlice._slice = lambda self, name, whole, number: (  # type: ignore[method-assign]
            cut(self, name, whole, number) if name in self.slices else whole
        )
    plan = blueprint(family)
    return compare_slices(plan, find_experts(plan), init_device_mesh("cpu", (1,)), ranks)


@pytest.mark.parametrize("case", cases([(f, n) for f in MIXTURES for n in (8, 16)], [("gpt_oss", 16), ("dbrx", 8)]))
def test_slices_for_more_ranks_than_there_are_add_up(case: tuple[str, int]) -> None:
    verdict = run_ranks(1, sliced, *case)[0]
    assert verdict.right and verdict.gradient_error < 1e-12, verdict


def test_a_weight_that_all_slices_add_is_noticed() -> None:
    """Negative control for what a launch verifies: the plan is refused."""
    verdict = run_ranks(1, sliced, "gpt_oss", 16, True)[0]
    with pytest.raises(PlanError, match="is not right"):
        verdict.require("parallel.ep = 16")


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "dbrx"])
def test_ranks_with_slices_hold_and_count_each_element_once(family: str) -> None:
    """Over ep 4 x efsdp 2, with two experts: each element is on one rank, or on all of its expert's with the same efsdp."""
    plan = blueprint(family, 2)
    size = MeshSize(fsdp=8, ep=4)
    for parameter in derive(plan.make(), size, plan).parameters:
        if ".experts." not in parameter.name:
            continue
        held = np.zeros((2, *parameter.shape), np.int64)
        for rank in range(size.world_size):
            mine = np.ix_(
                *(np.concatenate([np.arange(a, a + n) for a, n in s]) for s in parameter.held(size, rank).spans)
            )
            held[0][mine] += 1
            part, counted = parameter.counted(size, rank), list(mine)
            if part is not None:
                counted[part[0]] = mine[part[0]].take(np.array(part[1], np.int64), part[0])
            held[1][tuple(counted)] += 1
        assert (held[0] == (2 if "down_proj_bias" in parameter.name else 1)).all()
        assert (held[1] == 1).all()


def test_experts_that_cannot_be_cut_are_refused_by_name() -> None:
    plan = blueprint("mixtral", 2)
    with pytest.raises(
        PlanError, match=r"the 2 experts of model\.layers\.0\.mlp\.experts into 3 slices.*allowed: 1 to 2"
    ):
        derive(plan.make(), MeshSize(fsdp=6, ep=6), plan)
    with pytest.raises(PlanError, match=r"ep = 3 is more than the 2 experts .*allowed: 1, 2"):
        derive(plan.make(), MeshSize(fsdp=3, ep=3), plan)


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
