"""Run directories as a run writes them, of made-up steps in which one rank is slow on purpose."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from tests.diagnostics.made_steps import MadeStep, made_step
from tests.diagnostics.summary_files import append_records, append_seats
from trainrt.config import MeshSize
from trainrt.diagnostics.table import Roles
from trainrt.diagnostics.telemetry import read_seats
from trainrt.diagnostics.verdict import Culprit, Diagnosis, Verdict
from trainrt.run_dir import RunDir, append_line, write_json

SLOW_RANK = 5
SIZE = MeshSize(pp=2, fsdp=2, tp=2, ep=2)


class WrittenRun:
    """A run of two ranks a host; `step()` appends one step of every file. Of more than 64 ranks few write events."""

    def __init__(self, path: Path, *, state: str = "running", size: MeshSize = SIZE, host_ranks: int = 2) -> None:
        self.run_dir = RunDir(path)
        self.run_dir.create()
        self.size, self.ranks = size, size.world_size
        self.step_number, self.incarnation = 0, 1
        self.slow = {SLOW_RANK: 1.6}
        mesh = {axis: getattr(size, axis) for axis in ("pp", "dp", "fsdp", "cp", "tp", "ep")}
        write_json(self.run_dir.plan, {
            "mesh": mesh, "world_size": self.ranks, "parameters": [], "memory_bytes_per_rank": 3 << 30,
            "predicted_step_seconds": 0.09, "alternatives": [],
        })  # fmt: skip
        append_seats(self.run_dir, size, incarnation=1, host_ranks=host_ranks)
        self.roles: Roles = read_seats(self.run_dir)[-1].roles
        self._noise = np.random.default_rng(7)
        self.status(state)

    def status(self, state: str, *, protection: str = "degraded", message: str = "") -> None:
        write_json(self.run_dir.status, {
            "state": state, "run_id": "abcd", "step": self.step_number, "steps": 4000, "incarnation": self.incarnation,
            "world_size": self.ranks, "protection": protection, "message": message, "time": time.time(),
            "unigram_entropy": 3.24,
        })  # fmt: skip

    def steps(self, number: int, *, events: Iterable[int] | None = None) -> None:
        for _ in range(number):
            self.step(events=events)

    def step(self, *, events: Iterable[int] | None = None) -> None:
        """events: the ranks that write theirs; all of a small run, if none are named."""
        self.step_number += 1
        made = made_step(self.roles, self._noise, slow=self.slow)
        append_records(self.run_dir, made.records(self.step_number, self.incarnation))
        chosen = events if events is not None else range(self.ranks if self.ranks <= 64 else 0)
        for rank in chosen:
            self._events(rank, made)
        self._metrics(float(made.seconds.max()))
        self.status("running")

    def _events(self, rank: int, made: MadeStep) -> None:
        waiting = float(sum(made.communication[axis][rank] for axis in made.communication))
        append_line(self.run_dir.events_of(rank), {
            "step": self.step_number, "rank": rank, "node": self.roles.hosts[self.roles.host[rank]],
            "incarnation": self.incarnation, "time": made.start, "seconds": float(made.seconds[rank]),
            "waiting_seconds": waiting, "self_seconds": float(made.seconds[rank]) - waiting, "dropped": 0,
            "events": made.events(rank),
        })  # fmt: skip

    def _metrics(self, seconds: float) -> None:
        number = self.step_number
        append_line(self.run_dir.metrics, {
            "step": number, "loss": 3.0 + 2.5 * float(np.exp(-number / 60)), "grad_norm": 1.0, "learning_rate": 1e-3,
            "tokens": 4096, "step_seconds": seconds, "tokens_per_second": 4096 / seconds, "mfu": 0.31,
            "snapshot_stall_seconds": 0.002, "snapshots_skipped": 0, "samples_digest": "00", "snapshot_every": 1,
            "incarnation": self.incarnation, "world_size": self.ranks, "time": time.time(),
            "moe_strategies": [{"strategy": "r 1, degree 4, backward degree 4", "calls": 8, "why": "measured, confidence 0.97"}],
            "moe_trials": 5, "moe_trials_exhaustive": 24,
        })  # fmt: skip

    def incident(self) -> None:
        append_line(self.run_dir.incidents, {
            "kind": "worker_exit", "ranks": [1], "nodes": ["n0"], "step": self.step_number, "detected_seconds": 0.01,
            "recovered_seconds": 1.5, "steps_lost": 1, "restored_from": "memory", "action": "restart",
            "message": "rank 1 ended by SIGKILL",
            "phases": {"restart_seconds": 0.8, "restore_seconds": 0.3, "first_step_seconds": 0.4},
        })  # fmt: skip

    def diagnose(self, document: Diagnosis | None = None) -> None:
        """Write a diagnosis: that the slow rank is slow, if none is given."""
        write_json(self.run_dir.diagnosis, (document or slow_worker(self)).to_json())


def slow_worker(run: WrittenRun) -> Diagnosis:
    """What a diagnosis says of the rank that is slow."""
    host = run.roles.hosts[run.roles.host[SLOW_RANK]]
    step = run.step_number
    verdict = Verdict(
        cause="slow_worker", kind="rank", culprits=[Culprit(SLOW_RANK, host, stage=1, dp_rank=0)],
        victims=[rank for rank in range(8) if rank != SLOW_RANK], share=0.34, seconds_a_step=0.062, cost_device_hours=1.9,
        action="evict", confidence=0.94, since_step=max(1, step - 20),
        sentence=f"Rank {SLOW_RANK} on {host} computes 1.6 times as long as its peers; without it a step takes 121 ms, not 183.",
        evidence=[
            f"rank {SLOW_RANK} is slower than ranks 4, 6 and 7, which do the same work, in 20 of 20 steps",
            f"in step {step} all 7 others wait for rank {SLOW_RANK}",
            f"the other rank of {host}, rank 4, is as fast as its peers",
        ],
    )  # fmt: skip
    return Diagnosis(
        "straggling", 0.183, 0.121, 1.51, {"M_W": 0.93, "M_S": 0.04}, [verdict], max(1, step - 20), step,
        ["Clocks of hosts agree within 0.4 ms."],
    )  # fmt: skip


def diagnosis(state: str, **changes: Any) -> Diagnosis:
    """One without verdicts."""
    empty: dict[str, Any] = {
        "step_seconds": 0.09,
        "ideal_step_seconds": 0.089,
        "slowdown": 1.01,
        "metrics": {"M_W": 0.0, "M_S": 0.0},
    }
    return Diagnosis(state, **{**empty, **changes})
