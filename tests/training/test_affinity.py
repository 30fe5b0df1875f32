"""Experts are placed by the counts of the run directory, when a plan is made and there are some that fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.jobs import job
from tests.reference import validate
from trainrt.config import JobConfig, MeshSize, learned_differences
from trainrt.errors import ConfigError
from trainrt.parallel.moe.counts import RoutingCounts
from trainrt.run_dir import RunDir, write_json
from trainrt.training.affinity import hosts_of_places
from trainrt.training.planning import make_plan

NAMES = ("layers.0.mlp.experts", "layers.1.mlp.experts")
TRAFFIC = np.array([[[90, 0, 80, 10], [5, 70, 0, 90]], [[50, 50, 50, 50], [50, 50, 50, 50]]])
"""In the first mixture experts 0 and 2 are chosen by home 0, and 1 and 3 by home 1; in the second all alike."""


def with_counts(folder: Path, *, names: tuple[str, ...] = NAMES, mesh: dict[str, int], **sections: Any) -> JobConfig:
    counts = RoutingCounts(7, names, TRAFFIC, np.zeros((1, 4, 4), np.int64))
    write_json(RunDir(folder).experts, counts.to_json())
    return job(mesh=mesh, run={"directory": str(folder)}, **{"moe": {"placement": "affinity"}, **sections})


def planned(config: JobConfig) -> tuple[dict[str, Any], Any]:
    plan = make_plan(config, world_size=config.world_size)
    validate("plan", json.loads(json.dumps(plan.to_json())))
    return dict(plan.orders), plan


def test_experts_go_to_the_homes_that_choose_them(tmp_path: Path) -> None:
    orders, plan = planned(with_counts(tmp_path, mesh={"fsdp": 2, "ep": 2}))
    assert orders == {NAMES[0]: (0, 2, 1, 3)}, "and what gains nothing stays"
    assert plan["layers.0.mlp.experts.up_proj"].held(plan.mesh, 0).spans[0] == ((0, 1), (2, 1))
    assert plan["layers.1.mlp.experts.up_proj"].cuts[0].runs is None
    assert plan.placement == {
        "counted_until_step": 7, "homes_known": True, "optimal": True, "rows_across_hosts": [0.0, 0.0],
        "rows_across_ranks": [365.0, 215.0], "rows_of_busiest": [380.0, 375.0],
    }  # fmt: skip
    assert "across hosts 0 -> 0, ranks 365 -> 215" in dict(plan.table())["experts"]
    # As where ranks wait for the plan.
    at_once = make_plan(with_counts(tmp_path, mesh={"fsdp": 2, "ep": 2}), world_size=2, placement_seconds=0.0)
    assert at_once.orders == plan.orders and not at_once.placement["optimal"]


def test_without_the_key_or_counts_experts_stay(tmp_path: Path) -> None:
    """Negative control."""
    mesh = {"fsdp": 2, "ep": 2}
    assert planned(with_counts(tmp_path, mesh=mesh, moe={}))[1].placement == {}
    RunDir(tmp_path).experts.unlink()
    orders, plan = planned(job(mesh=mesh, run={"directory": str(tmp_path)}, moe={"placement": "affinity"}))
    assert (orders, plan.placement) == ({}, {"passed_over": "nothing is counted yet"})


def test_counts_that_do_not_fit_are_passed_over_with_a_reason(tmp_path: Path) -> None:
    mesh = {"fsdp": 2, "ep": 2}
    for changed in ({"names": NAMES[:1]}, {"moe": {"experts": 6, "placement": "affinity"}}):
        orders, plan = planned(with_counts(tmp_path, mesh=mesh, **changed))
        assert (orders, plan.placement) == ({}, {"passed_over": "what is counted is of another model"})
        assert "in their own order: what is counted" in dict(plan.table())["experts"]
    config = with_counts(tmp_path, mesh={"fsdp": 8, "ep": 8})
    assert planned(config)[1].placement == {"passed_over": "each rank holds a slice of an expert"}


def test_counts_of_another_mesh_balance_ranks(tmp_path: Path) -> None:
    """Rows of 95, 70, 80 and 100 over 3 ranks, of which the last holds two experts: it gets the lightest."""
    config = with_counts(tmp_path, mesh={"fsdp": 3, "ep": 3})
    orders, plan = planned(config)
    assert sorted(orders[NAMES[0]][2:]) == [1, 2] and not plan.placement["homes_known"]
    assert plan.placement["rows_of_busiest"] == [180.0 + 200.0, 150.0 + 200.0]


def test_hosts_are_those_of_every_group() -> None:
    assert hosts_of_places(MeshSize(fsdp=8, ep=4), 2) == (0, 0, 1, 1)
    assert hosts_of_places(MeshSize(fsdp=4, ep=2), 4) == (0, 0)
    # Groups (0, 1, 2) and (3, 4, 5) over hosts of 0-3 and 4-5: the second tells place 0 from the others.
    assert hosts_of_places(MeshSize(fsdp=6, ep=3), 4) == (0, 1, 1)


def test_the_key_changes_nothing_that_is_learned_and_is_for_moe_lm() -> None:
    assert learned_differences(job(), job(moe={"placement": "affinity"})) == []
    with pytest.raises(ConfigError, match=r'moe\.placement = "affinity" is for model.kind = "moe_lm"; allowed: "none"'):
        job("huggingface", moe={"placement": "affinity"})
