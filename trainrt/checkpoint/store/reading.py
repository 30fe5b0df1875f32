"""Generations as sources: one's own node's members from shared memory, others' over the network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xxhash

from trainrt.checkpoint.store.protocol import Connection
from trainrt.checkpoint.store.slots import BLOCK_BYTES, map_slot
from trainrt.errors import StoreError
from trainrt.parallel.layout import Box, Fragment, Layout, LogicalTensor


class VerifiedSlot:
    """A sealed slot, read only through blocks whose checksum was compared first."""

    def __init__(self, path: str, size: int, hashes: list[int]) -> None:
        self._path, self._data, self._hashes = path, map_slot(path, size), hashes
        self._verified = np.zeros(len(hashes), bool)

    def view(self, fragment: Fragment, item_bytes: int) -> np.ndarray:
        """The elements of a fragment. Raises StoreError where a block under it has rotted."""
        view = fragment.view(self._data, item_bytes)
        if view.size:
            first = fragment.base + fragment.start * item_bytes
            extent = sum((n - 1) * s for n, s in zip(fragment.box.length, fragment.strides, strict=True))
            self._verify(first // BLOCK_BYTES, (first + (extent + 1) * item_bytes - 1) // BLOCK_BYTES)
        return view

    def range(self, start: int, stop: int) -> np.ndarray:
        """A range of bytes. Raises StoreError where a block under it has rotted."""
        if stop > start:
            self._verify(start // BLOCK_BYTES, (stop - 1) // BLOCK_BYTES)
        return self._data[start:stop]

    def _verify(self, first: int, last: int) -> None:
        for block in range(first, last + 1):
            if not self._verified[block]:
                data = self._data[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
                if xxhash.xxh3_64_intdigest(data) != self._hashes[block]:
                    raise StoreError(f"{self._path}: block {block} does not match its checksum")
                self._verified[block] = True


class GenerationSource:
    """A generation over all stores as a Source. `metadata` is what rank 0 sealed it with."""

    def __init__(self, step: int, incarnation: int, *, token: str) -> None:
        self.step, self.incarnation = step, incarnation
        self.layout = Layout()
        self.metadata: dict[str, Any] = {}
        self._token = token
        self._local: dict[int, VerifiedSlot] = {}
        self._remote: dict[int, Connection] = {}

    def add_member(self, rank: int, facts: dict[str, Any], *, connection: Connection | None) -> None:
        """Take in one rank's part; `connection` None: its slot is on this node."""
        self.layout.merge(Layout.from_json(facts["layout"]))
        if facts["metadata"] is not None:
            self.metadata = facts["metadata"]
        if connection is None:
            self._local[rank] = VerifiedSlot(facts["slot"], facts["bytes"], facts["hashes"])
        else:
            self._remote[rank] = connection

    def read(self, tensor: LogicalTensor, fragment: Fragment) -> np.ndarray:
        slot = self._local.get(fragment.rank)
        if slot is not None:
            return slot.view(fragment, tensor.item_bytes)
        _, payload = self._remote[fragment.rank].request(
            "fetch", step=self.step, incarnation=self.incarnation, rank=fragment.rank, item_bytes=tensor.item_bytes,
            **fragment_json(fragment),
        )  # fmt: skip
        return np.frombuffer(payload, f"u{tensor.item_bytes}").reshape(fragment.box.length)


def fragment_json(fragment: Fragment) -> dict[str, Any]:
    return {
        "length": list(fragment.box.length),
        "strides": list(fragment.strides),
        "start": fragment.start,
        "base": fragment.base,
    }


def fragment_of(message: dict[str, Any]) -> Fragment:
    box = Box((0,) * len(message["length"]), tuple(message["length"]))
    return Fragment(message["rank"], box, "state", tuple(message["strides"]), message["start"], message["base"])


def open_generation(
    step: int, stores: Mapping[str, str], *, node: str, socket: str, token: str, incarnation: int | None = None
) -> GenerationSource:
    """The generation of `step` over all stores, from the view of `node`, whose store listens on `socket`.

    Of several incarnations that sealed the step the newest complete one is taken. Raises StoreError where
    none is complete.
    """
    answers: dict[str, tuple[Connection, list[dict[str, Any]]]] = {}
    failures = []
    for name, address in stores.items():
        try:
            connection = Connection(socket if name == node else address, token=token)
            answers[name] = (connection, connection.request("index", step=step)[0]["generations"])
        except StoreError as error:
            failures.append(str(error))
    candidates = sorted({g["incarnation"] for _, held in answers.values() for g in held}, reverse=True)
    for candidate in candidates if incarnation is None else [incarnation]:
        found = [(name, c, g) for name, (c, held) in answers.items() for g in held if g["incarnation"] == candidate]
        ranks = {int(rank) for _, _, g in found for rank in g["members"]}
        if found and ranks == set(range(found[0][2]["world_size"])):
            source = GenerationSource(step, candidate, token=token)
            for name, connection, generation in found:
                for rank, facts in generation["members"].items():
                    source.add_member(int(rank), facts, connection=None if name == node else connection)
            return source
    raise StoreError(f"generation {step} is in memory no longer, or not of all ranks {'; '.join(failures)}".strip())
