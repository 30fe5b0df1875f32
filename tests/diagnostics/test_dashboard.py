"""The page's server over real sockets: what it says, whom it admits, what it refuses."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.diagnostics.run_directories import SLOW_RANK, WrittenRun
from tests.diagnostics.summary_files import append_records, records_of
from tests.reference import validate
from trainrt.diagnostics.page.packed import unpacked
from trainrt.diagnostics.page.reader import RunReader
from trainrt.diagnostics.page.views import FRESH_SECONDS, Views
from trainrt.events import EventRing
from trainrt.run_dir import RunDir
from trainrt.training.recorder import Recorder


@contextmanager
def served(path: Path, *options: str) -> Iterator[str]:
    """`trainrt dashboard` as a process; its address."""
    command = [sys.executable, "-m", "trainrt.cli", "dashboard", str(path), "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://[^/]+", line)
        assert found, line
        yield found.group()
    finally:
        process.kill()
        process.wait()


def fetch(url: str, **headers: str) -> tuple[int, str, Any]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as answer:
            return answer.status, answer.read().decode(), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(), error.headers


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> WrittenRun:
    made = WrittenRun(tmp_path_factory.mktemp("run"))
    made.steps(25)
    made.incident()
    made.diagnose()
    return made


@pytest.fixture(scope="module")
def address(run: WrittenRun) -> Iterator[str]:
    with served(run.run_dir.path) as url:
        yield url


def ask(address: str, path: str) -> Any:
    status, text, _ = fetch(f"{address}{path}")
    assert status == 200, text
    return json.loads(text)


def test_the_api_tells_the_run(run: WrittenRun, address: str) -> None:
    about = ask(address, "/api/run")
    assert (about["status"]["state"], about["status"]["live"]) == ("running", False)
    lines = ask(address, "/api/metrics")["lines"]
    assert [line["step"] for line in lines] == list(range(1, 26))
    assert [line["step"] for line in ask(address, "/api/metrics?after=24")["lines"]] == [25]
    incident = ask(address, "/api/incidents")["incidents"][0]
    assert incident["kind"] == "worker_exit" and incident["phases"]["restore_seconds"] == 0.3
    timeline = ask(address, "/api/timeline?step=7")
    assert timeline["step"] == 7 and [rank["rank"] for rank in timeline["ranks"]] == list(range(8))
    names = {timeline["names"][name] for name in timeline["ranks"][0]["name"]}
    assert names >= {"forward", "fsdp_reduce_scatter"} and timeline["arrows"]
    diagnosis = ask(address, "/api/diagnosis")
    assert diagnosis["verdicts"][0]["culprits"][0]["rank"] == SLOW_RANK and diagnosis["written"] > 0
    health = ask(address, "/api/health")
    assert health["snapshots"]["every"] == 1 and health["snapshots"]["restores"] == {"memory": 1}
    assert unpacked(health["memory"]["most_bytes"]).tolist() == [2.5 * 2**30, 3 * 2**30, 3 * 2**30, 2.5 * 2**30]


def test_the_plan_says_who_sits_where(address: str) -> None:
    plan = ask(address, "/api/plan")
    assert plan["mesh"]["pp"] == 2 and plan["hosts"] == ["n0", "n1", "n2", "n3"]
    assert unpacked(plan["host"]).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert unpacked(plan["coordinates"]["tp"]).tolist() == [0, 1] * 4
    tp = next(line for line in plan["topology"] if line["axis"] == "tp")
    assert tp == {"axis": "tp", "groups": 4, "ranks": 2, "hosts": 1}
    groups = unpacked(plan["groups"]["ep"])
    assert [groups[0] == other for other in groups] == [True, True, *[False] * 6], (
        "ep is the ranks of a stage once more"
    )


def test_self_time_names_the_slow_rank_and_not_those_that_wait_for_it(run: WrittenRun, address: str) -> None:
    heat = {name: unpacked(value) for name, value in ask(address, "/api/heatmap").items() if isinstance(value, dict)}
    assert heat["ratio"].argmax() == SLOW_RANK and heat["ratio"][SLOW_RANK] == pytest.approx(1.55, abs=0.05)
    others = [rank for rank in range(8) if rank != SLOW_RANK]
    assert np.abs(heat["ratio"][others] - 1).max() < 0.1
    assert heat["step_seconds"].min() > 0.9 * heat["step_seconds"].max(), "by step time all are about alike"
    assert heat["waiting_seconds"][SLOW_RANK] < 0.5 * heat["waiting_seconds"][others].min()


def test_the_parts_of_a_step_add_up(address: str) -> None:
    found = ask(address, "/api/accounting")
    bands = {name: np.array(values) for name, values in found["bands"].items()}
    assert next(iter(bands)) == "compute" and list(bands)[-1] == "other" and "transfer tp" in bands
    assert found["steps"] == list(range(1, 26))
    heat = ask(address, "/api/heatmap")
    step = sum(bands.values())
    assert np.median(step[-20:]) == pytest.approx(float(unpacked(heat["step_seconds"]).mean()), rel=0.02)


def test_without_a_diagnosis_the_state_is_unknown(tmp_path: Path) -> None:
    views = Views(WrittenRun(tmp_path).run_dir)
    found = json.loads(views.diagnosis())
    assert found["state"] == "unknown" and found["verdicts"] == [] and found["written"] is None


def test_many_steps_are_thinned(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path)
    append_records(run.run_dir, records_of(range(1, 2101), ranks=8, tp=0.01))
    views = Views(run.run_dir)
    steps = json.loads(views.accounting())["steps"]
    assert len(steps) <= 2000 and steps[-1] == 2100
    append_records(run.run_dir, records_of([2101], ranks=8, tp=0.01)[:7])
    time.sleep(2 * FRESH_SECONDS)
    assert json.loads(views.accounting())["steps"][-1] == 2100, "a step that a rank has not told of waits"
    append_records(run.run_dir, records_of(range(2102, 2106), ranks=8, tp=0.01))
    time.sleep(2 * FRESH_SECONDS)
    assert json.loads(views.accounting())["steps"][-1] == 2105


def test_prometheus_text_has_base_units_and_no_series_per_rank(run: WrittenRun, address: str) -> None:
    text = fetch(f"{address}/metrics")[1]
    assert "trainrt_step 25.0" in text and "trainrt_step_seconds 0.1" in text
    assert 'trainrt_incidents_total{kind="worker_exit"} 1.0' in text
    assert 'trainrt_verdicts{cause="slow_worker"} 1.0' in text and 'trainrt_verdicts{cause="hang"} 0.0' in text
    assert 'trainrt_diagnosis_state{state="straggling"} 1.0' in text and "trainrt_slowdown_ratio 1.51" in text
    assert 'trainrt_step_part_seconds{axis="tp",part="transfer"}' in text
    assert len(re.findall(r'rank="', text)) == 3
    assert f'{{host="n2",place="1",rank="{SLOW_RANK}"}} 1.5' in text


def test_every_answer_forbids_other_origins(address: str) -> None:
    for path in ("/", "/api/run", "/static/page.js"):
        policy = fetch(f"{address}{path}")[2]["Content-Security-Policy"]
        assert "default-src 'self'" in policy and "unsafe" not in policy


def test_the_page_is_small_and_its_own() -> None:
    folder = Path(__file__).parents[2] / "trainrt" / "diagnostics" / "static"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 300_000
    for path in files:
        if path.suffix in (".html", ".css", ".js") and path.parent == folder:
            assert not re.search(r"https?://(?!www\.w3\.org)", path.read_text()), path
            assert not re.search(r"\sstyle=|<style|<script>|\son\w+=\"", path.read_text()), (
                f"{path}: the policy forbids it"
            )


def test_a_token_is_asked_for(run: WrittenRun) -> None:
    with served(run.run_dir.path, "--token", "sesame") as url:
        assert fetch(f"{url}/api/run")[0] == 401
        assert fetch(f"{url}/api/run?token=wrong")[0] == 401
        status, _, headers = fetch(f"{url}/?token=sesame")
        assert status == 200 and "trainrt_token=sesame" in headers["Set-Cookie"]
        assert fetch(f"{url}/api/run", Cookie="trainrt_token=sesame")[0] == 200
        assert fetch(f"{url}/api/run", Authorization="Bearer sesame")[0] == 200


def refused(*arguments: str) -> str:
    command = [sys.executable, "-m", "trainrt.cli", "dashboard", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr


def test_wrong_input_is_refused(run: WrittenRun, tmp_path: Path) -> None:
    path = str(run.run_dir.path)
    assert "--token" in refused(path, "--host", "0.0.0.0")
    assert "no such run directory" in refused(str(tmp_path / "nothing"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert f"--port {taken.getsockname()[1]}" in refused(path, "--port", str(taken.getsockname()[1]))


def test_an_empty_directory_and_torn_lines_are_read(tmp_path: Path) -> None:
    reader = RunReader(RunDir(tmp_path))
    assert not reader.refresh() and reader.status()["state"] == "unknown"
    empty = Views(RunDir(tmp_path))
    assert json.loads(empty.heatmap())["world_size"] == 0 and json.loads(empty.accounting())["steps"] == []
    assert json.loads(empty.timeline(None, None))["step"] is None and json.loads(empty.plan())["hosts"] == []
    assert json.loads(empty.health())["snapshots"]["stores"] == 0 and b"trainrt_up 0.0" in empty.exposition()
    made = WrittenRun(tmp_path / "run")
    made.step()
    with made.run_dir.metrics.open("a") as file:
        file.write('{"step": 2, "inc')
    reader = RunReader(made.run_dir)
    assert reader.refresh() and list(reader.metrics) == [1]
    made.step()
    assert reader.refresh() and list(reader.metrics) == [1, 2], "the torn line is passed over, the next one is read"


def test_written_events_are_what_the_reference_says_and_are_read(tmp_path: Path) -> None:
    directory = RunDir(tmp_path)
    directory.create()
    source = EventRing()
    recorder = Recorder(directory, rank=0, node="n0", incarnation=1, device=torch.device("cpu"), source=source)
    for step in (1, 2):
        with source.span("step", kind="step"), source.span("forward", kind="forward"):
            pass
        recorder.step(step, epoch=0.0)
    for text in directory.events_of(0).read_text().splitlines():
        validate("events", json.loads(text))
    reader = RunReader(directory)
    assert reader.refresh() and reader.windows.steps() == [1, 2] and reader.windows.newest_whole() == 2
    assert reader.windows.lines(2)[0]["events"][0]["name"] == "forward"
    with directory.events_of(0).open("a") as file:
        file.write('{"step": 3, "ra')
    reader.refresh()
    assert reader.windows.steps() == [1, 2] and reader.windows.lines(3) == {}
