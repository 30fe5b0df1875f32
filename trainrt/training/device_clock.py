"""When a GPU did what it was asked: moments of its stream, on the clock of the host. Not run here: no GPU."""

from __future__ import annotations

import time
from typing import Any

import torch

from trainrt.events import DEVICE_KINDS, EventRing


class DeviceClock:
    """Moments are marked in the stream without waiting, and read when a step is over.

    What is asked of a device is timed there, on the stream that is current; all else on the host.
    """

    def __init__(self, device: torch.device, into: EventRing) -> None:
        self._device = device
        self._restart()
        into.follow(self.mark, self.time_of)

    def _restart(self) -> None:
        """A device tells the time since an event in milliseconds of float32: a near one."""
        torch.cuda.synchronize(self._device)
        self._zero, self._zero_at = self._moment(), time.monotonic()

    def _moment(self) -> Any:
        moment = torch.cuda.Event(enable_timing=True)
        moment.record(torch.cuda.current_stream(self._device))
        return moment

    def mark(self, kind: str) -> Any:
        """A moment of an event of this kind."""
        return self._moment() if kind in DEVICE_KINDS else time.monotonic()

    def time_of(self, moment: Any) -> float:
        """By `time.monotonic`; waits for the device to come to it."""
        if isinstance(moment, float):
            return moment
        moment.synchronize()
        return self._zero_at + float(self._zero.elapsed_time(moment)) / 1e3

    def step(self) -> None:
        """All moments of a step were read."""
        self._restart()
