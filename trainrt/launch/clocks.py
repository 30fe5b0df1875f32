"""The driver's clock on every node, as NTP finds it: half of the quickest of several round trips is the least that can be wrong.

What is measured is the driver's time of day against the node's monotonic clock, so that it does not matter what a node takes the
time of day to be, nor whether somebody sets it while the job runs. Ranks time by that clock, which all processes of a host share.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from trainrt.run_dir import now

ROUND_TRIPS = 5
EVERY_SECONDS = 30.0


def epoch_of(ask: Callable[[], float], *, round_trips: int = ROUND_TRIPS) -> float:
    """Seconds since the epoch, on this process's clock, when the clock that `ask` reads elsewhere was zero.

    Wrong by at most half of the quickest round trip.
    """
    best, epoch = float("inf"), 0.0
    for _ in range(round_trips):
        wall, sent = now(), time.monotonic()
        there = ask()
        took = time.monotonic() - sent
        if took < best:
            best, epoch = took, wall + took / 2 - there
    return epoch


class NodeClock:
    """When a node's clock is to be compared again."""

    def __init__(self) -> None:
        self._measured_at = float("-inf")

    @property
    def due(self) -> bool:
        return time.monotonic() - self._measured_at > EVERY_SECONDS

    def measure(self, ask: Callable[[], float]) -> float:
        """See `epoch_of`."""
        epoch = epoch_of(ask)
        self._measured_at = time.monotonic()
        return epoch
