"""`trainrt diagnose`: over run directories and traces, as people and as tools read it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.diagnostics.run_directories import SLOW_RANK, WrittenRun
from tests.diagnostics.test_trace import small, written
from tests.reference import validate
from trainrt import diagnose
from trainrt.errors import DiagnosticsError
from trainrt.run_dir import read_json, write_json


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trainrt.cli", "diagnose", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_run_with_a_slow_rank(tmp_path: Path) -> None:
    written = WrittenRun(tmp_path)
    written.steps(30)
    shown = run(str(tmp_path), "--json")
    assert shown.returncode == 0, shown.stderr
    document = json.loads(shown.stdout)
    validate("diagnose", document)
    assert document == diagnose(tmp_path)
    (verdict,) = document["verdicts"]
    assert (document["state"], verdict["cause"], verdict["action"]) == ("straggling", "slow_worker", "evict")
    assert [culprit["rank"] for culprit in verdict["culprits"]] == [SLOW_RANK]
    assert any("of all waiting of step 30 goes back to it" in said for said in verdict["evidence"]), verdict["evidence"]
    words = run(str(tmp_path)).stdout
    assert words.startswith("Straggling.") and verdict["sentence"] in words and "action evict" in words


def test_a_run_that_is_well(tmp_path: Path) -> None:
    written = WrittenRun(tmp_path)
    written.slow = {}
    written.steps(30)
    document = diagnose(tmp_path)
    validate("diagnose", document)
    assert document["state"] == "healthy" and document["verdicts"] == []


def test_the_first_steps_and_the_one_that_is_not_whole_are_left_out(tmp_path: Path) -> None:
    written = WrittenRun(tmp_path)
    written.steps(4)
    assert diagnose(tmp_path)["state"] == "unknown"
    written.steps(1)
    document = diagnose(tmp_path)
    assert document["state"] != "unknown" and (document["first_step"], document["last_step"]) == (3, 5)


def test_a_run_of_which_nothing_was_heard(tmp_path: Path) -> None:
    WrittenRun(tmp_path)
    document = diagnose(tmp_path)
    validate("diagnose", document)
    assert document["state"] == "unknown" and "not enough data" in document["notes"][0]


def test_a_run_that_hangs(tmp_path: Path) -> None:
    written = WrittenRun(tmp_path)
    written.steps(10)
    hung = {**diagnose(tmp_path), "state": "hung"}
    write_json(written.run_dir.diagnosis, hung)
    assert diagnose(tmp_path) == hung == read_json(written.run_dir.diagnosis)


def test_a_trace(tmp_path: Path) -> None:
    path = written(tmp_path / "trace.csv", small())
    document = diagnose(path)
    validate("diagnose", document)
    assert document["state"] in ("healthy", "straggling") and document["slowdown"] >= 1


@pytest.mark.parametrize("what", ["nothing", "no run", "no trace"])
def test_what_is_neither_a_run_nor_a_trace(tmp_path: Path, what: str) -> None:
    path = {"nothing": tmp_path / "absent", "no run": tmp_path, "no trace": tmp_path / "trace.csv"}[what]
    if what == "no trace":
        path.write_text("a,b\n1,2\n")
    with pytest.raises(DiagnosticsError):
        diagnose(path)
    shown = run(str(path), "--json")
    assert shown.returncode == 2 and not shown.stdout and str(path) in shown.stderr and "Traceback" not in shown.stderr
