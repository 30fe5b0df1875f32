"""What a rank tells of its steps: at the end of each a summary for the driver, and lines of events where they are wanted."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from typing import Any

import torch

from trainrt.diagnostics.recording.summary import summary
from trainrt.diagnostics.recording.windows import EventWriter
from trainrt.events import EventRing, record_garbage, ring
from trainrt.run_dir import RunDir
from trainrt.training.compiling import record_compilation
from trainrt.training.device_clock import DeviceClock


class Recorder:
    """One rank's records of one incarnation."""

    def __init__(
        self, run_dir: RunDir, *, rank: int, node: str, incarnation: int, device: torch.device, source: EventRing = ring
    ) -> None:
        self._ring, self._rank, self._incarnation, self._device = source, rank, incarnation, device
        self._writer = EventWriter(
            run_dir.events_of(rank), rank=rank, node=node, incarnation=incarnation, asked=run_dir.window
        )
        self._tokens = self._squares = 0.0
        source.clear()
        self._clock = DeviceClock(device, source) if device.type == "cuda" else None
        record_garbage()
        record_compilation()

    def batch(self, batch: Mapping[str, Any]) -> None:
        """A batch that this rank computes: its sequences are work."""
        tokens, squares = work_of(batch)
        self._tokens += tokens
        self._squares += squares

    def step(self, step: int, *, epoch: float) -> bytes | None:
        """The summary of a step that has just ended (112 bytes, `SUMMARY`), None where nothing was recorded.

        epoch: seconds since the epoch, on the driver's clock, at zero of the ring's.
        """
        events = self._ring.drain()
        if self._clock is not None:
            self._clock.step()
        work = {"tokens": self._tokens, "squares": self._squares, "rows": float(self._ring.rows)}
        self._tokens = self._squares = 0.0
        self._ring.rows = 0
        if not events or events[-1].kind != "step":
            return None
        self._writer.step(step, events, epoch=epoch, dropped=self._ring.dropped)
        record = summary(
            events, step=step, rank=self._rank, incarnation=self._incarnation, epoch=epoch, work=work,
            memory=memory_bytes(self._device),
        )  # fmt: skip
        return record.tobytes()

    def close(self) -> None:
        self._writer.close()


def work_of(batch: Mapping[str, Any]) -> tuple[float, float]:
    """(tokens, sum of squared lengths) of a batch: by its attention mask, else by the shape of its tokens, else samples of 1."""
    mask = batch.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        lengths = mask.sum(1, dtype=torch.float64)
        return float(lengths.sum()), float((lengths * lengths).sum())
    tokens = batch.get("input_ids", next(iter(batch.values()), None))
    if not isinstance(tokens, torch.Tensor) or not tokens.ndim:
        return 0.0, 0.0
    samples, length = len(tokens), tokens.shape[1] if tokens.ndim == 2 and not tokens.is_floating_point() else 1
    return float(samples * length), float(samples * length * length)


def memory_bytes(device: torch.device) -> int:
    """The most bytes that were in use: of the device, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
