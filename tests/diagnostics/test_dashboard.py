"""The page's server over real sockets: what it says, whom it admits, what it refuses."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.diagnostics.run_directories import SLOW_RANK, WrittenRun
from tests.reference import validate
from trainrt.diagnostics.reader import RunReader
from trainrt.diagnostics.summaries import heatmap
from trainrt.run_dir import RunDir


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
    for _ in range(25):
        made.step()
    made.incident()
    return made


@pytest.fixture(scope="module")
def address(run: WrittenRun) -> Iterator[str]:
    with served(run.run_dir.path) as url:
        yield url


def test_the_api_tells_the_run(run: WrittenRun, address: str) -> None:
    about = json.loads(fetch(f"{address}/api/run")[1])
    assert (about["status"]["state"], about["status"]["live"], about["plan"]["world_size"]) == ("running", False, 4)
    lines = json.loads(fetch(f"{address}/api/metrics")[1])["lines"]
    assert [line["step"] for line in lines] == list(range(1, 26))
    assert [line["step"] for line in json.loads(fetch(f"{address}/api/metrics?after=24")[1])["lines"]] == [25]
    assert json.loads(fetch(f"{address}/api/incidents")[1])["incidents"][0]["kind"] == "worker_exit"
    timeline = json.loads(fetch(f"{address}/api/timeline?step=7")[1])
    assert timeline["step"] == 7 and [rank["rank"] for rank in timeline["ranks"]] == [0, 1, 2, 3]
    assert {event["name"] for event in timeline["ranks"][0]["events"]} >= {"forward", "fsdp_reduce_scatter"}


def test_self_time_names_the_slow_rank_and_not_those_that_wait_for_it(run: WrittenRun, address: str) -> None:
    cells = {cell["rank"]: cell for cell in json.loads(fetch(f"{address}/api/heatmap")[1])["cells"]}
    assert max(cells, key=lambda rank: cells[rank]["ratio"]) == SLOW_RANK
    assert cells[SLOW_RANK]["ratio"] == pytest.approx(1.6, abs=0.01)
    assert cells[0]["seconds"] == pytest.approx(cells[SLOW_RANK]["seconds"], abs=1e-6), "by step time all are alike"
    assert cells[SLOW_RANK]["host"] == "n1"


def test_prometheus_text_has_base_units_and_no_series_per_rank(run: WrittenRun, address: str) -> None:
    text = fetch(f"{address}/metrics")[1]
    assert "trainrt_step 25.0" in text and "trainrt_step_seconds 0.1" in text
    assert 'trainrt_incidents_total{kind="worker_exit"} 1.0' in text
    assert len(re.findall(r'rank="', text)) == 1 and f'rank="{SLOW_RANK}"' in text


def test_every_answer_forbids_other_origins(address: str) -> None:
    for path in ("/", "/api/run", "/static/page.js"):
        assert "default-src 'self'" in fetch(f"{address}{path}")[2]["Content-Security-Policy"]


def test_the_page_is_small_and_its_own() -> None:
    folder = Path(__file__).parents[2] / "trainrt" / "diagnostics" / "static"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 300_000
    for path in files:
        if path.suffix in (".html", ".css", ".js") and path.parent == folder:
            assert not re.search(r"https?://(?!www\.w3\.org)", path.read_text()), path


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
    assert heatmap(reader)["cells"] == []
    made = WrittenRun(tmp_path / "run")
    made.step()
    with made.run_dir.metrics.open("a") as file:
        file.write('{"step": 2, "inc')
    reader = RunReader(made.run_dir)
    assert reader.refresh() and list(reader.metrics) == [1]
    made.step()
    assert reader.refresh() and list(reader.metrics) == [1, 2], "the torn line is passed over, the next one is read"


def test_written_events_are_what_the_reference_says(run: WrittenRun) -> None:
    for text in run.run_dir.events_of(0).read_text().splitlines():
        validate("events", json.loads(text))
