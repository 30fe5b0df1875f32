"""A committed generation becomes a checkpoint: the leader plans and finishes, every store writes its part."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainrt.checkpoint.store.protocol import Connection
from trainrt.checkpoint.store.reading import GenerationSource, open_generation
from trainrt.checkpoint.writer import WritePlan, finish, prepare, prune, write_part

if TYPE_CHECKING:
    from trainrt.checkpoint.store.daemon import Store

PART_TIMEOUT_SECONDS = 3600.0


class CheckpointWriter:
    """The leader's side. `write` blocks; it runs in a thread of the leader store."""

    def __init__(self, directory: Path, *, keep: int, store: Store) -> None:
        self._directory, self._keep, self._store = directory, keep, store
        self._one_at_a_time = threading.Lock()

    def write(self, step: int, incarnation: int) -> Path:
        """Plan, have every store write its chunks, finish, and remove the oldest beyond `keep`."""
        with self._one_at_a_time:
            return self._write(step, incarnation)

    def _write(self, step: int, incarnation: int) -> Path:
        store = self._store
        source = open_own(store, step, incarnation)
        plan = WritePlan.build(
            source.layout, source.metadata, writers=sorted(store.stores), writer_of_rank=store.nodes_of_ranks
        )
        prepare(plan, self._directory)
        document = plan.to_json()
        with ThreadPoolExecutor(len(store.stores)) as pool:
            parts = [pool.submit(self._part, node, step, incarnation, document) for node in store.stores]
            results = [result for part in parts for result in part.result()]
        path = finish(plan, self._directory, results)
        prune(self._directory, self._keep)
        return path

    def _part(self, node: str, step: int, incarnation: int, document: dict[str, Any]) -> list[dict[str, Any]]:
        store = self._store
        fields = {"step": step, "incarnation": incarnation, "plan": document, "directory": str(self._directory)}
        if node == store.node:
            return write_own_part(store, fields)
        connection = Connection(store.stores[node], token=store.token, run_id=store.run_id)
        try:
            return connection.request("write_part", wait_seconds=PART_TIMEOUT_SECONDS, **fields)[0]["results"]
        finally:
            connection.close()


def write_own_part(store: Store, message: dict[str, Any]) -> list[dict[str, Any]]:
    """Write this store's chunks of a plan; slices of other nodes come over the network."""
    source = open_own(store, message["step"], message["incarnation"])
    return write_part(WritePlan.from_json(message["plan"]), Path(message["directory"]), store.node, source)


def open_own(store: Store, step: int, incarnation: int) -> GenerationSource:
    return open_generation(
        step, store.stores, node=store.node, socket=str(store.folder / "store.sock"), token=store.token,
        incarnation=incarnation,
    )  # fmt: skip
