"""What a store does: generations of its node's ranks, and their commit over all stores (docs/recovery.md).

It never touches a trainer's memory but the slots, and a trainer never waits for it but in
`wait_committed`. Hashing, coding, serving slices and writing checkpoints run in threads beside the event loop.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from trainrt.checkpoint.store.checkpointing import CheckpointWriter, Place, write_own_part
from trainrt.checkpoint.store.coding import give_way
from trainrt.checkpoint.store.generation import Generation, Generations, Member, State
from trainrt.checkpoint.store.group import Group
from trainrt.checkpoint.store.mirror import Order
from trainrt.checkpoint.store.parity import ParityKeeper
from trainrt.checkpoint.store.protocol import Connection
from trainrt.checkpoint.store.reading import VerifiedSlot, fragment_of
from trainrt.checkpoint.store.slots import BLOCK_BYTES, Slots, hash_blocks, owner_of, shared_folder
from trainrt.errors import StaleIncarnation, StoreError, TrainrtError

HASH_AT_ONCE = 8 * BLOCK_BYTES
VOTE_AGAIN_SECONDS = 0.05
SCRUB_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Described:
    """What a rank's slots hold: the digest of the layout, bytes, and the ranks whose shares it holds as well."""

    layout: str
    bytes: int
    replicas: frozenset[int]


class Store:
    """State and operations of one store; `op_*` are the requests it answers, `keeper`'s too."""

    def __init__(self, *, run_id: str, node: str, token: str, grace_seconds: float) -> None:
        self.run_id, self.node, self.token = run_id, node, token
        self.folder = shared_folder(run_id, node)
        self.incarnation = 0
        self.configuration = 0
        self.stores: dict[str, str] = {}
        self.nodes_of_ranks: dict[int, str] = {}
        self.groups: tuple[Group, ...] = ()
        self.leader = node
        self.spill: Path | None = None
        self.generations = Generations()
        self.slots = Slots(self.folder, node)
        self.layouts: dict[str, list[dict[str, Any]]] = {}
        self.described: dict[int, Described] = {}
        self.given_up: set[int] = set()
        self.done = asyncio.Event()
        self.changed = asyncio.Condition()
        self.threads = ThreadPoolExecutor(max_workers=6, thread_name_prefix="store", initializer=give_way)
        self.sending = ThreadPoolExecutor(max_workers=6, thread_name_prefix="send", initializer=give_way)
        self.keeper = ParityKeeper(self)
        self.repaired = 0
        self._grace = grace_seconds
        self._renewed = time.monotonic()
        self._votes = Votes()
        self._checkpoints: dict[int, str] = {}
        self._failures: dict[int, str] = {}
        self._writer: CheckpointWriter | None = None
        self._reading: dict[tuple[int, int, int], VerifiedSlot] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    # Answers to drivers and agents.

    async def op_configure(self, message: dict[str, Any]) -> dict[str, Any]:
        """Who belongs to an incarnation. Raises StoreError for an older one than is known."""
        if message["incarnation"] < self.incarnation:
            raise StaleIncarnation(
                f"incarnation {message['incarnation']} is stale; this store serves {self.incarnation}"
            )
        if message["incarnation"] > self.incarnation:
            self.described.clear()
        if message["stores"].get(self.leader) != self.stores.get(self.leader):
            # Who wrote a checkpoint is gone, so nobody will finish it: its generation may go.
            for generation in self.generations:
                generation.pinned = False
        self.incarnation, self.configuration = message["incarnation"], message["configuration"]
        self.stores = message["stores"]
        self.nodes_of_ranks = {int(rank): node for rank, node in message["nodes_of_ranks"].items()}
        self.groups = tuple(map(Group.from_json, message["groups"]))
        self.leader = message["leader"]
        self.spill = Path(message["spill"])
        self._votes = Votes()
        self.given_up.clear()
        self.generations.begin_incarnation(self.incarnation)
        self._writer = CheckpointWriter(Path(message["checkpoints"]), keep=message["keep"], place=self._place())
        self._renewed = time.monotonic()
        self._reclaim()
        await self.notify()
        return {}

    async def op_status(self, _: dict[str, Any]) -> dict[str, Any]:
        return {
            "node": self.node, "pid": os.getpid(), "incarnation": self.incarnation,
            "generations": [g.summary() for g in self.generations if g.state is not State.COPYING or g.sealed_ranks()],
            "checkpoints": sorted(self._checkpoints), "bytes": self.slots.bytes, "repaired": self.repaired,
            "pulled": self.keeper.pulled,
        }  # fmt: skip

    async def op_renew(self, _: dict[str, Any]) -> dict[str, Any]:
        self._renewed = time.monotonic()
        return {"links": dict(self.keeper.links)}

    async def op_shutdown(self, _: dict[str, Any]) -> dict[str, Any]:
        self.done.set()
        return {}

    # Answers to trainers of this node.

    async def op_describe(self, message: dict[str, Any]) -> dict[str, Any]:
        self.current(message)
        self.described[message["rank"]] = Described(
            self.keep_layout(message["layout"]), message["bytes"], frozenset(message["replicas"])
        )
        await self.notify()
        return {}

    def keep_layout(self, layout: list[dict[str, Any]]) -> str:
        """Remember a layout; its digest is its name from then on."""
        name = xxhash.xxh3_128_hexdigest(json.dumps(layout).encode())
        self.layouts[name] = layout
        return name

    async def op_begin(self, message: dict[str, Any]) -> dict[str, Any]:
        """A slot to write a step's state into; null, with the reason, where there is none."""
        self.current(message)
        rank, step = message["rank"], message["step"]
        if step in self.given_up:
            return {"slot": None, "reason": "another rank has no snapshot of this step"}
        described = self.described[rank]
        pending = self.generations.pending(self.incarnation)
        spill = self.spill if message["checkpoint"] else None
        slot = (
            None if pending else self.slots.take(owner_of(rank), described.bytes, used=self.slots_in_use(), spill=spill)
        )
        if slot is None:
            self.spawn(self._tell_all("give_up", {"step": step, "incarnation": self.incarnation}))
            reason = (
                "the generation before is not committed"
                if pending
                else f"no room for {described.bytes} bytes in {self.folder}"
            )
            return {"slot": None, "reason": reason}
        generation = self.generations.get(step, self.incarnation)
        if generation is None:
            made = Generation(step, self.incarnation, self.node, dict(self.nodes_of_ranks), self.groups)
            made.mirror = self.keeper.mirror(self.incarnation)
            generation = self.generations.open(made)
            self.spawn(self._protect(generation))
        generation.members[rank] = Member(rank, slot, described.bytes, described.layout)
        await self.notify()
        return {"slot": slot, "mirror": self._mirror_of(generation, rank)}

    @staticmethod
    def _mirror_of(generation: Generation, rank: int) -> dict[str, Any] | None:
        """What a rank is to copy beside its own share, and where."""
        mirror = generation.mirror
        if rank not in mirror.slots:
            return None
        orders: list[Order] = mirror.orders[rank]
        return {"slot": mirror.slots[rank], "bytes": mirror.sizes[rank], "orders": orders}

    def slots_in_use(self) -> Collection[str]:
        return self.generations.slots_in_use()

    def _reclaim(self) -> None:
        """Remove what no generation holds and no rank of this incarnation, nor parity, can use."""
        sizes = {owner_of(rank): described.bytes for rank, described in self.described.items()}
        owners = {owner_of(rank) for rank, node in self.nodes_of_ranks.items() if node == self.node}

        def wanted(owner: str, size: int) -> bool:
            return self.keeper.wants(owner, size) or (owner in owners and sizes.get(owner, size) == size)

        self.slots.reclaim(used=self.slots_in_use(), wanted=wanted)
        held = {member.layout for generation in self.generations for member in generation.members.values()}
        kept = {*held, *(described.layout for described in self.described.values()), *self.keeper.layouts_held()}
        self.layouts = {name: layout for name, layout in self.layouts.items() if name in kept}

    async def op_give_up(self, message: dict[str, Any]) -> dict[str, Any]:
        """A rank has no snapshot of a step, so nobody waits for it: all keep the one before."""
        self._of_now(message)
        self.given_up.add(message["step"])
        generation = self.generations.get(message["step"], self.incarnation)
        if generation is not None and generation.state is not State.COMMITTED:
            self.generations.drop(generation)
        await self.notify()
        return {}

    async def op_copied(self, message: dict[str, Any]) -> dict[str, Any]:
        """The trainer has written a slot up to here: hash what is there, so that coding can begin."""
        self.current(message)
        generation = self.generations.get(message["step"], self.incarnation)
        if generation is not None and message["rank"] in generation.members:
            member = generation.members[message["rank"]]
            member.copied = max(member.copied, message["bytes"] // BLOCK_BYTES * BLOCK_BYTES)
            self.spawn(self._hash(generation, member))
        return {}

    async def op_seal(self, message: dict[str, Any]) -> dict[str, Any]:
        """The trainer is done with a slot: hash the rest of it beside the loop, then tell the leader."""
        self.current(message)
        generation = self.generations.get(message["step"], self.incarnation)
        if message["step"] in self.given_up:
            return {}
        if generation is None:
            raise StoreError(f"generation {message['step']} was not begun")
        self._failures.pop(message["step"], None)
        generation.checkpoint = generation.checkpoint or message["checkpoint"]
        generation.pinned = generation.checkpoint
        member = generation.members[message["rank"]]
        member.metadata, member.copied = message["metadata"], member.bytes
        self.spawn(self._hash(generation, member))
        return {}

    async def _hash(self, generation: Generation, member: Member) -> None:
        """Hash a member as far as it is copied; the last block seals it."""
        if member.hashing:
            return
        member.hashing = True
        loop, data = asyncio.get_running_loop(), self.slots.map(member.slot)
        while (start := len(member.hashes) * BLOCK_BYTES) < member.copied and generation.state is State.COPYING:
            stop = min(start + HASH_AT_ONCE, member.copied)
            member.hashes += await loop.run_in_executor(self.threads, hash_blocks, data[start:stop])
            await self.notify()
        member.hashing = False
        whole = member.copied == member.bytes and len(member.hashes) * BLOCK_BYTES >= member.bytes
        if generation.state is State.COPYING and whole and not member.sealed and generation.seal(member.rank):
            fields = self._head(generation) | {"ranks": sorted(generation.expected)}
            self.spawn(self._vote("sealed", generation, fields))
            await self._settle(generation)
        await self.notify()

    async def _protect(self, generation: Generation) -> None:
        """Code this store's parity, which begins before the trainers have copied everything."""
        try:
            await self.keeper.encode(generation)
        except Exception as error:
            # Waited for in vain it would stop all generations after it.
            print(f"parity of step {generation.step}: {error!r}", file=sys.stderr, flush=True)
            await self._tell_all("give_up", self._head(generation))
        generation.parity_over = True
        await self._settle(generation)

    async def _settle(self, generation: Generation) -> None:
        """With members and parity complete, this store is ready for the commit."""
        if generation.protect():
            fields = self._head(generation) | {
                "ranks": sorted(generation.expected),
                "checkpoint": generation.checkpoint,
            }
            self.spawn(self._vote("protected", generation, fields))

    async def _vote(self, op: str, generation: Generation, fields: dict[str, Any]) -> None:
        """Tell the leader, who may be behind with its configuration: until it has heard, or it does not matter any more."""
        while not generation.over and not await self._tell(self.leader, op, fields):
            await asyncio.sleep(VOTE_AGAIN_SECONDS)

    @staticmethod
    def _head(generation: Generation) -> dict[str, Any]:
        return {"step": generation.step, "incarnation": generation.incarnation}

    async def op_wait(self, message: dict[str, Any]) -> dict[str, Any]:
        """Wait until a generation is committed here, or can no longer be."""
        key = (message["step"], message["incarnation"])

        def over() -> bool:
            generation = self.generations.get(*key)
            return generation is None or generation.state is State.COMMITTED or generation.abandoned

        await self.until(over, message["timeout_seconds"])
        generation = self.generations.get(*key)
        return {"committed": generation is not None and generation.state is State.COMMITTED}

    async def op_wait_checkpoint(self, message: dict[str, Any]) -> dict[str, Any]:
        step = message["step"]
        await self.until(lambda: step in self._checkpoints or step in self._failures, message["timeout_seconds"])
        if step in self._checkpoints:
            return {"path": self._checkpoints[step]}
        raise StoreError(f"checkpoint of step {step}: {self._failures.get(step, 'not written in time')}")

    async def op_checkpoint_outcome(self, message: dict[str, Any]) -> dict[str, Any]:
        """Where the checkpoint of a step lies, or why it was not written; both null while it is being written."""
        return {"path": self._checkpoints.get(message["step"]), "failure": self._failures.get(message["step"])}

    # Between stores.

    async def op_sealed(self, message: dict[str, Any]) -> dict[str, Any]:
        """To the leader: a node's ranks are sealed. Steps that others went past without sealing are given up."""
        self._of_now(message)
        for step in self._votes.sealed(message["step"], message["ranks"], world=set(self.nodes_of_ranks)):
            await self._tell_all("give_up", {"step": step, "incarnation": self.incarnation})
        return {}

    async def op_protected(self, message: dict[str, Any]) -> dict[str, Any]:
        """To the leader: a node's part is complete. With all parts in, the generation is committed everywhere."""
        self._of_now(message)
        key = (message["step"], message["incarnation"])
        if self._votes.protected(key[0], message["ranks"]) == set(self.nodes_of_ranks):
            self._votes.decide(key[0])
            await self._tell_all("commit", {"step": key[0], "incarnation": key[1]})
            if message["checkpoint"] and self._writer is not None:
                self.spawn(self._write_checkpoint(*key))
        return {}

    async def op_commit(self, message: dict[str, Any]) -> dict[str, Any]:
        self._of_now(message)
        generation = self.generations.get(message["step"], message["incarnation"])
        if generation is not None and generation.state is State.PROTECTED:
            self.generations.commit(generation)
            self._reclaim()
            self._reading = {key: slot for key, slot in self._reading.items() if self.generations.get(*key[:2])}
            await self.notify()
        return {}

    async def _write_checkpoint(self, step: int, incarnation: int) -> None:
        assert self._writer is not None
        fields: dict[str, Any] = {"step": step, "incarnation": incarnation, "path": None, "failure": None}
        try:
            fields["path"] = str(await self.in_thread(self._writer.write, step, incarnation))
        except (TrainrtError, OSError) as error:
            fields["failure"] = str(error)
        await self._tell_all("checkpoint_done", fields)

    async def op_checkpoint_done(self, message: dict[str, Any]) -> dict[str, Any]:
        generation = self.generations.get(message["step"], message["incarnation"])
        if generation is not None:
            generation.pinned = False
        if message["path"] is not None:
            self._checkpoints[message["step"]] = message["path"]
        else:
            self._failures[message["step"]] = message["failure"]
        await self.notify()
        return {}

    async def op_write_part(self, message: dict[str, Any]) -> dict[str, Any]:
        return {"results": await self.in_thread(write_own_part, self._place(), message)}

    async def op_index(self, message: dict[str, Any]) -> dict[str, Any]:
        """What this store holds of a step: per generation and rank the layout, the slot and its checksums."""
        found = [g for g in self.generations if g.step == message["step"] and g.sealed_ranks()]
        return {"generations": [self._index(generation) for generation in found]}

    def _index(self, generation: Generation) -> dict[str, Any]:
        return {
            "incarnation": generation.incarnation,
            "world_size": generation.world_size,
            "members": {
                member.rank: {**member.facts(), "slot": member.slot, "layout": self.layouts[member.layout]}
                for member in generation.members.values()
                if member.sealed
            },
        }

    async def op_fetch(self, message: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        """The packed elements of a fragment, verified."""
        return {}, await self.in_thread(self._fetch, message)

    def _fetch(self, message: dict[str, Any]) -> bytes:
        key = (message["step"], message["incarnation"], message["rank"])
        generation = self.generations.get(*key[:2])
        if generation is None or key[2] not in generation.members:
            raise StoreError(f"generation {key[0]} of incarnation {key[1]}: rank {key[2]} is not here")
        if key not in self._reading:
            member = generation.members[key[2]]
            self._reading[key] = VerifiedSlot(member.slot, member.bytes, member.hashes)
        return self._reading[key].view(fragment_of(message), message["item_bytes"]).tobytes()

    # Machinery.

    def _place(self) -> Place:
        socket = str(self.folder / "store.sock")
        return Place(self.node, socket, self.stores, self.nodes_of_ranks, self.run_id, self.token)

    def current(self, message: dict[str, Any]) -> None:
        if message["incarnation"] < self.incarnation:
            raise StaleIncarnation(
                f"incarnation {message['incarnation']} is stale; this store serves {self.incarnation}"
            )
        if message["incarnation"] > self.incarnation:
            # It is new, and nobody has told it yet whom it serves.
            raise StoreError(
                f"incarnation {message['incarnation']} is not known yet; this store serves {self.incarnation}"
            )

    def _of_now(self, message: dict[str, Any]) -> None:
        """What stores tell each other counts within one configuration: a store started anew has forgotten its votes."""
        self.current(message)
        if message["configuration"] != self.configuration:
            raise StoreError(
                f"configuration {message['configuration']} is not {self.configuration}, which is in force here"
            )

    async def in_thread(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.threads, work, *arguments)

    async def until(self, holds: Callable[[], bool], seconds: float) -> bool:
        """Wait for a fact of this store. False where it has not come in time."""
        async with self.changed:
            with suppress(TimeoutError):
                await asyncio.wait_for(self.changed.wait_for(holds), seconds)
        return holds()

    async def notify(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def _tell(self, node: str, op: str, fields: dict[str, Any]) -> bool:
        """Send a message to a store. False where it is gone or refuses."""
        fields = {**fields, "configuration": self.configuration}
        with suppress(StoreError):
            if node == self.node:
                await getattr(self, f"op_{op}")(fields)
            else:
                await self.in_thread(self._send, self.stores[node], op, fields)
            return True
        return False

    async def _tell_all(self, op: str, fields: dict[str, Any]) -> None:
        await asyncio.gather(*(self._tell(node, op, fields) for node in self.stores))

    def _send(self, address: str, op: str, fields: dict[str, Any]) -> None:
        connection = Connection(address, token=self.token, run_id=self.run_id, timeout_seconds=10)
        try:
            connection.request(op, **fields)
        finally:
            connection.close()

    def spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def answer(self, message: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        """Answer one request; refusals are answers too."""
        name = f"op_{message.get('op')}"
        operation = getattr(self, name, None) or getattr(self.keeper, name, None)
        if operation is None:
            return {"error": f"unknown request {message.get('op')!r}"}, b""
        try:
            answer = await operation(message)
        except StaleIncarnation as error:
            return {"error": str(error), "stale": True}, b""
        except (TrainrtError, OSError, KeyError) as error:
            return {"error": f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else str(error)}, b""
        return answer if isinstance(answer, tuple) else (answer, b"")

    async def watch_lease(self) -> None:
        while not self.done.is_set():
            if time.monotonic() - self._renewed > self._grace:
                self.done.set()
            with suppress(TimeoutError):
                await asyncio.wait_for(self.done.wait(), 0.5)

    async def watch_rot(self) -> None:
        """Scrub now and then: what rots while nothing newer is committed is repaired before it is needed."""
        while not self.done.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self.done.wait(), SCRUB_SECONDS)
            try:
                repaired = await self.keeper.op_scrub({})
            except (TrainrtError, OSError) as error:
                print(f"scrubbing: {error}", file=sys.stderr, flush=True)
            else:
                self.repaired += sum(repaired.values())


class Votes:
    """What the leader has heard of the steps of an incarnation that are not committed yet."""

    def __init__(self) -> None:
        self._sealed: dict[int, set[int]] = {}
        self._protected: dict[int, set[int]] = {}
        self._newest: dict[int, int] = {}
        self._decided: set[int] = set()

    def sealed(self, step: int, ranks: list[int], *, world: set[int]) -> list[int]:
        """Count sealed ranks. Returns the steps that some rank went past without sealing them: its store was dead."""
        if step not in self._decided:
            # A vote may come twice, and after the decision: counted anew it would give up what is committed.
            self._sealed.setdefault(step, set()).update(ranks)
        self._newest.update({rank: max(step, self._newest.get(rank, 0)) for rank in ranks})
        passed = [
            earlier
            for earlier, held in self._sealed.items()
            if any(self._newest.get(rank, 0) > earlier for rank in world - held)
        ]
        for earlier in passed:
            self.decide(earlier)
        return passed

    def protected(self, step: int, ranks: list[int]) -> set[int]:
        """Count ranks whose node is ready for the commit. Returns all of them; none once the step is decided."""
        if step in self._decided:
            return set()
        self._protected.setdefault(step, set()).update(ranks)
        return self._protected[step]

    def decide(self, step: int) -> None:
        """It is committed, or given up: nothing that is still said of it matters."""
        self._decided.add(step)
        self._sealed.pop(step, None)
        self._protected.pop(step, None)
