"""Summaries and seats of a run directory, read as they grow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.diagnostics.summary_files import append_records, append_seats, records_of
from trainrt.config import MeshSize
from trainrt.diagnostics.table import SUMMARY, StepTable
from trainrt.diagnostics.telemetry import KEPT_STEPS, Summaries, read_seats
from trainrt.parallel.mesh import coordinates
from trainrt.run_dir import RunDir


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path / "run")
    made.create()
    return made


def test_what_is_read_is_what_a_table_of_the_records_holds(run_dir: RunDir) -> None:
    append_seats(run_dir, MeshSize(dp=2, tp=2), incarnation=1)
    records = records_of(range(1, 6), ranks=4, tp=0.25)
    append_records(run_dir, records[:7])
    summaries = Summaries(run_dir)
    assert summaries.refresh() and summaries.steps == [1, 2] and not summaries.complete(2)
    append_records(run_dir, records[7:])
    assert summaries.refresh() and not summaries.refresh()
    found, wanted = summaries.table(3), StepTable.of(records, summaries.roles).last(3)
    assert found.steps.tolist() == [3, 4, 5] and summaries.complete(5)
    np.testing.assert_array_equal(found.seconds, wanted.seconds)
    np.testing.assert_array_equal(found.start, wanted.start)
    assert set(found.communication) == set(wanted.communication) == {"tp"}
    for kind in ("parts", "communication", "work"):
        for name, values in getattr(wanted, kind).items():
            np.testing.assert_array_equal(getattr(found, kind)[name], values)
    assert summaries.column("memory", 2).shape == (2, 4)


def test_a_torn_record_waits_and_missing_ranks_are_nan(run_dir: RunDir) -> None:
    append_seats(run_dir, MeshSize(dp=2), incarnation=1)
    data = records_of([1], ranks=2).tobytes()
    run_dir.summaries.write_bytes(data[: SUMMARY.itemsize + 50])
    summaries = Summaries(run_dir)
    summaries.refresh()
    assert np.isnan(summaries.table(1).seconds).tolist() == [[False, True]]
    with run_dir.summaries.open("ab") as file:
        file.write(data[SUMMARY.itemsize + 50 :])
    assert summaries.refresh() and summaries.complete(1)


def test_only_the_newest_incarnation_counts_even_if_its_seats_come_late(run_dir: RunDir) -> None:
    append_seats(run_dir, MeshSize(dp=4), incarnation=1)
    append_records(run_dir, records_of([1, 2], ranks=4))
    summaries = Summaries(run_dir)
    summaries.refresh()
    append_records(run_dir, records_of([2, 3], ranks=2, incarnation=2))
    summaries.refresh()
    assert summaries.incarnation == 1 and summaries.table(9).seconds.shape == (2, 4)
    append_seats(run_dir, MeshSize(dp=2), incarnation=2)
    summaries.refresh()
    assert summaries.incarnation == 2 and summaries.steps == [2, 3] and summaries.complete(3)
    assert [seats.incarnation for seats in read_seats(run_dir)] == [1, 2]


def test_memory_is_bounded(run_dir: RunDir) -> None:
    append_seats(run_dir, MeshSize(dp=2), incarnation=1)
    append_records(run_dir, records_of(range(1, KEPT_STEPS + 50), ranks=2))
    summaries = Summaries(run_dir)
    summaries.refresh()
    assert len(summaries.steps) == KEPT_STEPS and summaries.steps[-1] == KEPT_STEPS + 49
    small = Summaries(run_dir, kept_bytes=10 * 2 * SUMMARY.itemsize)
    small.refresh()
    append_records(run_dir, records_of([KEPT_STEPS + 50], ranks=2))
    small.refresh()
    assert small.steps == list(range(KEPT_STEPS + 41, KEPT_STEPS + 51))


def test_a_directory_without_summaries_is_an_empty_table(run_dir: RunDir) -> None:
    summaries = Summaries(run_dir)
    assert not summaries.refresh() and summaries.table(20).seconds.shape == (0, 0)
    append_seats(run_dir, MeshSize(dp=2), incarnation=1)
    assert summaries.refresh() and summaries.table(20).seconds.shape == (0, 2)
    run_dir.summaries.write_bytes(records_of([1, 2], ranks=2).tobytes())
    summaries.refresh()
    run_dir.summaries.write_bytes(records_of([1], ranks=2).tobytes())
    assert summaries.refresh() and summaries.steps == [1], "a file that was replaced is read again"


@pytest.mark.parametrize(
    "size",
    [MeshSize(pp=2, dp=2, tp=2), MeshSize(fsdp=4, ep=2), MeshSize(pp=2, dp=2, fsdp=2, tp=2, ep=4), MeshSize(fsdp=2)],
)
def test_groups_are_those_that_the_mesh_makes(run_dir: RunDir, size: MeshSize) -> None:
    append_seats(run_dir, size, incarnation=1)
    roles = read_seats(run_dir)[0].roles
    places = [coordinates(size, rank) for rank in range(size.world_size)]
    for axis in ("pp", "dp", "fsdp", "cp", "tp", "ep"):
        fixed = ("pp", "efsdp") if axis == "ep" else tuple(a for a in ("pp", "dp", "fsdp", "cp", "tp") if a != axis)
        keys = [tuple(place[a] for a in fixed) for place in places]
        wanted = [[key == other for other in keys] for key in keys]
        found = roles.groups(axis)
        if getattr(size, axis) > 1:
            assert (found[:, None] == found[None, :]).tolist() == wanted, axis
        else:
            assert len(set(found.tolist())) == size.world_size
