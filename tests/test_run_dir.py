"""The run directory's lock, its lines, and what a kill leaves of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from trainrt.errors import RunDirError
from trainrt.run_dir import RunDir, append_line, read_lines, write_json


def test_torn_lines_are_passed_over_and_the_next_one_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    append_line(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"a": 2, "b')
    assert list(read_lines(path)) == [{"a": 1}]
    append_line(path, {"a": 3})
    assert list(read_lines(path)) == [{"a": 1}, {"a": 3}]


def test_compaction_keeps_the_highest_incarnation_of_each_step(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for step, incarnation in ((1, 1), (2, 1), (2, 2), (3, 2)):
        append_line(run.metrics, {"step": step, "incarnation": incarnation})
    run.compact_metrics()
    assert [(line["step"], line["incarnation"]) for line in run.read_metrics()] == [(1, 1), (2, 2), (3, 2)]


def test_the_journal_adds_only_what_never_arrived(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for path, steps in ((run.metrics, (1, 2)), (run.metrics_journal, (1, 2, 3, 4))):
        for step in steps:
            append_line(path, {"step": step, "incarnation": 1})
    assert run.take_journal() == 4
    assert [line["step"] for line in run.read_metrics()] == [1, 2, 3, 4]
    assert run.take_journal() == 4 and len(run.read_metrics()) == 4


def test_death_frees_the_lock(tmp_path: Path) -> None:
    lock = f"RunDir({str(tmp_path)!r}).lock()"
    code = f"import time; from trainrt.run_dir import RunDir; {lock}; print(1, flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline()
    run = RunDir(tmp_path)
    assert run.locked()
    with pytest.raises(RunDirError, match=f"in use .*{holder.pid}"):
        run.lock()
    holder.kill()
    holder.wait()
    assert not run.locked()
    run.lock()
    run.unlock()


def test_documents_are_replaced_whole_and_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    with pytest.raises(RunDirError, match=r"x\.json"):
        RunDir(tmp_path / "x.json").create()
