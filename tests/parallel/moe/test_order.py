"""Experts that are held in another order: the mixture stays the same, on every strategy, and so does what is saved of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.jobs import job
from tests.parallel.moe.spreading import spread
from tests.parallel.moe.test_flex import gradients, of_one_process, problem
from tests.ranks import run_ranks
from tests.state import Trained
from trainrt.errors import PlanError
from trainrt.parallel.moe.form import ExpertsForm
from trainrt.parallel.moe.layout import ExpertLayout
from trainrt.parallel.moe.strategy import Strategy
from trainrt.training.planning import place

ORDER = (4, 1, 6, 0, 5, 2, 3)
CASES = [
    (rows, strategy)
    for rows in ("uneven", "empty experts", "a rank without rows", "no rows at all")
    for strategy in (Strategy(), Strategy(0), Strategy(1, 2, 2), Strategy(1, 1, 2))
]


def worst_error(rank: int, ranks: int, order: Any, weights_of: Any) -> float:
    """The largest relative error of output and gradients. Spread by `order`; `weights_of`: that of what is expected."""
    from trainrt.parallel.moe.parallel import share_of

    worst = 0.0
    for rows, strategy in CASES:
        dense, inputs, counts, weights = problem(len(ORDER), rows, ranks, torch.float64)
        expected = of_one_process(dense, inputs, counts, weights, rank)
        layout = ExpertLayout(len(ORDER), ranks, weights_of)
        expected[2:] = [share_of(g, layout, rank, None) for g in expected[2:]]
        dense.zero_grad()
        holder = torch.nn.ModuleDict({"experts": dense})
        spread(holder, "experts", ranks, strategy, order)
        found = gradients(dense, inputs[rank], counts[rank], weights[rank])
        for got, wanted in zip(found, expected, strict=True):
            worst = max(worst, float((got - wanted).norm()) / max(float(wanted.norm()), 1e-3))
    return worst


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_mixture_is_that_of_one_process(ranks: int) -> None:
    assert max(run_ranks(ranks, worst_error, ranks, ORDER, ORDER)) <= 1e-12


def test_another_order_is_another_mixture() -> None:
    """Negative control: gradients of the experts that a rank would hold by another order."""
    assert max(run_ranks(2, worst_error, 2, ORDER, (*ORDER[1:], ORDER[0]))) > 1e-3


def test_a_layout_with_an_order() -> None:
    layout = ExpertLayout(7, 3, ORDER)
    assert [layout.held(rank) for rank in range(3)] == [(4, 1), (6, 0), (5, 2, 3)]
    assert layout.runs(2, rows=10) == ((50, 10), (20, 20))
    assert [layout.owner(expert) for expert in range(7)] == [1, 0, 2, 2, 0, 2, 1]
    for wrong in ((0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 4, 5, 5)):
        with pytest.raises(PlanError, match="is no order of 7 experts"):
            ExpertLayout(7, 3, wrong)
    with pytest.raises(PlanError, match="whole experts"):
        ExpertLayout(2, 4, (1, 0))


def test_experts_of_other_models_have_their_own_order_only() -> None:
    from trainrt.parallel.moe.experts import layout_of

    with pytest.raises(PlanError, match="not moe_lm"):
        layout_of(torch.nn.Module(), ExpertsForm(4, "x", "index", "weight"), 2, (1, 0, 2, 3))


MESHES = [{"fsdp": 2, "ep": 2}, pytest.param({"tp": 2, "fsdp": 2, "ep": 2}, marks=pytest.mark.campaign)]
ORDERS = {"layers.0.mlp.experts": (3, 0, 2, 1), "layers.1.mlp.experts": (1, 2, 0, 3)}


@pytest.mark.parametrize("mesh", MESHES)
def test_experts_move_at_a_checkpoint(mesh: dict[str, int], tmp_path: Path) -> None:
    """Trained with experts in their own order, resumed in another one and back: the state is the same, bit for bit."""
    config = job(mesh=mesh, model={"dtype": "float64"})
    before = Trained(config, tmp_path / "before", steps=2)
    checkpoint = before.checkpoint()
    stayed = Trained(config, tmp_path / "stayed", start=checkpoint, steps=2, first=3)
    moved = Trained(config, tmp_path / "moved", start=checkpoint, steps=2, first=3, orders=ORDERS)
    assert moved.initial_digests() == before.digests()
    for here, there in zip(stayed.losses, moved.losses, strict=True):
        assert there == pytest.approx(here, rel=1e-11)
    assert moved.metadata["plan_sha256"] != stayed.metadata["plan_sha256"], "negative control: experts did move"
    back = Trained(config, tmp_path / "back", start=moved.checkpoint(), first=5)
    assert back.initial_digests() == moved.digests() != before.digests()


def test_a_plan_read_back_has_the_same_layout() -> None:
    config = job(mesh={"fsdp": 2, "ep": 2})
    mesh = config.mesh()
    assert mesh is not None
    made = place(config, mesh, orders=ORDERS)
    document = json.loads(json.dumps(made.to_json()))
    again = place(config, mesh, orders={name: tuple(order) for name, order in document["expert_orders"].items()})
    roles = [("parameter", None), ("exp_avg", None)]
    assert again == made and again.layout(range(2), roles).to_json() == made.layout(range(2), roles).to_json()
    own = place(config, mesh)
    assert own.layout(range(2), roles).to_json() != made.layout(range(2), roles).to_json(), "negative control"
    runs = {entry["name"]: entry.get("ep_runs") for entry in document["parameters"]}
    assert runs["layers.0.mlp.experts.up_proj"] == [[[3, 1], [0, 1]], [[2, 1], [1, 1]]]


def verdict(rank: int, spoil: bool, ranks: int = 2, experts: int = 4, placed: bool = True) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    from trainrt.parallel.moe.spread import Spread
    from trainrt.parallel.verify import compare_experts
    from trainrt.training.blueprint import scaled
    from trainrt.training.pipeline import load_pipeline

    if spoil:
        Spread._by_position = Spread._timed  # type: ignore[method-assign]
    config = job(mesh={"fsdp": ranks, "ep": ranks}, moe={"experts": experts})
    blueprint = scaled(config, load_pipeline(config))
    return compare_experts(blueprint, {}, init_device_mesh("cpu", (ranks,)), placed=placed)


@pytest.mark.parametrize("spoil", [False, True])
def test_a_plan_with_orders_is_verified_with_one(spoil: bool) -> None:
    """Negative control: rows that are sent by expert where ranks hold experts by position."""
    found = run_ranks(2, verdict, spoil)[0]
    assert found.right != spoil and (found.gradient_error < 1e-12) != spoil


def test_slices_of_our_experts_are_verified() -> None:
    found = run_ranks(4, verdict, False, 4, 2, False)[0]
    assert found.right and found.gradient_error < 1e-12 and found.held < 1
