"""When a step's state is kept, and how the copy of it runs beside the next step.

After the update of a step its state may be read until the next update. So the copy into the store's slot runs in a
thread beside the next forward and backward, and the next update waits for its end (REFT, arXiv 2310.12670, section
4.1, guards the same order). The commit of one generation is waited for before the next one is begun.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainrt.checkpoint.store.client import SnapshotClient
from trainrt.config import JobConfig
from trainrt.errors import PeerLost, StaleIncarnation
from trainrt.events import ring
from trainrt.training.interval import Interval
from trainrt.training.state import Snapshotter

COMMIT_TIMEOUT_SECONDS = 60.0
CHECKPOINT_TIMEOUT_SECONDS = 3600.0


@dataclass(slots=True)
class Stall:
    """What snapshots cost the trainer since the last step: seconds blocked, and whether a checkpoint is made of one."""

    seconds: float = 0.0
    checkpoint: bool = False


class Snapshots:
    """One rank's snapshots and checkpoints. `store` None: there are none."""

    def __init__(
        self, config: JobConfig, snapshotter: Snapshotter, store: SnapshotClient | None, *, mtbf_seconds: float
    ) -> None:
        self._snapshotter, self.store = snapshotter, store
        self.interval = Interval(config.snapshot.every, mtbf_seconds=mtbf_seconds)
        self._checkpoints = config.checkpoint.every
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="snapshot")
        self._copying: Future[None] | None = None
        self._waited = 0.0
        self.taken: int | None = None
        self.writing: list[int] = []

    @property
    def skipped(self) -> int:
        return self.store.skipped if self.store is not None else 0

    def due(self, step: int, *, ending: bool) -> tuple[bool, bool]:
        """Whether the state of a step is kept in memory, and whether it becomes a checkpoint."""
        checkpoint = ending or (self._checkpoints > 0 and step % self._checkpoints == 0)
        kept = checkpoint or self.interval.now
        return self.store is not None and kept, self.store is not None and checkpoint

    def take(self, step: int, *, ending: bool, metadata: Callable[[], dict[str, Any] | None]) -> Stall:
        """Begin to copy the state of a step, if it is one to be kept. The store commits it beside the next steps."""
        kept, checkpoint = self.due(step, ending=ending)
        start = time.perf_counter()
        if kept:
            with ring.span("snapshot", kind="snapshot", bytes=self._snapshotter.bytes):
                self._begin(step, metadata(), checkpoint=checkpoint)
        stall = Stall(time.perf_counter() - start + self._waited, checkpoint)
        self._waited = 0.0
        return stall

    def _begin(self, step: int, metadata: dict[str, Any] | None, *, checkpoint: bool) -> None:
        assert self.store is not None
        self.finish_copy()
        with ring.span("wait_commit", kind="snapshot", waiting=True):
            self.store.wait_committed(COMMIT_TIMEOUT_SECONDS)
        try:
            buffer = self.store.begin(step, checkpoint=checkpoint)
        except StaleIncarnation as error:
            # What is completed from here on would be of no use, and would only have to be done again.
            raise PeerLost(f"this incarnation is over: {error}") from error
        if buffer is None:
            return
        self._snapshotter.copy_buffers(buffer, self.store.mirror)
        self._copying = self._thread.submit(self._copy, step, buffer, metadata, checkpoint)
        self.taken = step
        if checkpoint:
            self.writing.append(step)

    def _copy(self, step: int, buffer: np.ndarray, metadata: dict[str, Any] | None, checkpoint: bool) -> None:
        assert self.store is not None
        store = self.store
        self._snapshotter.copy_rest(buffer, copied=lambda bytes: store.copied(step, bytes))
        store.seal(step, metadata=metadata, checkpoint=checkpoint)
        if store.mirror is not None:
            self._snapshotter.copy_mirror(*store.mirror)
            store.mirrored(step)

    def before_update(self) -> None:
        """The optimizer is about to change what is being copied: wait for the copy."""
        start = time.perf_counter()
        if self._copying is not None and not self._copying.done():
            with ring.span("wait_copy", kind="snapshot", waiting=True):
                self.finish_copy()
        self.finish_copy()
        self._waited += time.perf_counter() - start

    def finish_copy(self) -> None:
        """Wait for the copy that runs, if one does. Raises what it raised."""
        copying, self._copying = self._copying, None
        if copying is not None:
            copying.result()

    def close(self) -> None:
        """End after the copy that runs: what it seals may be the newest state there is."""
        self._thread.shutdown()

    def outcomes(self) -> list[tuple[int, str | None, str | None]]:
        """(step, path, failure) of the checkpoints that are no longer being written. Does not wait."""
        over = []
        for step in list(self.writing):
            assert self.store is not None
            path, failure = self.store.checkpoint_outcome(step)
            if path is not None or failure is not None:
                self.writing.remove(step)
                over.append((step, path, failure))
        return over

    def wait_checkpoint(self, step: int) -> str:
        """The path of the checkpoint of a step that was taken. Raises StoreError if it was not written."""
        assert self.store is not None
        self.finish_copy()
        self.store.wait_committed(COMMIT_TIMEOUT_SECONDS)
        return str(self.store.wait_checkpoint(step, CHECKPOINT_TIMEOUT_SECONDS))
