"""Rows x columns, each cell run for real on gloo ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conformance.rows import CASES, Row
from tests.jobs import job
from tests.state import Trained

STEPS = 5


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs shared by the cells: (kind, mesh, sections) to what it left."""
    made: dict[str, Trained] = {}

    def get(row: Row, mesh: dict[str, int]) -> Trained:
        sections = row.sections_on(mesh)
        key = repr((row.kind, mesh, sections))
        if key not in made:
            config = job(row.kind, mesh=mesh, **sections)
            made[key] = Trained(config, tmp_path_factory.mktemp("trained"), steps=STEPS)
        return made[key]

    return get


def worst(a: list[tuple[float, float]], b: list[tuple[float, float]]) -> float:
    return max(abs(x - y) / abs(y) for left, right in zip(a, b, strict=True) for x, y in zip(left, right, strict=True))


@pytest.mark.parametrize("row", CASES)
def test_parity(row: Row, trained: Any, record_property: Any) -> None:
    record_property("cell", (row.name, "parity"))
    assert worst(trained(row, row.mesh).losses, trained(row, {}).losses) < row.tolerance


@pytest.mark.parametrize("row", CASES)
def test_layout_digest(row: Row, trained: Any, record_property: Any) -> None:
    record_property("cell", (row.name, "layout digest"))
    made, single = trained(row, row.mesh), trained(row, {})
    assert made.initial_digests() == single.initial_digests()
    assert made.digests().keys() == single.digests().keys()
    assert made.digests() != made.initial_digests(), "negative control: trained state differs"


@pytest.mark.parametrize("row", CASES)
def test_resume_on_another_mesh(row: Row, trained: Any, record_property: Any, tmp_path: Path) -> None:
    record_property("cell", (row.name, "resume on another mesh"))
    before = trained(row, row.mesh)
    checkpoint = before.checkpoint()
    config = job(row.kind, mesh=row.other, **row.sections)
    here = Trained(before.config, tmp_path / "here", start=checkpoint, steps=2, first=STEPS + 1)
    there = Trained(config, tmp_path / "there", start=checkpoint, steps=2, first=STEPS + 1)
    assert here.initial_digests() == there.initial_digests() == before.digests()
    assert here.updates_before == there.updates_before == before.metadata["updates"]
    same = ("step", "updates", "scheduler", "data")
    assert [there.metadata[key] for key in same] == [here.metadata[key] for key in same]
    assert worst(there.losses, here.losses) < row.tolerance
