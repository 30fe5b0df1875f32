"""Learning-rate schedules and parameter groups."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from tests.jobs import job
from trainrt.config import OptimizerConfig
from trainrt.training.optimizer import learning_rate, make_optimizer


def rates(schedule: str, steps: int = 100, **keys: float) -> list[float]:
    config = OptimizerConfig.model_validate({"schedule": schedule, "learning_rate": 1.0, "warmup_steps": 10, **keys})
    return [learning_rate(config, step=step, steps=steps) for step in range(1, steps + 1)]


def test_warm_up_is_linear_and_ends_at_the_rate() -> None:
    for schedule in ("cosine", "wsd", "constant"):
        assert rates(schedule)[:10] == pytest.approx([step / 10 for step in range(1, 11)])


def test_cosine_ends_at_the_floor() -> None:
    made = rates("cosine")
    assert made[-1] == pytest.approx(0.1)
    assert made[54] == pytest.approx(0.55, abs=0.01)
    assert all(a >= b for a, b in pairwise(made[9:]))


def test_wsd_is_constant_and_then_decays_linearly() -> None:
    made = rates("wsd")
    assert made[10:80] == [1.0] * 70
    assert made[89] == pytest.approx(0.55)
    assert made[-1] == pytest.approx(0.1)


def test_constant_stays() -> None:
    assert rates("constant")[10:] == [1.0] * 90


def test_matrices_are_decayed_and_vectors_are_not() -> None:
    local = {"w": torch.nn.Parameter(torch.ones(2, 3)), "b": torch.nn.Parameter(torch.ones(3))}
    # A shard of a matrix may be of any shape: the whole parameter's counts.
    optimizer = make_optimizer(job(), local, {"w": (4, 3), "b": (6,)})
    assert [(group["names"], group["weight_decay"]) for group in optimizer.param_groups] == [(["w"], 0.1), (["b"], 0.0)]


def test_an_update_is_adamws() -> None:
    ours = {"w": torch.nn.Parameter(torch.linspace(-1, 1, 12).view(4, 3))}
    theirs = torch.nn.Parameter(ours["w"].detach().clone())
    optimizer = make_optimizer(job(optimizer={"warmup_steps": 0}), ours, {"w": (4, 3)})
    reference = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(3):
        ours["w"].grad = torch.full((4, 3), 0.5 + step)
        theirs.grad = ours["w"].grad.clone()
        optimizer.step()
        reference.step()
    assert torch.equal(ours["w"], theirs)
