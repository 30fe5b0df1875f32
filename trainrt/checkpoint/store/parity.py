"""A store's part in its group: it codes parity of the others' data, serves segments, and rebuilds lost nodes' data."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from trainrt.checkpoint.store.coding import Peers, Rebuilding, encode, parity_parts, until_over
from trainrt.checkpoint.store.generation import Generation, Member, Parity, State
from trainrt.checkpoint.store.group import Group
from trainrt.checkpoint.store.mirror import Mirror, digest, mirror_owner
from trainrt.checkpoint.store.reading import VerifiedSlot
from trainrt.checkpoint.store.segments import NodeData, cut
from trainrt.checkpoint.store.slots import BLOCK_BYTES, hash_blocks, owner_of
from trainrt.errors import StoreError

if TYPE_CHECKING:
    from trainrt.checkpoint.store.store import Store

PARITY = "parity"
MIRROR_POLL_SECONDS = 0.002
SEGMENT_SECONDS = 8.0
"""How long a request for data that is still to be copied waits before it is asked again."""


class ParityKeeper:
    """Operations of one store on behalf of its group; `op_*` are requests, as in `Store`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._sizes: tuple[int, dict[str, dict[int, int]]] = (0, {})
        self._mirror: tuple[int, Mirror] = (0, Mirror())
        self.pulled = 0
        self.links: dict[str, tuple[int, int, float]] = {}
        """Of each node whose data came over the network: the last step, all bytes, all seconds in which they arrived."""

    # Coding.

    async def encode(self, generation: Generation) -> None:
        """Code this store's parity of a generation, and learn what its peers' members are. Ends when that is over.

        Where there is no room for parity the generation goes without: `summary` says so.
        """
        group = generation.group
        if group is None or group.m == 0:
            return
        store = self._store
        sizes = await store.in_thread(until_over, generation, lambda: self._node_bytes(generation, group))
        if sizes is None:
            return
        parts = parity_parts(group, store.node, {node: sum(ranks.values()) for node, ranks in sizes.items()})
        size = sum(part.length for part in parts)
        slot = store.slots.take(PARITY, size, used=store.slots_in_use())
        if slot is None:
            return
        parity = generation.parity = Parity(slot, size, parts)
        # After a new start of this store some ranks may not have described themselves yet: then it is for a later one.
        if self._mirror[0] != generation.incarnation and generation.expected <= set(store.described):
            self._make_mirror(generation, group, sizes)
        layouts = await store.in_thread(until_over, generation, lambda: self._code(generation, group, parity))
        if layouts is not None:
            store.layouts.update(layouts)

    def _peers(self) -> Peers:
        return Peers(self._store.stores, token=self._store.token, run_id=self._store.run_id)

    def mirror(self, incarnation: int) -> Mirror:
        """What this node's ranks copy of other nodes' data; nothing before the sizes of that are known."""
        return self._mirror[1] if self._mirror[0] == incarnation else Mirror()

    def _make_mirror(self, generation: Generation, group: Group, sizes: dict[str, dict[int, int]]) -> None:
        """For the next generations of this incarnation. Without room for it, data comes over the network."""
        store = self._store
        replicas = {rank: store.described[rank].replicas for rank in generation.expected}
        mirror = Mirror.of(group, store.node, sizes=sizes, replicas=replicas)
        slots = {
            rank: store.slots.take(mirror_owner(rank), size, used=store.slots_in_use())
            for rank, size in mirror.sizes.items()
        }
        found = {rank: slot for rank, slot in slots.items() if slot is not None}
        for slot in found.values():
            # What lies between tensors is zero with the owner.
            store.slots.map(slot)[:] = 0
        if len(found) == len(slots):
            mirror.slots = found
            self._mirror = (generation.incarnation, mirror)

    def _await_mirror(self, generation: Generation) -> None:
        """Until the trainers have copied what they hold; what does not come is pulled."""
        deadline = time.monotonic() + SEGMENT_SECONDS
        while not generation.over and set(generation.mirror.slots) - generation.mirrored:
            if time.monotonic() > deadline:
                generation.mirror = Mirror()
            time.sleep(MIRROR_POLL_SECONDS)

    async def op_mirrored(self, message: dict[str, Any]) -> dict[str, Any]:
        """A trainer has copied what it was asked for."""
        self._store.current(message)
        self._held((message["step"], message["incarnation"])).mirrored.add(message["rank"])
        return {}

    def _node_bytes(self, generation: Generation, group: Group) -> dict[str, dict[int, int]]:
        """How much the ranks of every other node of the group hold: the same all through an incarnation."""
        incarnation, known = self._sizes
        if incarnation == generation.incarnation and set(known) >= set(group.nodes) - {self._store.node}:
            return known
        with self._peers() as peers:
            found = {
                node: peers.ask(node, "node_bytes", incarnation=generation.incarnation)["ranks"]
                for node in group.nodes
                if node != self._store.node
            }
        found = {node: {int(rank): size for rank, size in ranks.items()} for node, ranks in found.items()}
        self._sizes = (generation.incarnation, found)
        return found

    def _code(self, generation: Generation, group: Group, parity: Parity) -> dict[str, Any]:
        """Parity, then the facts of all others, then the hashes that make it count. Returns layouts not known yet."""
        head = {"step": generation.step, "incarnation": generation.incarnation}
        layouts: dict[str, Any] = {}
        out = self._store.slots.map(parity.slot)
        self._await_mirror(generation)
        mirror, maps = generation.mirror, self._store.slots.map
        with self._peers() as peers:
            held = lambda *where: mirror.read(maps, *where)  # noqa: E731
            self.pulled += encode(generation, group, parity.parts, out, peers, held=held)
            self._count(generation.step, peers)
            for node in group.nodes:
                if node == self._store.node:
                    continue
                known = [*self._store.layouts, *layouts]
                answer = peers.ask(node, "facts", **head, of=node, wait=True, known=known)
                parity.facts[node] = answer["members"]
                layouts.update(answer["layouts"])
        # Assigned in one go: parity with hashes is complete parity.
        parity.hashes = hash_blocks(out)
        return layouts

    def _count(self, step: int, peers: Peers) -> None:
        for node, (bytes, seconds) in peers.traffic.items():
            _, bytes_before, seconds_before = self.links.get(node, (0, 0, 0.0))
            self.links[node] = step, bytes_before + bytes, seconds_before + seconds

    async def op_node_bytes(self, message: dict[str, Any]) -> dict[str, Any]:
        """How much the ranks of this node hold, as soon as all have described themselves."""
        store = self._store
        store.current(message)
        ranks = {rank for rank, node in store.nodes_of_ranks.items() if node == store.node}
        if not await store.until(lambda: ranks <= set(store.described), SEGMENT_SECONDS):
            raise StoreError("not all ranks of this node are there yet")
        return {"ranks": {rank: store.described[rank].bytes for rank in ranks}}

    # Serving.

    async def op_segment(self, message: dict[str, Any]) -> tuple[dict[str, Any], bytes | np.ndarray]:
        """A range of a segment of a node's data; with `wait` as soon as it is hashed, else verified.

        Where the asker has the same bytes (`have`: their digest), "same" is the answer.
        """
        key, where = (message["step"], message["incarnation"]), self._where(message)
        if message["wait"]:
            self._store.current(message)
            await self._until_hashed(message, where)
        generation = self._held(key)
        data = self._data(generation, message["of"], verified=not message["wait"])
        found = await self._store.in_thread(lambda: data.read(*data.segment(*where)))
        if "have" in message and message["have"] == digest(found):
            return {"same": True}, b""
        return {}, found

    @staticmethod
    def _where(message: dict[str, Any]) -> tuple[int, int, int, int]:
        return message["segment"], message["k"], message["offset"], message["length"]

    async def _until_hashed(self, message: dict[str, Any], where: tuple[int, int, int, int]) -> None:
        store, key = self._store, (message["step"], message["incarnation"])

        def hashed() -> bool:
            generation = store.generations.get(*key)
            if generation is None or not generation.ranks_of(message["of"]) <= set(generation.members):
                return False
            data = self._data(generation, message["of"], verified=False)
            members = self._members(generation, message["of"])
            return all(
                len(members[piece].hashes) * BLOCK_BYTES >= stop for piece, _, stop in data.spans(*data.segment(*where))
            )

        def over() -> bool:
            return key[0] in store.given_up or key[1] != store.incarnation or hashed()

        if not await store.until(over, SEGMENT_SECONDS) or not hashed():
            raise StoreError(f"generation {key[0]} of incarnation {key[1]} is not there yet, or given up")

    def _held(self, key: tuple[int, int]) -> Generation:
        generation = self._store.generations.get(*key)
        if generation is None:
            raise StoreError(f"generation {key[0]} of incarnation {key[1]} is not here")
        return generation

    @staticmethod
    def _members(generation: Generation, node: str) -> list[Member]:
        """A node's members, in the order in which their bytes follow each other."""
        ranks = sorted(generation.ranks_of(node))
        if not set(ranks) <= set(generation.members):
            raise StoreError(f"generation {generation.step}: data of {node} is not here")
        return [generation.members[rank] for rank in ranks]

    def _data(self, generation: Generation, node: str, *, verified: bool) -> NodeData:
        members = self._members(generation, node)
        if verified:
            slots = [VerifiedSlot(member.slot, member.bytes, member.hashes) for member in members]
            return NodeData([(m.bytes, slot.range) for m, slot in zip(members, slots, strict=True)])
        maps = [self._store.slots.map(member.slot) for member in members]
        return NodeData([(data.size, cut(data)) for data in maps])

    async def op_parity(self, message: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        """A range of this store's parity of a stripe, verified."""
        parity = self._held((message["step"], message["incarnation"])).parity
        if parity is None or not parity.hashes:
            raise StoreError(f"generation {message['step']}: no parity is here")
        part = next(part for part in parity.parts if part.stripe == message["stripe"])
        slot = VerifiedSlot(parity.slot, parity.bytes, parity.hashes)
        start = part.offset + message["offset"]
        stop = min(start + message["length"], part.offset + part.length)
        return {}, await self._store.in_thread(lambda: slot.range(start, stop).tobytes())

    async def op_facts(self, message: dict[str, Any]) -> dict[str, Any]:
        """What the members of a node are: sizes, layouts, checksums, metadata; own ones, or as learned from it."""
        store, key, node = self._store, (message["step"], message["incarnation"]), message["of"]

        def sealed() -> bool:
            held = store.generations.get(*key)
            return held is not None and held.ranks_of(node) <= held.sealed_ranks()

        if message["wait"]:
            await store.until(lambda: sealed() or key[0] in store.given_up, SEGMENT_SECONDS)
        generation = self._held(key)
        if sealed():
            members = {str(member.rank): member.facts() for member in self._members(generation, node)}
        elif generation.parity is not None and node in generation.parity.facts and not message["wait"]:
            members = generation.parity.facts[node]
        else:
            raise StoreError(f"generation {key[0]}: nothing is known of {node} here")
        names = {facts["layout"] for facts in members.values()} - set(message.get("known", ()))
        return {"members": members, "layouts": {name: store.layouts[name] for name in names}}

    def layouts_held(self) -> set[str]:
        """Layouts of peers' members."""
        return {
            facts["layout"]
            for generation in self._store.generations
            if generation.parity is not None
            for members in generation.parity.facts.values()
            for facts in members.values()
        }

    def wants(self, owner: str, size: int) -> bool:
        """Whether a parity slot, or a mirror, will be needed again: sizes change with the incarnation only."""
        if owner == PARITY:
            return any(g.parity is not None and g.parity.bytes == size for g in self._store.generations)
        mirror = self.mirror(self._store.incarnation)
        return any(owner == mirror_owner(rank) for rank in mirror.slots)

    # Rebuilding.

    async def op_rebuild(self, message: dict[str, Any]) -> dict[str, Any]:
        """Decode a lost node's data into slots of this store, where it then counts as its own. Returns the bytes.

        Raises StoreError where too little is left, or what was decoded fails its checksums; nothing is kept then.
        """
        store, key, node = self._store, (message["step"], message["incarnation"]), message["of"]
        group = Group.from_json(message["group"])
        with Peers(message["stores"], token=store.token, run_id=store.run_id) as peers:
            work = Rebuilding(*key, group, node, data=message["data"], parity=set(message["parity"]), peers=peers)
            found = await store.in_thread(work.facts)
            store.layouts.update(found["layouts"])
            members = self._take_slots(found["members"])
            seating = {int(rank): seat for rank, seat in message["seating"].items()}
            groups = tuple(map(Group.from_json, message["groups"]))
            generation = store.generations.open(Generation(*key, store.node, seating, groups))
            generation.members.update(members)
            try:
                await store.in_thread(self._decode, work, list(members.values()))
            except StoreError:
                for rank in members:
                    del generation.members[rank]
                raise
        for member in members.values():
            member.sealed = True
        generation.rebuilt()
        await store.notify()
        return {"bytes": sum(member.bytes for member in members.values())}

    def _take_slots(self, found: dict[str, dict[str, Any]]) -> dict[int, Member]:
        store, members, used = self._store, {}, set(self._store.slots_in_use())
        for rank, facts in sorted((int(rank), facts) for rank, facts in found.items()):
            slot = store.slots.take(owner_of(rank), facts["bytes"], used=used, spill=store.spill)
            if slot is None:
                raise StoreError(f"no room for {facts['bytes']} bytes in {store.folder}")
            used.add(slot)
            members[rank] = Member(rank, slot, **facts)
        return members

    def _decode(self, work: Rebuilding, members: list[Member]) -> None:
        maps: list[np.ndarray] = [self._store.slots.map(member.slot) for member in members]
        work.decode_into(NodeData([(data.size, cut(data)) for data in maps]))
        for member, data in zip(members, maps, strict=True):
            if hash_blocks(data) != member.hashes:
                raise StoreError(f"rank {member.rank}, decoded from parity, does not match its checksums")

    # Scrubbing.

    async def op_scrub(self, message: dict[str, Any]) -> dict[str, Any]:
        """Compare everything of a generation with its checksums, and decode anew what has rotted.

        Without a `step` it is the newest committed one.

        Raises StoreError where it cannot be repaired: what is rotten is found again before it is used.
        """
        named = (message["step"], message["incarnation"]) if "step" in message else None
        generation = self._newest_committed() if named is None else self._store.generations.get(*named)
        if generation is None:
            return {"data": 0, "parity": 0}
        # Nothing writes into its slots while they are compared, whatever is committed meanwhile.
        pinned, generation.pinned = generation.pinned, True
        try:
            return await self._store.in_thread(self._scrub, generation)
        finally:
            generation.pinned = pinned

    def _newest_committed(self) -> Generation | None:
        held = [g for g in self._store.generations if g.state is State.COMMITTED]
        return max(held, key=lambda g: (g.incarnation, g.step), default=None)

    def _scrub(self, generation: Generation) -> dict[str, int]:
        """Repaired blocks, of data and of parity."""
        group, parity = generation.group, generation.parity
        # A successor's store holds what it decoded for another node, not members of its own.
        here = generation.expected <= set(generation.members)
        members = self._members(generation, self._store.node) if here else []
        node = NodeData([(member.bytes, cut(self._store.slots.map(member.slot))) for member in members])
        repaired = {"data": 0, "parity": 0}
        base = 0
        for member in members:
            for start, stop in rotten_blocks(self._store.slots.map(member.slot), member.hashes):
                if group is None or group.m == 0:
                    raise StoreError(f"{member.slot}: bytes {start} to {stop} have rotted, and there is no parity")
                node.write(base + start, self._decoded(generation, group, node, base + start, base + stop))
                repaired["data"] += 1
            base += member.bytes
        if parity is not None and group is not None:
            out = self._store.slots.map(parity.slot)
            rotten = rotten_blocks(out, parity.hashes)
            if rotten:
                anew = np.zeros_like(out)
                with self._peers() as peers:
                    encode(generation, group, parity.parts, anew, peers, wait=False)
                for start, stop in rotten:
                    out[start:stop] = anew[start:stop]
            repaired["parity"] = len(rotten)
        still = [m.slot for m in members if rotten_blocks(self._store.slots.map(m.slot), m.hashes)]
        if still:
            raise StoreError(f"{', '.join(still)}: what was decoded does not match its checksums")
        return repaired

    def _decoded(self, generation: Generation, group: Group, node: NodeData, start: int, stop: int) -> np.ndarray:
        others = [name for name in group.nodes if name != self._store.node]
        with self._peers() as peers:
            work = Rebuilding(
                generation.step, generation.incarnation, group, self._store.node,
                data={name: name for name in others}, parity=set(others), peers=peers,
            )  # fmt: skip
            return work.decode_range(node, start, stop)


def rotten_blocks(data: np.ndarray, hashes: list[int]) -> list[tuple[int, int]]:
    """The blocks (start, stop) that do not match their checksums."""
    found = hash_blocks(data)
    return [
        (number * BLOCK_BYTES, min((number + 1) * BLOCK_BYTES, data.size))
        for number, (one, other) in enumerate(zip(found, hashes, strict=True))
        if one != other
    ]
