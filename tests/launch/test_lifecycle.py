"""A launch as its user sees it: it ends cleanly, goes on, refuses what does not fit, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.jobs import job
from tests.launches import alive, finish, launched, pids, wait_for, wait_step, write_job
from tests.reference import validate
from trainrt.checkpoint.inspect import verify
from trainrt.config import JobConfig
from trainrt.diagnostics.telemetry import Summaries
from trainrt.run_dir import RunDir, read_lines

ONE_NODE = {"nodes": 1, "workers_per_node": 2}
"""Starts faster, where the number of nodes makes no difference."""


def small(folder: Path, *, steps: int = 60, mesh: dict[str, int] | None = None, **sections: Any) -> JobConfig:
    """A job of two nodes with one worker each on a small text, with steps of some 20 ms."""
    text = folder / "text.txt"
    text.write_text("".join(chr(33 + (i * i // 7) % 31) for i in range(20000)))
    model = {"config": {"layers": 2, "hidden_size": 32, "intermediate_size": 32, "vocab_size": 320, "max_position": 32}}
    document: dict[str, Any] = {
        "model": model,
        "data": {"source": str(text)},
        "cluster": {"nodes": 2, "workers_per_node": 1},
        "run": {"steps": steps, "deterministic": True},
        "checkpoint": {"every": 0},
        "diagnostics": {"dashboard": False},
        "evaluation": {"samples": 4},
    }
    for name, values in sections.items():
        document[name] = {**document.get(name, {}), **values}
    return job(mesh=mesh or {"fsdp": 2}, **document)


def run(path: Path, run_dir: RunDir, *options: str) -> tuple[int, str]:
    with launched(path, run_dir.path, *options) as process:
        output = finish(process)
        return process.returncode, output


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trainrt.cli", *arguments], capture_output=True, text=True, timeout=120
    )


def test_a_run_ends_with_a_checkpoint_and_leaves_nothing_behind(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    config = small(tmp_path, diagnostics={"dashboard": True})
    with launched(write_job(tmp_path, config), run_dir.path) as process:
        wait_step(run_dir, 3)
        seen = pids(run_dir)
        roles = {entry["role"] for entry in (run_dir.read_cluster() or {})["processes"]}
        validate("cluster", run_dir.read_cluster())
        validate("status", run_dir.read_status())
        assert roles == {"driver", "agent", "worker", "store", "raylet"}
        output = finish(process)
    assert process.returncode == 0, output
    status = run_dir.read_status()
    assert status is not None and (status["state"], status["step"]) == ("finished", 60)
    assert verify(run_dir.checkpoint(60))["ok"]
    wait_for(lambda: not any(alive(pid) for pid in seen), "end of every process of the run", timeout=20)
    assert not Path(f"/dev/shm/trainrt-{status['run_id']}").exists()
    for line in run_dir.read_metrics():
        validate("metrics", line)
    assert [line["step"] for line in run_dir.read_metrics()] == list(range(1, 61))
    for path in sorted(run_dir.events.glob("rank-*.jsonl")):
        for text in path.read_text().splitlines():
            validate("events", json.loads(text))
    summaries = Summaries(run_dir)
    summaries.refresh()
    table, seats = summaries.table(100), read_lines(run_dir.seats)
    assert list(table.steps) == list(range(1, 61)) and not np.isnan(table.seconds).any()
    for line in seats:
        validate("seats", line)
    for line in read_lines(run_dir.links):
        validate("links", line)
    said = {line["step"]: line["time"] for line in run_dir.read_metrics()}
    assert all(abs(start - said[step]) < 5 for step, start in zip(table.steps, table.start[:, 0], strict=True))
    validate("plan", json.loads(run_dir.plan.read_text()))
    validate("status", status)
    assert "unigram entropy" in output and "http://127.0.0.1" in output and str(run_dir.checkpoint(60)) in output

    # Launched again it says so; with more steps it goes on, on another mesh too.
    code, output = run(tmp_path / "job.toml", run_dir)
    assert (code, "finished at step 60" in output) == (0, True), output
    code, output = run(write_job(tmp_path, small(tmp_path, steps=70, mesh={"tp": 2})), run_dir)
    assert code == 0, output
    assert [line["step"] for line in run_dir.read_metrics()] == list(range(1, 71))
    restored = (run_dir.read_status() or {})["restored_bytes"]
    assert restored["read"] == restored["wanted"] == restored["stored"] > 0, "each byte was read once in the job"
    assert "each wanted byte 1.00 times" in output
    validate("status", run_dir.read_status())
    code, output = run(write_job(tmp_path, small(tmp_path, steps=80, optimizer={"learning_rate": 1e-3})), run_dir)
    assert code == 2 and "optimizer.learning_rate" in output and "--force" in output, output


@pytest.mark.campaign
def test_a_launch_again_places_experts_by_what_was_counted(tmp_path: Path) -> None:
    """Experts move through the checkpoint of step 10; what is learned is what it would be without."""

    def launch(run_dir: RunDir, steps: int, placement: str) -> tuple[dict[str, Any], str]:
        # What is measured may choose strategies: they do not change what is learned.
        sections = {"model": {"dtype": "float64"}, "moe": {"placement": placement}, "run": {"deterministic": False}}
        path = write_job(tmp_path, small(tmp_path, steps=steps, mesh={"fsdp": 2, "ep": 2}, **sections))
        code, output = run(path, run_dir)
        assert code == 0, output
        counts, plan = (json.loads(path.read_text()) for path in (run_dir.experts, run_dir.plan))
        strategies = json.loads(run_dir.strategies.read_text())
        for name, document in (("experts", counts), ("plan", plan), ("strategies", strategies)):
            validate(name, document)
        last = run_dir.read_metrics()[-1]
        validate("metrics", last)
        assert sum(line["calls"] for line in last["moe_strategies"]) == 2 * 2, "two layers, two logical shards a rank"
        # One shard of 2 x 16 tokens a rank and step, each with 2 experts; a launch begins anew.
        assert counts["step"] == steps and sum(map(sum, counts["traffic"][0])) == 10 * 2 * 64
        return plan, output

    stayed, moved = RunDir(tmp_path / "stayed"), RunDir(tmp_path / "moved")
    launch(stayed, 10, "none")
    shutil.copytree(stayed.path, moved.path)
    plan, _ = launch(stayed, 20, "none")
    assert not plan["expert_orders"]
    plan, output = launch(moved, 20, "affinity")
    assert plan["expert_orders"] and "placed by the counts until step 10" in output
    placed = plan["expert_placement"]
    before, after = zip(placed["rows_across_hosts"], placed["rows_of_busiest"], strict=True)
    assert after[0] / 2 + after[1] < before[0] / 2 + before[1] and placed["optimal"]
    assert verify(moved.checkpoint(20))["ok"]
    ends = [[line["loss"] for line in run_dir.read_metrics()] for run_dir in (stayed, moved)]
    assert len(ends[0]) == 20 and ends[0] == pytest.approx(ends[1], rel=1e-11)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), pytest.param(signal.SIGINT, 130, marks=pytest.mark.campaign)]
)
def test_a_signal_ends_with_a_checkpoint_and_the_same_command_goes_on(
    number: signal.Signals, code: int, tmp_path: Path
) -> None:
    run_dir = RunDir(tmp_path / "run")
    packed = {"checkpoint": {"compress": "zstd"}} if number == signal.SIGTERM else {}
    path = write_job(tmp_path, small(tmp_path, steps=100 if number == signal.SIGTERM else 5000, **packed))
    with launched(path, run_dir.path) as process:
        wait_step(run_dir, 5)
        seen = pids(run_dir)
        process.send_signal(number)
        output = finish(process)
    assert process.returncode == code, output
    status = run_dir.read_status()
    assert status is not None and status["state"] == "interrupted"
    checkpoint = run_dir.checkpoint(status["step"])
    assert verify(checkpoint)["ok"]
    assert {path.suffix for path in (checkpoint / "optimizer").iterdir()} == {".zst" if packed else ".safetensors"}
    wait_for(lambda: not any(alive(pid) for pid in seen), "end of every process of the run", timeout=20)
    if number == signal.SIGTERM:
        chosen = {"snapshot": {"every": "auto", "parity_shards": "auto"}, "cluster": {"node_mtbf_hours": 0.01}}
        returned, output = run(write_job(tmp_path, small(tmp_path, steps=100, **chosen)), run_dir)
        assert returned == 0, output
        lines = run_dir.read_metrics()
        assert [line["step"] for line in lines] == list(range(1, 101))
        again = [line["snapshot_every"] for line in lines if line["incarnation"] == 2]
        assert again[0] == 1 and 0 in again and again[-1] >= 1, (
            "steps with a snapshot, steps without, and what was chosen"
        )
        assert "effective time" in output and 0 < run_dir.read_status()["effective_time"] <= 1


def test_a_directory_in_use_is_refused_and_status_and_stop_work(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    path = write_job(tmp_path, small(tmp_path, steps=100000, cluster=ONE_NODE))
    started = cli("launch", str(path), "--run-dir", str(run_dir.path), "--detach")
    assert started.returncode == 0, started.stderr
    wait_step(run_dir, 3)
    again = cli("launch", str(path), "--run-dir", str(run_dir.path))
    assert again.returncode == 2 and "in use" in again.stderr, again.stderr
    document = json.loads(cli("status", str(run_dir.path), "--json").stdout)
    assert document["state"] == "running"
    validate("status", document)
    assert cli("stop", str(run_dir.path)).returncode == 0
    wait_for(lambda: (run_dir.read_status() or {})["state"] == "interrupted", "the stop")
    wait_for(lambda: not any(alive(pid) for pid in pids(run_dir)), "end of every process", timeout=30)
    assert cli("status", str(tmp_path / "nothing")).returncode == 2


RAISES = """
from trainrt import Pipeline
from trainrt.training.data import collate

calls = 0

def strict_collate(samples):
    global calls
    calls += 1
    if calls > 9:
        raise ValueError("the ninth batch is cursed")
    return collate(samples)

pipeline = Pipeline(collate=strict_collate)
"""


def test_a_users_exception_is_told_once_and_stops_the_job(tmp_path: Path) -> None:
    (tmp_path / "my_pipeline.py").write_text(RAISES)
    run_dir = RunDir(tmp_path / "run")
    config = small(tmp_path, run={"pipeline": "my_pipeline:pipeline", "steps": 60}, cluster=ONE_NODE)
    code, output = run(write_job(tmp_path, config), run_dir)
    assert code == 1, output
    assert output.count("the ninth batch is cursed") <= 2, output
    assert "rank" in output
    assert (run_dir.read_status() or {})["state"] == "failed"
    kinds = [(incident["kind"], incident["action"]) for incident in run_dir.read_incidents()]
    assert kinds[-1] == ("user_error", "stop"), kinds
    for incident in run_dir.read_incidents():
        validate("incident", incident)


@pytest.mark.campaign
def test_an_infinite_loss_is_skipped_if_the_job_says_so(tmp_path: Path) -> None:
    explosive = {"learning_rate": 1e30, "clip": 0.0, "warmup_steps": 0, "non_finite": "skip"}
    run_dir = RunDir(tmp_path / "run")
    code, output = run(write_job(tmp_path, small(tmp_path, optimizer=explosive, steps=12, cluster=ONE_NODE)), run_dir)
    assert code == 0, output
    assert {(i["kind"], i["action"]) for i in run_dir.read_incidents()} == {("non_finite", "skip")}
    for line in run_dir.read_metrics():
        validate("metrics", line)


@pytest.mark.campaign
def test_a_port_in_use_is_left_for_the_next_free_one(tmp_path: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        run_dir = RunDir(tmp_path / "run")
        config = small(tmp_path, steps=5, diagnostics={"dashboard": True, "port": port}, cluster=ONE_NODE)
        code, output = run(write_job(tmp_path, config), run_dir)
        assert code == 0, output
        assert "http://127.0.0.1:" in output and f"http://127.0.0.1:{port}\n" not in output
        refused = cli("dashboard", str(run_dir.path), "--port", str(port))
        assert refused.returncode == 2 and f"--port {port}" in refused.stderr


@pytest.mark.campaign
@pytest.mark.skipif(os.geteuid() != 0, reason="a small /dev/shm of one's own needs root")
def test_no_room_in_shared_memory_costs_snapshots_and_not_the_run(tmp_path: Path) -> None:
    """In a mount namespace whose /dev/shm holds the first snapshot of each rank but not the second."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "vocab_size": 320, "max_position": 32}
    config = small(tmp_path, steps=8, model={"config": {"layers": 2, "heads": 8, **sizes}})
    run_dir = RunDir(tmp_path / "run")
    command = f"{sys.executable} -m trainrt.cli launch {write_job(tmp_path, config)} --run-dir {run_dir.path}"
    script = f"mount -t tmpfs -o size=250m tmpfs /dev/shm && exec {command}"
    result = subprocess.run(["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, timeout=150)
    assert result.returncode == 0, result.stdout + result.stderr
    assert run_dir.read_metrics()[-1]["snapshots_skipped"] > 0
    assert [line["step"] for line in run_dir.read_metrics()] == list(range(1, 9))
    assert verify(run_dir.checkpoint(8))["ok"]


@pytest.mark.campaign
@pytest.mark.skipif(os.geteuid() != 0, reason="a small file system of one's own needs root")
def test_no_room_for_checkpoints_is_said_and_training_goes_on_to_its_end(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    run_dir.create()
    path = write_job(tmp_path, small(tmp_path, steps=30, checkpoint={"every": 10}, cluster=ONE_NODE))
    script = (
        f"mount -t tmpfs -o size=100k tmpfs {run_dir.checkpoints} && "
        f"exec {sys.executable} -m trainrt.cli launch {path} --run-dir {run_dir.path}"
    )
    result = subprocess.run(["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, timeout=150)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "no room for a checkpoint" in result.stdout + result.stderr
    assert [line["step"] for line in run_dir.read_metrics()] == list(range(1, 31))
    first = run_dir.read_incidents()[0]
    assert (first["kind"], first["action"], first["step"]) == ("storage", "skip", 10)
