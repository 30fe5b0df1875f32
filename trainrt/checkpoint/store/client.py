"""The trainer's side of its node's store: a slot to copy into, a seal, a wait for the commit."""

from __future__ import annotations

import threading
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from trainrt.checkpoint.store.protocol import Connection
from trainrt.checkpoint.store.reading import open_generation
from trainrt.checkpoint.store.slots import map_slot
from trainrt.errors import StaleIncarnation, StoreError
from trainrt.parallel.layout import Layout

__all__ = ["SnapshotClient", "open_generation"]


class SnapshotClient:
    """One rank's snapshots. A store that is gone costs skipped snapshots (`skipped`), never the training.

    May be used by two threads: one that copies, one that trains.
    """

    def __init__(self, socket: str, *, run_id: str, incarnation: int, rank: int, token: str) -> None:
        self._socket, self._token, self._run_id = socket, token, run_id
        self._head = {"incarnation": incarnation, "rank": rank}
        self._connection: Connection | None = None
        self._described: tuple[list[dict[str, Any]], int, list[int]] | None = None
        self._mapped: dict[str, np.ndarray] = {}
        self._sealed: int | None = None
        self.skipped = 0
        self.mirror: tuple[np.ndarray, list[tuple[int, int, int, int]]] | None = None
        """What to copy of replicas' shares beside the slot that was begun: where to, and (rank, start, stop, at)."""
        self._lock = threading.RLock()

    def describe(self, layout: Layout, bytes: int, *, replicas: Collection[int] = ()) -> None:
        """What this rank's slots hold, once an incarnation, and which ranks' shares it could copy as well.

        Raises StoreError if the store refuses.
        """
        self._described = (layout.to_json(), bytes, sorted(replicas))
        self._connect()

    def _connect(self) -> Connection:
        assert self._described is not None
        if self._connection is None:
            connection = Connection(self._socket, token=self._token, run_id=self._run_id)
            layout, size, replicas = self._described
            connection.request("describe", **self._head, layout=layout, bytes=size, replicas=replicas)
            self._connection = connection
        return self._connection

    def _lost(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None
        self._mapped.clear()
        self._sealed = None

    def begin(self, step: int, *, checkpoint: bool = False) -> np.ndarray | None:
        """A slot to copy the state of `step` into; None, counted, where the store is gone or has no room.

        Raises StaleIncarnation where the store serves a newer incarnation than this trainer's.
        """
        answer = self._ask_for_slot(step, checkpoint=checkpoint)
        if answer is None or answer["slot"] is None:
            self.skipped += 1
            return None
        assert self._described is not None
        self.mirror = None
        if answer["mirror"] is not None:
            orders = [tuple(order) for order in answer["mirror"]["orders"]]
            self.mirror = self._map(answer["mirror"]["slot"], answer["mirror"]["bytes"]), orders
        return self._map(answer["slot"], self._described[1])

    def _map(self, slot: str, size: int) -> np.ndarray:
        if slot not in self._mapped:
            self._mapped[slot] = map_slot(slot, size)
        return self._mapped[slot]

    def _ask_for_slot(self, step: int, *, checkpoint: bool) -> dict[str, Any] | None:
        """The store's answer; a connection that broke is made once more, because a new store may be there."""
        with self._lock:
            for _ in range(2 if self._connection is not None else 1):
                try:
                    return self._connect().request("begin", **self._head, step=step, checkpoint=checkpoint)[0]
                except StaleIncarnation:
                    raise
                except StoreError:
                    self._lost()
        return None

    def copied(self, step: int, bytes: int) -> None:
        """The slot is written up to here: the store may begin with it. Nothing is waited for."""
        with suppress(StoreError), self._lock:
            self._connect().send("copied", **self._head, step=step, bytes=bytes, one_way=True)

    def mirrored(self, step: int) -> None:
        """What `mirror` asks for is copied. Nothing is waited for: what is not there in time, the store pulls."""
        with suppress(StoreError), self._lock:
            self._connect().send("mirrored", **self._head, step=step, one_way=True)

    def seal(self, step: int, *, metadata: dict[str, Any] | None, checkpoint: bool) -> None:
        """The slot is written: the store takes over. Returns at once."""
        with self._lock:
            try:
                self._connect().request("seal", **self._head, step=step, metadata=metadata, checkpoint=checkpoint)
                self._sealed = step
            except StoreError:
                self._lost()
                self.skipped += 1

    def wait_committed(self, timeout_seconds: float) -> bool:
        """Wait for the commit of the last sealed generation. False where it was given up, or there is none."""
        if self._sealed is None or self._connection is None:
            return False
        try:
            answer, _ = self._connection.request(
                "wait", wait_seconds=timeout_seconds, timeout_seconds=timeout_seconds, step=self._sealed,
                incarnation=self._head["incarnation"],
            )  # fmt: skip
        except StoreError:
            self._lost()
            return False
        if not answer["committed"]:
            self._sealed = None
            self.skipped += 1
        return bool(answer["committed"])

    def checkpoint_outcome(self, step: int) -> tuple[str | None, str | None]:
        """(path, failure) of the checkpoint of `step`, both None while it is being written. Does not wait."""
        with self._lock:
            try:
                answer, _ = self._connect().request("checkpoint_outcome", step=step)
            except StoreError:
                self._lost()
                return None, None
        return answer["path"], answer["failure"]

    def wait_checkpoint(self, step: int, timeout_seconds: float) -> Path:
        """Wait for the checkpoint of `step`. Raises StoreError with the reason if it was not written."""
        answer, _ = self._connect().request(
            "wait_checkpoint", wait_seconds=timeout_seconds, timeout_seconds=timeout_seconds, step=step
        )
        return Path(answer["path"])
