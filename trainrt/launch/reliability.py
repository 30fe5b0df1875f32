"""What this run has seen of failures, and what follows for snapshots, parity and the time that counts."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from trainrt.checkpoint.policy import best_parity, node_mtbf_seconds
from trainrt.config import JobConfig
from trainrt.run_dir import RunDir, now

FAILURES = ("worker_exit", "worker_hang", "node_loss", "store_loss", "driver_loss")
ENOUGH_FAILURES = 2
"""One failure says nothing of the time between two."""
WINDOW_SECONDS = 30.0
"""From a failure until the group is protected again, before one was seen."""


class Reliability:
    """Failures over the life of the run directory, and effective training time over that of this launch."""

    def __init__(self, run_dir: RunDir, config: JobConfig) -> None:
        self._config = config
        lines = run_dir.read_metrics()
        self._since = lines[0]["time"] if lines else now()
        self._failures, self._window = 0, WINDOW_SECONDS
        for incident in run_dir.read_incidents():
            self.seen(incident)
        self._furthest = max((line["step"] for line in lines), default=0)
        self._steps, self._productive = 0, 0.0
        self._began: float | None = None

    # Failures.

    def seen(self, incident: Mapping[str, Any]) -> None:
        """An incident is over."""
        if incident["kind"] in FAILURES and incident["action"] in ("restart", "replace", "shrink"):
            self._failures += max(1, len(incident["nodes"]))
            self._window = max(self._window, incident["recovered_seconds"] or 0.0)

    def node_mtbf_seconds(self) -> float:
        """As given; else what is usual, or what was seen where that is worse."""
        expected = node_mtbf_seconds(self._config)
        if self._config.cluster.node_mtbf_hours != "auto" or self._failures < ENOUGH_FAILURES:
            return expected
        return min(expected, max(1.0, now() - self._since) * self._config.cluster.nodes / self._failures)

    def parity_shards(self, hosts: Mapping[str, str], *, node_bytes: float, memory_bytes: float) -> int:
        """For `snapshot.parity_shards = "auto"`. hosts: node to host. Bytes of a node: its state, its shared memory."""
        asked = self._config.snapshot.data_shards
        return best_parity(
            hosts, data_shards=None if asked == "auto" else asked, node_bytes=node_bytes, memory_bytes=memory_bytes,
            node_mtbf_seconds=self.node_mtbf_seconds(), window_seconds=self._window, loss_seconds=self._loss_seconds(),
        )  # fmt: skip

    def _loss_seconds(self) -> float:
        """What goes with a generation: half of what lies between two checkpoints, or half the run so far."""
        step = self._productive / max(1, self._steps) if self._began is not None else 1.0
        every = self._config.checkpoint.every or max(self._furthest, 100)
        return every * step / 2

    # Effective training time.

    def line(self, metrics: Mapping[str, Any]) -> None:
        """A step's metrics. What is done again counts once."""
        if self._began is None:
            self._began = time.monotonic() - metrics["step_seconds"]
        if metrics["step"] > self._furthest:
            self._furthest = metrics["step"]
            self._steps += 1
            self._productive += metrics["step_seconds"] - metrics["snapshot_stall_seconds"]

    def effective_time(self) -> float | None:
        """The share of this launch, from its first step on, that went to steps that count."""
        if self._began is None:
            return None
        return min(1.0, self._productive / max(1e-9, time.monotonic() - self._began))
