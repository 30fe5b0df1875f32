"""What ranks tell of their steps, in the run directory: `events/summaries.bin`; who sat where, `events/seats.jsonl`; links.

Summaries are records of 112 bytes one after the other (`trainrt.diagnostics.table.SUMMARY`), which the driver passes on as they
come. They wait for at most `FLUSH_SECONDS`.
"""

from __future__ import annotations

import os
import time
from base64 import b64decode
from collections.abc import Mapping
from typing import Any

from trainrt.config import MeshSize
from trainrt.parallel.mesh import coordinates
from trainrt.run_dir import RunDir, append_line, now

FLUSH_SECONDS = 0.5
RECORD_BYTES = 112


class Telemetry:
    """The driver's part of `events/`; a later driver goes on where an earlier one ended."""

    def __init__(self, run_dir: RunDir) -> None:
        self._run_dir = run_dir
        self._waiting = bytearray()
        self._flushed_at = time.monotonic()

    def seats(self, *, incarnation: int, mesh: Mapping[str, int], nodes: Mapping[int, str], first_step: int) -> None:
        """An incarnation was ordered; nodes: by rank."""
        size = MeshSize(**mesh)
        places = [coordinates(size, rank) for rank in range(len(nodes))]
        line = {
            "incarnation": incarnation, "mesh": dict(mesh), "hosts": [nodes[rank] for rank in range(len(nodes))],
            "coordinates": {axis: [place[axis] for place in places] for axis in places[0]}, "first_step": first_step,
            "time": now(),
        }  # fmt: skip
        append_line(self._run_dir.seats, line)

    def link(self, node: str, link: Mapping[str, Any]) -> None:
        """What came to a node's store from another's: {"step", "from", "bytes", "seconds"}."""
        append_line(self._run_dir.links, {**link, "to": node, "time": now()})

    def summary(self, text: str) -> None:
        """A rank's record of a step, in base64."""
        record = b64decode(text)
        if len(record) == RECORD_BYTES:
            self._waiting += record
        self.flush(after=FLUSH_SECONDS)

    def flush(self, *, after: float = 0.0) -> None:
        """Write what waits, unless something was written less than `after` seconds ago."""
        if not self._waiting or time.monotonic() - self._flushed_at < after:
            return
        self._flushed_at = time.monotonic()
        fd = os.open(self._run_dir.summaries, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            # What a killed driver left of a record would shift all that come after it.
            if torn := os.fstat(fd).st_size % RECORD_BYTES:
                os.ftruncate(fd, os.fstat(fd).st_size - torn)
            os.write(fd, self._waiting)
        finally:
            os.close(fd)
        self._waiting.clear()
