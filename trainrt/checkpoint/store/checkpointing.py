"""A committed generation becomes a checkpoint: the leader plans and finishes, every store writes its part."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainrt.checkpoint.store.protocol import Connection
from trainrt.checkpoint.store.reading import GenerationSource, open_generation
from trainrt.checkpoint.writer import WritePlan, finish, prepare, prune, write_part

PART_TIMEOUT_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class Place:
    """A store's place among the stores of an incarnation: who it is, and how the others are reached."""

    node: str
    socket: str
    stores: dict[str, str]
    nodes_of_ranks: dict[int, str]
    run_id: str
    token: str

    def open(self, step: int, incarnation: int) -> GenerationSource:
        """A generation over all stores, as seen from here."""
        return open_generation(
            step, self.stores, node=self.node, socket=self.socket, token=self.token, incarnation=incarnation
        )


class CheckpointWriter:
    """The leader's side. `write` blocks; it runs in a thread of the leader store."""

    def __init__(self, directory: Path, *, keep: int, place: Place) -> None:
        self._directory, self._keep, self._place = directory, keep, place
        self._one_at_a_time = threading.Lock()

    def write(self, step: int, incarnation: int) -> Path:
        """Plan, have every store write its chunks, finish, and remove the oldest beyond `keep`."""
        with self._one_at_a_time:
            return self._write(step, incarnation)

    def _write(self, step: int, incarnation: int) -> Path:
        place = self._place
        source = place.open(step, incarnation)
        config = source.metadata.get("config") or {}
        plan = WritePlan.build(
            source.layout, source.metadata, writers=sorted(place.stores), writer_of_rank=place.nodes_of_ranks,
            compress=config.get("checkpoint", {}).get("compress") == "zstd",
        )  # fmt: skip
        prepare(plan, self._directory)
        document = plan.to_json()
        with ThreadPoolExecutor(len(place.stores)) as pool:
            parts = [pool.submit(self._part, node, step, incarnation, document) for node in place.stores]
            results = [result for part in parts for result in part.result()]
        path = finish(plan, self._directory, results)
        prune(self._directory, self._keep)
        return path

    def _part(self, node: str, step: int, incarnation: int, document: dict[str, Any]) -> list[dict[str, Any]]:
        place = self._place
        fields = {"step": step, "incarnation": incarnation, "plan": document, "directory": str(self._directory)}
        if node == place.node:
            return write_own_part(place, fields)
        connection = Connection(place.stores[node], token=place.token, run_id=place.run_id)
        try:
            return connection.request("write_part", wait_seconds=PART_TIMEOUT_SECONDS, **fields)[0]["results"]
        finally:
            connection.close()


def write_own_part(place: Place, message: dict[str, Any]) -> list[dict[str, Any]]:
    """Write this store's chunks of a plan; slices of other nodes come over the network."""
    source = place.open(message["step"], message["incarnation"])
    return write_part(WritePlan.from_json(message["plan"]), Path(message["directory"]), place.node, source)
