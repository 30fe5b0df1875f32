"""The files of summaries and seats: whole records, whoever wrote before and wherever it broke off."""

from __future__ import annotations

from base64 import b64encode
from pathlib import Path
from typing import Any

import numpy as np

from tests.reference import validate
from trainrt.diagnostics.table import SUMMARY
from trainrt.diagnostics.telemetry import Summaries, read_seats
from trainrt.launch.links import LinkReports
from trainrt.launch.telemetry import Telemetry
from trainrt.run_dir import RunDir, read_lines

MESH = {"pp": 1, "dp": 1, "fsdp": 2, "cp": 1, "tp": 1, "ep": 1}


def text(step: int, rank: int, incarnation: int = 1) -> str:
    record: Any = np.zeros(1, dtype=SUMMARY)
    record["step"], record["rank"], record["incarnation"], record["seconds"] = step, rank, incarnation, step + rank
    return b64encode(record.tobytes()).decode()


def made(path: Path) -> tuple[RunDir, Telemetry]:
    run_dir = RunDir(path)
    run_dir.create()
    return run_dir, Telemetry(run_dir)


def test_a_driver_goes_on_behind_the_record_that_another_left_torn(tmp_path: Path) -> None:
    run_dir, first = made(tmp_path)
    first.seats(incarnation=1, mesh=MESH, nodes={0: "n0", 1: "n1"}, first_step=1)
    for rank in range(2):
        first.summary(text(1, rank))
    assert len(text(1, 0)) < 200, "what a rank sends of a step is small"
    first.flush()
    reader = Summaries(run_dir)
    assert reader.refresh() and not reader.refresh()
    with run_dir.summaries.open("ab") as file:
        file.write(b"\x01" * 50)
    assert not reader.refresh(), "a part of a record is none"
    second = Telemetry(run_dir)
    for rank in range(2):
        second.summary(text(2, rank))
    second.flush()
    reader.refresh()
    table = reader.table(5)
    assert table.seconds.tolist() == [[1, 2], [2, 3]]
    assert run_dir.summaries.stat().st_size == 4 * SUMMARY.itemsize


def test_the_last_incarnation_has_its_own_seats(tmp_path: Path) -> None:
    run_dir, telemetry = made(tmp_path)
    reader = Summaries(run_dir)
    assert reader.table(5).roles.ranks == 0
    telemetry.seats(incarnation=1, mesh=MESH, nodes={0: "n0", 1: "n1"}, first_step=1)
    telemetry.summary(text(1, 1))
    telemetry.seats(incarnation=2, mesh={**MESH, "fsdp": 1}, nodes={0: "n1"}, first_step=1)
    telemetry.summary(text(1, 0, incarnation=2))
    telemetry.flush()
    for line in read_lines(run_dir.seats):
        validate("seats", line)
    reader.refresh()
    now, (before, _) = reader.table(5), read_seats(run_dir)
    assert (now.roles.ranks, now.roles.hosts, now.seconds.tolist()) == (1, ("n1",), [[1]])
    assert before.roles.coordinates["fsdp"].tolist() == [0, 1]


def test_summaries_wait_no_longer_than_half_a_second(tmp_path: Path) -> None:
    run_dir, telemetry = made(tmp_path)
    telemetry.summary(text(1, 0))
    assert not run_dir.summaries.exists()
    telemetry._flushed_at -= 0.5
    telemetry.summary(text(1, 1))
    assert run_dir.summaries.stat().st_size == 2 * SUMMARY.itemsize


def test_links_are_told_for_every_ten_steps(tmp_path: Path) -> None:
    run_dir, telemetry = made(tmp_path)
    reports = LinkReports()
    for step in range(1, 26):
        for link in reports.since({"n1": [step, 1000 * step, 0.5 * step], "n2": [step, 0, 0.0]}):
            telemetry.link("n0", link)
    for link in reports.since({"n1": [26, 10, 1.0]}):
        telemetry.link("n0", link)
    lines = list(read_lines(run_dir.links))
    for line in lines:
        validate("links", line)
    assert [(line["step"], line["bytes"], line["seconds"]) for line in lines] == [
        (10, 10000, 5.0), (20, 10000, 5.0), (26, 10, 1.0),
    ]  # fmt: skip
    assert {(line["from"], line["to"]) for line in lines} == {("n1", "n0")}
    assert not reports.since({"n1": [41, 10, 1.0]}), "nothing came since another store began anew"
