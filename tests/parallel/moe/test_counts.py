"""What routers chose is counted once, on one logical shard a step, for the ranks whose rows they are."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import numpy as np
import pytest
import torch

from tests.jobs import engine, job, leaves, train
from tests.ranks import run_ranks
from tests.reference import validate
from trainrt.config import JobConfig, MeshSize
from trainrt.parallel.moe.counts import RoutingCounter, RoutingCounts
from trainrt.training.models.moe_lm import MoeLm

STEPS, TOKENS, TOP_K = 2, 2 * 16, 2
FREE = {"zero_experts": 1, "copy_experts": 1, "constant_experts": 1, "capacity_factor": 1.1}


def counted(rank: int, config: JobConfig, always: bool = False) -> Any:
    made = engine(config, rank)
    if always:
        made.routing._on = True
        made.routing.counting = lambda wanted: contextlib.nullcontext()
    train(made, config, steps=STEPS)
    counts = made.routing.gather(STEPS)
    again = made.routing.gather(STEPS)
    return counts.to_json(), again.to_json()


def counts_on(mesh: dict[str, int], *, again: bool = False, always: bool = False) -> RoutingCounts:
    config = job(mesh=mesh, model={"dtype": "float64", "activation_checkpointing": again})
    results = run_ranks(config.world_size, counted, config, always)
    assert all(result == results[0] for result in results), "every rank knows all counts"
    validate("experts", results[0][0])
    first, second = (RoutingCounts.from_json(json.loads(json.dumps(document))) for document in results[0])
    # A rank halves its own, rounding down.
    assert (second.traffic <= first.traffic / 2).all() and (
        second.traffic >= first.traffic / 2 - config.world_size
    ).all()
    return first


@pytest.mark.parametrize("mesh", [{"fsdp": 2, "ep": 2}, {"tp": 2, "ep": 2}])
def test_each_row_is_counted_for_its_home_and_each_transition_once(mesh: dict[str, int]) -> None:
    counts, again = counts_on(mesh), counts_on(mesh, again=True)
    shards = STEPS * mesh.get("fsdp", 1)
    assert counts.names == ("layers.0.mlp.experts", "layers.1.mlp.experts")
    assert counts.traffic.shape == (2, 2, 4) and counts.transitions.shape == (1, 4, 4)
    assert counts.traffic.sum((1, 2)).tolist() == [shards * TOKENS * TOP_K] * 2
    # Each place sends half: tensor-parallel ranks deal the rows of a shard among themselves.
    assert counts.traffic.sum(2).tolist() == [[shards * TOKENS * TOP_K / 2] * 2] * 2
    before, after = counts.traffic.sum(1)
    assert counts.transitions[0].sum(1).tolist() == (TOP_K * before).tolist()
    assert counts.transitions[0].sum(0).tolist() == (TOP_K * after).tolist()
    assert (again.traffic == counts.traffic).all() and (again.transitions == counts.transitions).all()


def test_what_is_computed_again_would_be_counted_twice() -> None:
    """Negative control: a counter that is never off sees more rounds, and layers that are computed again."""
    always, once = counts_on({"fsdp": 2, "ep": 2}, again=True, always=True), counts_on({"fsdp": 2, "ep": 2})
    # Two rounds a step, each computed twice.
    assert always.traffic.sum() == 4 * once.traffic.sum()


@pytest.mark.parametrize("free", [{}, FREE])
def test_counts_are_those_of_a_loop_over_tokens(free: dict[str, Any]) -> None:
    config = job(moe=free)
    model = MoeLm(config.moe_lm, config.moe)
    torch.manual_seed(0)
    model.initialize()
    counter = RoutingCounter(model, MeshSize(), 0, torch.device("cpu"))
    chosen = []

    def keep(module: Any, args: Any, routing: Any) -> None:
        met: list[list[int]] = [[] for _ in args[0]]
        for token, expert in zip(routing.rows.token_N.tolist(), routing.rows.expert_N.tolist(), strict=True):
            met[token].append(expert)
        chosen.append(met)

    for block in model.layers:
        block.mlp.router.register_forward_hook(keep)
    batch = leaves(config, 1)[0]
    with counter.counting(True):
        model(batch["input_ids"])
    with counter.counting(False):
        model(batch["input_ids"])
    expected = np.zeros((4, 4), int)
    for here, there in zip(chosen[0], chosen[1], strict=True):
        for i in here:
            for j in there:
                if i < 4 and j < 4:
                    expected[i, j] += 1
    assert (counter._transitions_LEE[0].numpy() == expected).all() and expected.sum() > 0
    rows = [[sum(e == expert for token in layer for e in token) for expert in range(4)] for layer in chosen[:2]]
    assert counter._traffic_LE.tolist() == rows


def test_a_model_without_mixtures_counts_nothing() -> None:
    counter = RoutingCounter(torch.nn.Linear(2, 2), MeshSize(), 0, torch.device("cpu"))
    with counter.counting(True):
        assert counter.gather(1) is None
