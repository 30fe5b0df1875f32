"""Waiting and transfer: told apart by the group, and all parts add up to the step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tests.diagnostics.summary_files import append_records, append_seats, records_of
from trainrt.config import MeshSize
from trainrt.diagnostics.accounting import account, least_of_group, mean_over_ranks
from trainrt.diagnostics.table import PARTS, StepTable, roles_of
from trainrt.diagnostics.telemetry import Summaries
from trainrt.parallel.mesh import coordinates
from trainrt.run_dir import RunDir


def test_the_last_to_come_waits_for_nobody(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.create()
    append_seats(run_dir, MeshSize(dp=2, tp=2), incarnation=1)
    # tp pairs are (0, 1) and (2, 3), dp pairs (0, 2) and (1, 3); rank 3 is slow and all wait for it in the end.
    append_records(run_dir, records_of([1], ranks=4, forward=[0.02, 0.02, 0.02, 0.05], tp=[0.011, 0.011, 0.04, 0.01],
                                       dp=[0.032, 0.032, 0.003, 0.003]))  # fmt: skip
    summaries = Summaries(run_dir)
    summaries.refresh()
    found = account(summaries.table(1))
    np.testing.assert_allclose(found.transfer["tp"], [[0.011, 0.011, 0.01, 0.01]], rtol=1e-6)
    np.testing.assert_allclose(found.waiting["tp"], [[0, 0, 0.03, 0]], atol=1e-8)
    np.testing.assert_allclose(found.transfer["dp"], [[0.003, 0.003, 0.003, 0.003]], rtol=1e-6)
    np.testing.assert_allclose(found.waiting["dp"], [[0.029, 0.029, 0, 0]], atol=1e-8)
    np.testing.assert_allclose(found.waited(), [[0.029, 0.029, 0.03, 0]], atol=1e-8)
    bands = found.bands()
    assert set(bands) == {"compute", "transfer tp", "transfer dp", "waiting", "data", "snapshot", "checkpoint", "other"}
    np.testing.assert_allclose(sum(bands.values()), mean_over_ranks(found.seconds), rtol=1e-12)


@given(st.data())
def test_parts_add_up_to_the_seconds_of_the_step(data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([MeshSize(pp=2, dp=2, tp=2), MeshSize(fsdp=8, ep=4), MeshSize(dp=8)]))
    amounts = arrays(np.float64, (3, size.world_size), elements=st.floats(0, 10))
    axes = [axis for axis in ("pp", "dp", "fsdp", "tp", "ep") if getattr(size, axis) > 1]
    parts = {name: data.draw(amounts) for name in PARTS}
    communication = {axis: data.draw(amounts) for axis in (*axes, "world")}
    seconds = sum(parts.values()) + sum(communication.values()) + data.draw(amounts)
    for table in (*parts.values(), *communication.values(), seconds):
        table[1, 2] = np.nan
    places = [coordinates(size, rank) for rank in range(size.world_size)]
    roles = roles_of({axis: getattr(size, axis) for axis in axes}, ["a"] * size.world_size, places)
    found = account(StepTable(np.arange(3), roles, seconds, seconds, parts, communication, {}))
    total = sum([*found.own.values(), *found.waiting.values(), *found.transfer.values()])
    np.testing.assert_allclose(total, seconds, atol=1e-9)
    np.testing.assert_allclose(found.self_seconds() + found.waited() + sum(found.transfer.values()), seconds, atol=1e-9)
    for axis in communication:
        waiting = np.nan_to_num(found.waiting[axis])
        assert (waiting >= 0).all()
        for group in np.unique(roles.groups(axis)):
            assert (waiting[:, roles.groups(axis) == group].min(axis=1) == 0).all(), "someone of each group came last"


@pytest.mark.parametrize("group", [[0, 0, 1, 1], [5, 2, 5, 2], [0, 1, 2, 3]])
def test_the_least_of_a_group_leaves_out_those_not_heard(group: list[int]) -> None:
    values = np.array([[4.0, 3.0, np.nan, 1.0], [1.0, 2.0, 3.0, 4.0]])
    numbers = np.array(group)
    wanted = np.array(
        [[np.nan if np.isnan(row[r]) else np.nanmin(row[numbers == numbers[r]]) for r in range(4)] for row in values]
    )
    np.testing.assert_array_equal(least_of_group(values, numbers), wanted)
