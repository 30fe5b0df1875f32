"""`run.deterministic`: the same bits on every number of data ranks, and controls that show what it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.jobs import engine, job, train
from tests.ranks import run_ranks
from tests.state import Trained

STEPS = 4
# Seven leaves: no mesh of two or more data ranks divides them.
SEVEN = {"global_batch": 7, "microbatch": 1}
SAME = [
    ("moe_lm", {}, {"fsdp": 2}), ("moe_lm", {}, {"fsdp": 5}), ("moe_lm", {}, {"dp": 2, "fsdp": 2}),
    ("moe_lm", {"tp": 2}, {"tp": 2, "fsdp": 2}),
    ("moe_lm", {"fsdp": 2, "ep": 2}, {"fsdp": 4, "ep": 2}), ("moe_lm", {"fsdp": 2, "ep": 2}, {"dp": 2, "fsdp": 2, "ep": 2}),
    ("huggingface", {}, {"fsdp": 3}),
]  # fmt: skip


def sections(**more: dict[str, Any]) -> dict[str, Any]:
    return {"run": {"deterministic": True}, "data": SEVEN, "optimizer": {"clip": 0.1}, **more}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Trained] = {}

    def get(kind: str, mesh: dict[str, int], **more: dict[str, Any]) -> Trained:
        key = repr((kind, mesh, more))
        if key not in made:
            config = job(kind, mesh=mesh, **sections(**more))
            made[key] = Trained(config, tmp_path_factory.mktemp("trained"), steps=STEPS)
        return made[key]

    return get


def name(mesh: dict[str, int]) -> str:
    return "-".join(f"{axis}{size}" for axis, size in mesh.items()) or "one rank"


@pytest.mark.parametrize(("kind", "one", "other"), SAME, ids=lambda v: name(v) if isinstance(v, dict) else v)
def test_losses_norms_and_state_are_the_same_bits(
    kind: str, one: dict[str, int], other: dict[str, int], trained: Any
) -> None:
    left, right = trained(kind, one), trained(kind, other)
    assert left.losses == right.losses
    assert all(norm > 0.1 for _, norm in left.losses), "clipping must be active, or the norm would not matter"
    assert left.digests() == right.digests()


@pytest.mark.parametrize("mesh", [{"fsdp": 2}, {"fsdp": 4, "ep": 2}], ids=name)
def test_so_in_bfloat16_and_with_activation_checkpointing(mesh: dict[str, int], trained: Any) -> None:
    model = {"dtype": "bfloat16", "activation_checkpointing": True}
    one = {"fsdp": 2, "ep": 2} if "ep" in mesh else {}
    left, right = trained("moe_lm", one, model=model), trained("moe_lm", mesh, model=model)
    assert left.losses == right.losses
    assert left.digests() == right.digests()


def test_a_run_that_changes_its_size_on_the_way_ends_in_the_same_bits(trained: Any, tmp_path: Path) -> None:
    """4 -> 3 -> 2 -> 4 ranks through a checkpoint each, one step on each, against one rank throughout."""
    start, losses = None, []
    for first, ranks in enumerate((4, 3, 2, 4), start=1):
        config = job("moe_lm", mesh={"fsdp": ranks}, **sections())
        part = Trained(config, tmp_path / str(first), start=start, steps=1, first=first)
        losses += part.losses
        start = part.checkpoint()
    whole = trained("moe_lm", {})
    assert losses == whole.losses
    assert part.digests() == whole.digests()


def differs(rank: int, kind: str, mesh: dict[str, int], control: str) -> list[tuple[float, float]]:
    """A few steps with one of the ingredients left out."""
    from trainrt.parallel.norm import PlainNorm

    config = job(kind, mesh=mesh, **sections(**({"run": {"deterministic": False}} if control == "stock sums" else {})))
    made = engine(config, rank)
    if control == "plain norm":
        made._norm = PlainNorm()
    return [(result.loss, result.grad_norm) for result in train(made, config, steps=6)]


@pytest.mark.parametrize(
    ("control", "one", "other"),
    [
        ("stock sums", {}, {"fsdp": 4}),
        ("plain norm", {}, {"fsdp": 3}),
    ],
)
def test_without_an_ingredient_the_bits_differ(control: str, one: dict[str, int], other: dict[str, int]) -> None:
    ranks = other.get("fsdp", 1)
    left = run_ranks(one.get("fsdp", 1), differs, "moe_lm", one, control)[0]
    right = run_ranks(ranks, differs, "moe_lm", other, control)[0]
    assert left != right
    assert torch.allclose(torch.tensor(left), torch.tensor(right), rtol=1e-2), "but only by rounding"


def test_a_fused_optimizer_would_not_do() -> None:
    """Negative control for the optimizer: vector and remainder lanes of a fused kernel round differently."""
    torch.manual_seed(0)
    whole, gradient = torch.randn(1001), torch.randn(1001)

    def updated(pieces: list[slice], *, fused: bool) -> torch.Tensor:
        parameters = [whole[piece].clone().requires_grad_() for piece in pieces]
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.grad = gradient[piece].clone()
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, foreach=not fused, fused=fused)
        for _ in range(20):
            optimizer.step()
        return torch.cat([parameter.detach() for parameter in parameters])

    one, cut = [slice(0, 1001)], [slice(at, min(at + 3, 1001)) for at in range(0, 1001, 3)]
    assert torch.equal(updated(one, fused=False), updated(cut, fused=False))
    assert not torch.equal(updated(one, fused=True), updated(cut, fused=True))
