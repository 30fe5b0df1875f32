"""What a launch is made of, before anything starts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.launch.runs import write_job
from trainrt.config import load
from trainrt.errors import ConfigError, RunDirError
from trainrt.launch.record import Folder, Record, Shape
from trainrt.launch.request import find_module, from_document, look_back, prepare, to_document, write_config
from trainrt.run_dir import write_json


@pytest.fixture(autouse=True)
def own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_arguments_go_over_keys(tmp_path: Path) -> None:
    job = write_job(tmp_path / "job.toml")
    request = prepare(job, address="auto", nodes=3, run_dir=tmp_path / "run")
    assert (request.config.cluster.address, request.config.cluster.nodes) == ("auto", 3)
    assert request.run_dir.path == tmp_path / "run"
    assert request.config.run.directory == str(tmp_path / "run")
    assert request.runtime_env() is None


def test_a_module_beside_the_job_travels_without_the_runs(tmp_path: Path) -> None:
    (tmp_path / "own_pipeline.py").write_text("pipeline = None\n")
    job = write_job(tmp_path / "job.toml", run={"pipeline": "own_pipeline:pipeline"})
    request = prepare(job, run_dir=tmp_path / "here" / "run")
    environment = request.runtime_env()
    assert environment is not None and environment["working_dir"] == str(tmp_path)
    assert "/here/run" in environment["excludes"]


def test_an_installed_module_stays_where_it_is() -> None:
    assert find_module("pydantic:BaseModel") is None


@pytest.mark.parametrize("name", ["no_such_module_anywhere:pipeline", "no_colon", ":pipeline"])
def test_a_module_that_is_not_there_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.pipeline"):
        find_module(name)


def test_a_request_survives_the_way_to_a_daemon(tmp_path: Path) -> None:
    request = prepare(write_job(tmp_path / "job.toml"), run_dir=tmp_path / "run", force=True)
    again = from_document(to_document(request))
    assert again.config == request.config
    assert (again.run_dir.path, again.force, again.entry, again.preload) == (
        request.run_dir.path, True, request.entry, request.preload,
    )  # fmt: skip


def test_a_directory_of_another_job_is_refused_unless_forced(tmp_path: Path) -> None:
    first = prepare(write_job(tmp_path / "job.toml"), run_dir=tmp_path / "run")
    first.run_dir.create()
    write_config(first)
    assert look_back(first) is None
    status = {"run_id": "0", "state": "interrupted", "step": 4, "incarnation": 2, "time": 0.0}
    write_json(first.run_dir.status, status)
    other = write_job(tmp_path / "job.toml", optimizer={"learning_rate": 0.5}, cluster={"nodes": 1})
    with pytest.raises(RunDirError, match=r"optimizer\.learning_rate"):
        look_back(prepare(other, run_dir=tmp_path / "run"))
    previous = look_back(prepare(other, run_dir=tmp_path / "run", force=True))
    assert previous is not None and (previous.step, previous.incarnation) == (4, 2)
    fewer = write_job(tmp_path / "job.toml", cluster={"nodes": 1}, run={"steps": 900})
    assert look_back(prepare(fewer, run_dir=tmp_path / "run")) is not None
    assert load(first.run_dir.config).run.steps == 500


def test_a_job_that_was_refused_before_its_first_step_may_be_put_right(tmp_path: Path) -> None:
    first = prepare(write_job(tmp_path / "job.toml"), run_dir=tmp_path / "run")
    first.run_dir.create()
    write_config(first)
    status = {"run_id": "a", "state": "failed", "step": 0, "steps": 9, "incarnation": 0, "time": 0.0}
    other = prepare(write_job(tmp_path / "other.toml", run={"seed": 7}), run_dir=tmp_path / "run")
    write_json(first.run_dir.status, status)
    assert look_back(other) is not None
    write_json(first.run_dir.status, status | {"step": 3})
    with pytest.raises(RunDirError, match=r"run\.seed"):
        look_back(other)


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    request = prepare(write_job(tmp_path / "job.toml"), run_dir=tmp_path / "run")
    request.run_dir.create()
    folder = Folder(request.run_dir)
    folder.create()
    assert folder.secret.stat().st_mode & 0o77 == 0, "a secret is its owner's alone"
    record = Record("1f", "127.0.0.1:1", True, ["n0"], Shape("local", 1, 2, 0, "cpu"), {"n0": "127.0.0.1:2"})
    record.save(folder)
    assert Record.load(folder) == record
