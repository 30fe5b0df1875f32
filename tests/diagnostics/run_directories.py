"""Run directories as a run writes them: through the same writers, with a rank that is slow on purpose."""

from __future__ import annotations

import time
from base64 import b64encode
from pathlib import Path

import torch

from trainrt.events import EventRing
from trainrt.launch.telemetry import Telemetry
from trainrt.run_dir import RunDir, append_line, write_json
from trainrt.training.recorder import Recorder

SLOW_RANK = 3


class FakeClockRing(EventRing):
    """A ring into which spans of chosen lengths are put, so that tests need not sleep."""

    def put_step(self, *, at: float, compute: float, waiting: float) -> None:
        middle, end = at + compute, at + compute + waiting
        for event in (
            ("forward", "forward", 1, at, middle, 0, "", False, -1, 0),
            ("fsdp_reduce_scatter", "collective", 1, middle, end, 4096, "fsdp", True, self.next_of("fsdp"), 0),
            ("step", "step", 0, at, end, 0, "", False, -1, -1),
        ):
            self._slots[self._written % len(self._slots)] = event
            self._written += 1


class WrittenRun:
    """A run of 2 nodes x 2 ranks; `step()` appends one step of every file."""

    def __init__(self, path: Path, *, state: str = "running") -> None:
        self.run_dir = RunDir(path)
        self.run_dir.create()
        self.step_number = 0
        self.rings = [FakeClockRing() for _ in range(4)]
        write_json(self.run_dir.window, {"first": 1, "last": 1000})
        nodes = {rank: f"n{rank // 2}" for rank in range(4)}
        self.recorders = [
            Recorder(
                self.run_dir, rank=r, node=nodes[r], incarnation=1, device=torch.device("cpu"), source=self.rings[r]
            )
            for r in range(4)
        ]
        mesh = {"pp": 1, "dp": 1, "fsdp": 4, "cp": 1, "tp": 1, "ep": 2}
        self.telemetry = Telemetry(self.run_dir)
        self.telemetry.seats(incarnation=1, mesh=mesh, nodes=nodes, first_step=1)
        write_json(self.run_dir.plan, {
            "mesh": mesh, "world_size": 4, "parameters": [],
            "memory_bytes_per_rank": 1 << 24, "predicted_step_seconds": 0.05, "alternatives": [],
        })  # fmt: skip
        self.status(state)

    def status(self, state: str, *, protection: str = "degraded", message: str = "") -> None:
        write_json(self.run_dir.status, {
            "state": state, "run_id": "abcd", "step": self.step_number, "steps": 40, "incarnation": 1, "world_size": 4,
            "protection": protection, "message": message, "time": time.time(), "unigram_entropy": 3.24,
        })  # fmt: skip

    def step(self) -> None:
        self.step_number += 1
        number, now = self.step_number, time.perf_counter()
        for rank, (ring, recorder) in enumerate(zip(self.rings, self.recorders, strict=True)):
            compute = 0.08 if rank == SLOW_RANK else 0.05
            ring.put_step(at=now, compute=compute, waiting=0.1 - compute)
            record = recorder.step(number)
            assert record is not None
            self.telemetry.summary(b64encode(record).decode())
        self.telemetry.flush()
        append_line(self.run_dir.metrics, {
            "step": number, "loss": 5.0 - 0.05 * number, "grad_norm": 1.0, "learning_rate": 1e-3, "tokens": 4096,
            "step_seconds": 0.1, "tokens_per_second": 40960.0, "mfu": 0.31, "snapshot_stall_seconds": 0.002,
            "snapshots_skipped": 0, "samples_digest": "00", "incarnation": 1, "world_size": 4, "time": time.time(),
            "moe_strategies": [{"strategy": "r 1, degree 4, backward degree 4", "calls": 8, "why": "measured, confidence 0.97"}],
            "moe_trials": 5, "moe_trials_exhaustive": 24,
        })  # fmt: skip
        self.status("running")

    def incident(self) -> None:
        append_line(self.run_dir.incidents, {
            "kind": "worker_exit", "ranks": [1], "nodes": ["n0"], "step": self.step_number, "detected_seconds": 0.01,
            "recovered_seconds": 1.5, "steps_lost": 1, "restored_from": "memory", "action": "restart",
            "message": "rank 1 ended by SIGKILL",
        })  # fmt: skip
