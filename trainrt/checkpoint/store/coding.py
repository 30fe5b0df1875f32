"""What a store does for its group: code the parity it holds from the others' data, and rebuild data that was lost.

Everything here runs in threads beside the store's event loop, with a lower priority than the trainers, and talks to
the other stores over TCP. Data is pulled in buckets as soon as it is hashed, so that coding starts while the
trainers still copy.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np

from trainrt.checkpoint.erasure.code import Code
from trainrt.checkpoint.store.generation import Generation, Part
from trainrt.checkpoint.store.group import Group, segment_bytes
from trainrt.checkpoint.store.mirror import digest
from trainrt.checkpoint.store.protocol import Connection
from trainrt.checkpoint.store.segments import NodeData, buckets, padded
from trainrt.errors import StoreError

NICE = 5
"""Coding gives way to the trainers where they compete for cores."""
AGAIN_SECONDS = 0.2


def give_way() -> None:
    """Lower the priority of this thread (Linux: of the thread, not of its process)."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)


class Peers:
    """Connections to other stores, kept for as long as one piece of work takes."""

    def __init__(self, addresses: Mapping[str, str], *, token: str, run_id: str) -> None:
        self._addresses, self._token, self._run_id = addresses, token, run_id
        self._open: dict[str, Connection] = {}
        self._buffers: dict[int, memoryview] = {}
        self.traffic: dict[str, tuple[int, float]] = {}
        """What came of other stores' data: node to bytes, and the seconds in which they arrived."""

    def __enter__(self) -> Peers:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._open.values():
            connection.close()

    def _to(self, node: str) -> Connection:
        if node not in self._open:
            if node not in self._addresses:
                raise StoreError(f"the store of {node} is not there")
            self._open[node] = Connection(self._addresses[node], token=self._token, run_id=self._run_id)
        return self._open[node]

    def ask(self, node: str, op: str, **fields: Any) -> dict[str, Any]:
        return self._to(node).request(op, **fields)[0]

    def _room(self, number: int, length: int) -> memoryview:
        if number not in self._buffers or len(self._buffers[number]) < length:
            self._buffers[number] = memoryview(bytearray(length))
        return self._buffers[number][:length]

    def _received(self, node: str, number: int) -> tuple[dict[str, Any], memoryview]:
        connection = self._to(node)
        before = connection.arriving_seconds
        answer = connection.receive(into=partial(self._room, number))
        bytes, seconds = self.traffic.get(node, (0, 0.0))
        self.traffic[node] = bytes + len(answer[1]), seconds + connection.arriving_seconds - before
        return answer

    def pull(self, wanted: Mapping[int, tuple[str, str, dict[str, Any]]]) -> dict[int, memoryview]:
        """Payloads of several requests (number -> node, op, fields), all under way at once; none for "the same as yours".

        They are overwritten by the next ones of the same numbers: new memory for each would cost as much as the copy into it.
        Raises StoreError if one fails; the connections are closed then, since answers may still be in them.
        """
        try:
            for node, op, fields in wanted.values():
                self._to(node).send(op, **fields)
            answers = {number: self._received(node, number) for number, (node, _, _) in wanted.items()}
            return {number: payload for number, (head, payload) in answers.items() if "same" not in head}
        except StoreError:
            for connection in self._open.values():
                connection.close()
            self._open.clear()
            raise


def parity_parts(group: Group, node: str, node_bytes: Mapping[str, int]) -> list[Part]:
    """The parity segments that a node holds, one after the other in its slot."""
    parts, offset = [], 0
    for stripe, row in group.parity_of(node):
        contributors = [group.contributor(stripe, shard) for shard in range(group.k)]
        length = max(segment_bytes(node_bytes[name], group.k) for name in contributors)
        parts.append(Part(stripe, row, offset, length))
        offset += length
    return parts


Held = Callable[[str, int, int, int], np.ndarray | None]
"""(node, segment, offset, length) to what is held here of another node's data: see `mirror`."""


def encode(
    generation: Generation, group: Group, parts: list[Part], out: np.ndarray, peers: Peers,
    *, wait: bool = True, held: Held = lambda *_: None,
) -> int:  # fmt: skip
    """Fill a store's parity slot. Returns the bytes that came over the network.

    `wait`: for data that is still being copied; else it is verified first, whatever its incarnation.
    Raises StoreError when a peer fails, or the generation is over.
    """
    code = Code(group.k, group.m)
    fields = {"step": generation.step, "incarnation": generation.incarnation, "k": group.k, "wait": wait}
    pulled = 0
    for part in parts:
        for offset, length in buckets(part.length):
            if generation.over:
                raise StoreError(f"generation {generation.step} is over")
            wanted: dict[int, tuple[str, str, dict[str, Any]]] = {}
            own: dict[int, np.ndarray] = {}
            for shard in range(group.k):
                node = group.contributor(part.stripe, shard)
                where = {**fields, "of": node, "segment": shard, "offset": offset, "length": length}
                here = held(node, shard, offset, length)
                if here is not None:
                    own[shard], where["have"] = here, digest(here)
                wanted[shard] = (node, "segment", where)
            got = peers.pull(wanted)
            pulled += sum(map(len, got.values()))
            shards = [padded(got[shard] if shard in got else own[shard], length) for shard in range(group.k)]
            code.encode(shards, out[part.offset + offset : part.offset + offset + length], part.row)
    return pulled


def until_over(generation: Generation, work: Callable[[], Any]) -> Any:
    """Try again for as long as the generation waits: a store that was started anew may answer. None when it is over."""
    while not generation.over:
        try:
            return work()
        except StoreError:
            time.sleep(AGAIN_SECONDS)
    return None


class Rebuilding:
    """One lost node's data, decoded from what is left of its group.

    `data` and `parity` say which node's data and parity is in which store (node to node).
    """

    def __init__(
        self, step: int, incarnation: int, group: Group, node: str, *, data: Mapping[str, str], parity: set[str],
        peers: Peers,
    ) -> None:  # fmt: skip
        self._head = {"step": step, "incarnation": incarnation}
        self._group, self._node, self._data, self._parity, self._peers = group, node, dict(data), set(parity), peers
        self._code = Code(group.k, group.m)
        self._bad: set[tuple[int, int]] = set()

    def facts(self) -> dict[str, Any]:
        """Members (rank to facts) and layouts of the lost node, from any store that kept them."""
        for holder in sorted(self._parity):
            with suppress(StoreError):
                return self._peers.ask(holder, "facts", **self._head, of=self._node, wait=False)
        raise StoreError(f"generation {self._head['step']}: no store knows what {self._node} held")

    def decode_range(self, node: NodeData, start: int, stop: int) -> np.ndarray:
        """The bytes of a range of the node's data, decoded; its ends are multiples of the segments' alignment."""
        size = segment_bytes(node.bytes, self._group.k)
        pieces = []
        while start < stop:
            segment, offset = divmod(start, size)
            length = min(stop - start, size - offset)
            pieces.append(self._bucket(self._group.stripe_of(self._node, segment), segment, offset, length))
            start += length
        return np.concatenate(pieces)

    def decode_into(self, target: NodeData) -> None:
        """Fill the data. Raises StoreError where too little of a stripe can be had."""
        group = self._group
        for segment in range(group.k):
            stripe = group.stripe_of(self._node, segment)
            for offset, length in buckets(segment_bytes(target.bytes, group.k)):
                start, _ = target.segment(segment, group.k, offset, length)
                target.write(start, self._bucket(stripe, segment, offset, length))

    def _bucket(self, stripe: int, segment: int, offset: int, length: int) -> np.ndarray:
        """One bucket of a lost shard. A shard that fails its checksum, or whose store fails, counts as lost too."""
        out = np.empty(length, np.uint8)
        while True:
            chosen = self._choose(stripe)
            try:
                wanted = {number: self._request(stripe, number, offset, length) for number in chosen}
                payloads = self._peers.pull(wanted)
            except StoreError:
                self._find_bad(stripe, chosen, offset, length)
                continue
            self._code.decode({n: padded(payloads[n], length) for n in chosen}, segment, out)
            return out

    def _choose(self, stripe: int) -> list[int]:
        shards = self._group.shards(stripe)
        there = [
            number
            for number, node in shards.items()
            if (stripe, number) not in self._bad
            and (node in self._data if number < self._group.k else node in self._parity)
        ]
        if len(there) < self._group.k:
            raise StoreError(
                f"generation {self._head['step']}: {self._node} cannot be rebuilt; {len(there)} of the "
                f"{self._group.k} shards needed of stripe {stripe} are left"
            )
        return there[: self._group.k]

    def _request(self, stripe: int, number: int, offset: int, length: int) -> tuple[str, str, dict[str, Any]]:
        node = self._group.shards(stripe)[number]
        where = {**self._head, "offset": offset, "length": length}
        if number < self._group.k:
            fields = {**where, "of": node, "segment": number, "k": self._group.k, "wait": False}
            return self._data[node], "segment", fields
        return node, "parity", {**where, "stripe": stripe}

    def _find_bad(self, stripe: int, chosen: list[int], offset: int, length: int) -> None:
        """Ask one by one for what could not be had together."""
        for number in chosen:
            try:
                self._peers.pull({number: self._request(stripe, number, offset, length)})
            except StoreError:
                self._bad.add((stripe, number))
