"""Hosts leave a run: by a verdict, by request, and not otherwise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.diagnostics.injected import Injected
from tests.launch.runs import alive, environment
from trainrt.diagnostics.verdict import Culprit, Diagnosis, Verdict
from trainrt.launch.eviction import PAUSE_SECONDS, Eviction, Evictions
from trainrt.run_dir import RunDir

HOSTS = ("n0", "n1", "n2")


def verdict(host: str = "n1", **changes: Any) -> Verdict:
    known: dict[str, Any] = {
        "cause": "slow_worker", "kind": "rank", "culprits": [Culprit(1, host)], "victims": [0], "share": 0.2,
        "seconds_a_step": 0.1, "cost_device_hours": 0.1, "action": "evict", "confidence": 0.95, "sentence": "Slow.",
        "evidence": [],
    }  # fmt: skip
    return Verdict(**{**known, **changes})


def diagnosis(*verdicts: Verdict) -> Diagnosis:
    return Diagnosis("straggling", 1.0, 0.8, 1.25, {}, verdicts)


class Policy:
    """Evictions of a run directory, and what they told."""

    def __init__(self, path: Path, *, automatic: bool = True) -> None:
        self.told: list[str] = []
        self.run_dir = RunDir(path)
        self.run_dir.create()
        self.evictions = Evictions(self.run_dir, automatic=automatic, tell=self.told.append)

    def __call__(self, *verdicts: Verdict, now: float = 0.0, hosts: tuple[str, ...] = HOSTS) -> Eviction | None:
        return self.evictions.wanted(diagnosis(*verdicts), hosts=hosts, now=now)


def test_a_verdict_is_carried_out_when_it_was_said_twice(tmp_path: Path) -> None:
    said = Policy(tmp_path)
    assert said(verdict()) is None
    assert said(verdict()) == Eviction("n1", "Slow.", (1,))


def test_a_diagnosis_counts_once(tmp_path: Path) -> None:
    said, same = Policy(tmp_path), diagnosis(verdict())
    assert all(said.evictions.wanted(same, hosts=HOSTS, now=0.0) is None for _ in range(5))


@pytest.mark.parametrize("changes", [
    {"confidence": 0.89}, {"action": "wait"}, {"cause": "sequence_imbalance"}, {"cause": "expert_imbalance"},
    {"cause": "stage_imbalance"}, {"cause": "slow_data"}, {"culprits": [Culprit(1, "n1"), Culprit(2, "n2")]}, {"culprits": []},
    {"culprits": [Culprit(9, "elsewhere")]},
])  # fmt: skip
def test_no_host_is_evicted_for_anything_else(tmp_path: Path, changes: dict[str, Any]) -> None:
    said = Policy(tmp_path)
    assert [said(verdict(**changes)) for _ in range(3)] == [None] * 3


def test_one_that_was_not_said_in_between_is_not_said_twice(tmp_path: Path) -> None:
    said = Policy(tmp_path)
    assert [said(verdict()), said(), said(verdict())] == [None] * 3


def test_the_last_host_stays(tmp_path: Path) -> None:
    said = Policy(tmp_path)
    assert [said(verdict(), hosts=("n1",)) for _ in range(3)] == [None] * 3


def test_there_is_a_pause_between_evictions(tmp_path: Path) -> None:
    said = Policy(tmp_path)
    said.evictions.done(100.0)
    assert [said(verdict("n2"), now=100.0 + PAUSE_SECONDS / 2) for _ in range(3)] == [None] * 3
    assert said(verdict("n2"), now=101.0 + PAUSE_SECONDS) is not None


def test_advice_is_given_once(tmp_path: Path) -> None:
    said = Policy(tmp_path, automatic=False)
    assert [said(verdict()) for _ in range(4)] == [None] * 4
    assert said.told == [f"advice action=evict host=n1: trainrt evict {said.run_dir} n1"]


def test_a_request_is_carried_out_at_once(tmp_path: Path) -> None:
    said = Policy(tmp_path, automatic=False)
    said.run_dir.evict_request.write_text("n2")
    assert said() == Eviction("n2", "trainrt evict")
    said.run_dir.evict_request.write_text("n7")
    assert said() is None and "allowed: one of n0, n1, n2" in said.told[-1]
    assert not said.run_dir.evict_request.exists()


def evict(run: Injected, host: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "trainrt.cli", "evict", str(run.directory), host]
    return subprocess.run(words, capture_output=True, text=True, env=environment(), check=False)


def test_a_slow_host_is_replaced_by_a_spare_one_and_then_another_leaves_by_request(tmp_path: Path) -> None:
    run = Injected.of(
        tmp_path, cluster={"nodes": 2, "workers_per_node": 1, "spare_nodes": 1}, diagnostics={"evict": "automatic"}
    )
    run.launch()
    try:
        run.until_step(20)
        stores = set(run.pids("store").values())
        assert not run.lines("incidents"), "negative control: nobody is evicted from a run that is well"
        run.order("compute", run.pids("worker")["n1", 1], 0.3)
        incident = run.incident(0)
        assert (incident["kind"], incident["nodes"], incident["action"]) == ("node_loss", ["n1"], "replace")
        assert incident["ranks"] == [1] and "evicted: Rank 1 on n1 is slow" in incident["message"]
        assert (incident["steps_lost"], incident["restored_from"]) == (0, "memory")
        assert set(run.pids("worker")) == {("n0", 0), ("n2", 1)}
        run.until_step(run.step + 10)
        wrong = evict(run, "n1")
        assert wrong.returncode == 2 and "allowed: n0, n2" in wrong.stderr
        assert evict(run, "n0").returncode == 0
        shrunk = run.incident(1)
        assert (shrunk["nodes"], shrunk["action"], shrunk["steps_lost"]) == (["n0"], "shrink", 0)
        run.until_step(run.step + 5)
        assert len(run.lines("incidents")) == 2 and set(run.pids("worker")) == {("n2", 0)}
    finally:
        run.end()
    assert run.leftovers() == [] and not any(alive(pid) for pid in stores), "stores of hosts that left end, too"
