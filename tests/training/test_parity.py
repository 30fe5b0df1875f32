"""Meshes give the losses and gradient norms of one process: those that are no rows of the conformance matrix."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cases import cases
from tests.jobs import engine, job, train
from tests.ranks import run_ranks

MESHES = {
    "fsdp2": {"fsdp": 2}, "dp2": {"dp": 2}, "dp2-fsdp2": {"dp": 2, "fsdp": 2}, "tp2": {"tp": 2},
    "tp2-fsdp2": {"tp": 2, "fsdp": 2}, "tp2-dp2": {"tp": 2, "dp": 2},
}  # fmt: skip


def curve(
    rank: int, kind: str, mesh: dict[str, int], sections: dict[str, Any], steps: int
) -> list[tuple[float, float]]:
    config = job(kind, mesh=mesh, **sections)
    made = engine(config, rank)
    return [(result.loss, result.grad_norm) for result in train(made, config, steps=steps)]


def worst(a: list[tuple[float, float]], b: list[tuple[float, float]]) -> float:
    return max(abs(x - y) / abs(y) for pair, other in zip(a, b, strict=True) for x, y in zip(pair, other, strict=True))


@pytest.fixture(scope="module")
def single() -> dict[str, Any]:
    cache: dict[str, Any] = {}

    def reference(kind: str, sections: dict[str, Any], steps: int) -> Any:
        key = repr((kind, sections, steps))
        if key not in cache:
            cache[key] = run_ranks(1, curve, kind, {}, sections, steps)[0]
        return cache[key]

    return reference  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["fsdp2", "dp2", "tp2-dp2"])
def test_moe_lm_in_float64_is_the_single_process(name: str, single: Any) -> None:
    mesh = MESHES[name]
    sections = {"model": {"dtype": "float64"}}
    ranks = mesh.get("dp", 1) * mesh.get("fsdp", 1) * mesh.get("tp", 1)
    curves = run_ranks(ranks, curve, "moe_lm", mesh, sections, 5)
    assert all(other == curves[0] for other in curves)
    assert worst(curves[0], single("moe_lm", sections, 5)) < 1e-11


@pytest.mark.parametrize("name", cases(["fsdp2", "dp2-fsdp2", "tp2", "tp2-fsdp2"], ["tp2-fsdp2"]))
def test_llama_in_float32_follows_the_single_process_for_20_steps(name: str, single: Any) -> None:
    mesh = MESHES[name]
    ranks = mesh.get("dp", 1) * mesh.get("fsdp", 1) * mesh.get("tp", 1)
    curves = run_ranks(ranks, curve, "huggingface", mesh, {}, 20)
    assert (
        worst([(loss, 1.0) for loss, _ in curves[0]], [(loss, 1.0) for loss, _ in single("huggingface", {}, 20)]) < 1e-5
    )


def test_a_different_batch_order_is_noticed(single: Any) -> None:
    """Negative control: the comparison is not blind."""
    sections = {"model": {"dtype": "float64"}}
    other = run_ranks(1, curve, "moe_lm", {}, {**sections, "run": {"seed": 1}}, 5)[0]
    assert worst(other, single("moe_lm", sections, 5)) > 1e-6
