"""The store's process: one per node, child of nobody, ends by itself when its lease runs out.

It never touches a trainer's memory but the slots, and a trainer never waits for it but in
`wait_committed`. Hashing, serving slices and writing checkpoints run in threads beside the event loop.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from trainrt.checkpoint.store.checkpointing import CheckpointWriter, Place, write_own_part
from trainrt.checkpoint.store.generation import Generation, Generations, Member, State
from trainrt.checkpoint.store.protocol import Connection, pack, read_request
from trainrt.checkpoint.store.reading import VerifiedSlot, fragment_of
from trainrt.checkpoint.store.slots import create_slot, hash_blocks, map_slot, shared_folder
from trainrt.errors import StoreError, TrainrtError
from trainrt.run_dir import write_json


class Store:
    """State and operations of one store; `op_*` are the requests it answers."""

    def __init__(self, *, run_id: str, node: str, token: str, grace_seconds: float) -> None:
        self.run_id, self.node, self.token = run_id, node, token
        self.folder = shared_folder(run_id, node)
        self.incarnation = 0
        self.stores: dict[str, str] = {}
        self.nodes_of_ranks: dict[int, str] = {}
        self.leader = node
        self.spill: Path | None = None
        self.generations = Generations()
        self.done = asyncio.Event()
        self._grace = grace_seconds
        self._renewed = time.monotonic()
        self._changed = asyncio.Condition()
        self._described: dict[int, tuple[list[dict[str, Any]], int]] = {}
        self._slots: dict[str, tuple[int, int]] = {}
        self._made = 0
        self._maps: dict[str, np.ndarray] = {}
        self._reported: dict[tuple[int, int], set[int]] = {}
        self._given_up: set[int] = set()
        self._checkpoints: dict[int, str] = {}
        self._failures: dict[int, str] = {}
        self._writer: CheckpointWriter | None = None
        self._reading: dict[tuple[int, int, int], VerifiedSlot] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self.threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="store")

    # Answers to drivers and agents.

    async def op_configure(self, message: dict[str, Any]) -> dict[str, Any]:
        """Who belongs to an incarnation. Raises StoreError for an older one than is known."""
        if message["incarnation"] < self.incarnation:
            raise StoreError(f"incarnation {message['incarnation']} is stale; this store serves {self.incarnation}")
        if message["incarnation"] > self.incarnation:
            self._described.clear()
        if message["stores"].get(self.leader) != self.stores.get(self.leader):
            # Who wrote a checkpoint is gone, so nobody will finish it: its generation may go.
            for generation in self.generations:
                generation.pinned = False
        self.incarnation = message["incarnation"]
        self.stores = message["stores"]
        self.nodes_of_ranks = {int(rank): node for rank, node in message["nodes_of_ranks"].items()}
        self.leader = message["leader"]
        self.spill = Path(message["spill"])
        self._reported.clear()
        self._given_up.clear()
        self.generations.begin_incarnation(self.incarnation)
        self._writer = CheckpointWriter(Path(message["checkpoints"]), keep=message["keep"], place=self._place())
        self._renewed = time.monotonic()
        self._reclaim()
        await self._notify()
        return {}

    async def op_status(self, _: dict[str, Any]) -> dict[str, Any]:
        return {
            "node": self.node, "pid": os.getpid(), "incarnation": self.incarnation,
            "generations": [g.summary() for g in self.generations if g.state is not State.COPYING or g.sealed_ranks()],
            "checkpoints": sorted(self._checkpoints), "bytes": sum(size for _, size in self._slots.values()),
        }  # fmt: skip

    async def op_renew(self, _: dict[str, Any]) -> dict[str, Any]:
        self._renewed = time.monotonic()
        return {}

    async def op_shutdown(self, _: dict[str, Any]) -> dict[str, Any]:
        self.done.set()
        return {}

    # Answers to trainers of this node.

    async def op_describe(self, message: dict[str, Any]) -> dict[str, Any]:
        self._current(message)
        self._described[message["rank"]] = (message["layout"], message["bytes"])
        return {}

    async def op_begin(self, message: dict[str, Any]) -> dict[str, Any]:
        """A slot to write a step's state into; null, with the reason, where there is none."""
        self._current(message)
        rank, step = message["rank"], message["step"]
        if step in self._given_up:
            return {"slot": None, "reason": "another rank has no snapshot of this step"}
        layout, size = self._described[rank]
        pending = self.generations.pending(self.incarnation)
        slot = None if pending else self._free_slot(rank, size, spill=message["checkpoint"])
        if slot is None:
            self._spawn(self._tell_all("give_up", {"step": step, "incarnation": self.incarnation}))
            reason = (
                "the generation before is not committed" if pending else f"no room for {size} bytes in {self.folder}"
            )
            return {"slot": None, "reason": reason}
        local = frozenset(r for r, node in self.nodes_of_ranks.items() if node == self.node)
        generation = self.generations.open(Generation(step, self.incarnation, len(self.nodes_of_ranks), local))
        generation.members[rank] = Member(rank, slot, size, layout)
        return {"slot": slot}

    def _free_slot(self, rank: int, size: int, *, spill: bool) -> str | None:
        used = self.generations.slots_in_use(rank)
        for slot, facts in self._slots.items():
            if slot not in used and facts == (rank, size):
                return slot
        for folder in (self.folder, self.spill if spill else None):
            if folder is None:
                continue
            folder.mkdir(parents=True, exist_ok=True)
            self._made += 1
            path = folder / f"rank-{rank:05d}-slot-{self.node}-{self._made}"
            if create_slot(path, size):
                self._slots[str(path)] = (rank, size)
                return str(path)
        return None

    def _reclaim(self) -> None:
        """Remove the slots that nothing is in and no rank of this incarnation can use."""
        for slot, (rank, size) in list(self._slots.items()):
            fits = self.nodes_of_ranks.get(rank) == self.node and self._described.get(rank, (None, size))[1] == size
            if not fits and slot not in self.generations.slots_in_use(rank):
                del self._slots[slot]
                self._maps.pop(slot, None)
                Path(slot).unlink(missing_ok=True)

    async def op_give_up(self, message: dict[str, Any]) -> dict[str, Any]:
        """A rank has no snapshot of a step, so nobody waits for it: all keep the one before."""
        self._current(message)
        self._given_up.add(message["step"])
        generation = self.generations.get(message["step"], self.incarnation)
        if generation is not None and generation.state is not State.COMMITTED:
            self.generations.drop(generation)
        await self._notify()
        return {}

    async def op_seal(self, message: dict[str, Any]) -> dict[str, Any]:
        """The trainer is done with a slot: hash it beside the loop, then tell the leader."""
        self._current(message)
        generation = self.generations.get(message["step"], self.incarnation)
        if message["step"] in self._given_up:
            return {}
        if generation is None:
            raise StoreError(f"generation {message['step']} was not begun")
        self._failures.pop(message["step"], None)
        generation.checkpoint = generation.checkpoint or message["checkpoint"]
        generation.pinned = generation.checkpoint
        self._spawn(self._seal(generation, message["rank"], message["metadata"]))
        return {}

    async def _seal(self, generation: Generation, rank: int, metadata: dict[str, Any] | None) -> None:
        member = generation.members[rank]
        loop = asyncio.get_running_loop()
        if member.slot not in self._maps:
            self._maps[member.slot] = map_slot(member.slot, member.bytes)
        hashes = await loop.run_in_executor(self.threads, hash_blocks, self._maps[member.slot])
        if generation.state is not State.COPYING:
            return
        if generation.seal(rank, hashes, metadata):
            fields = {
                "step": generation.step, "incarnation": generation.incarnation, "ranks": sorted(generation.expected),
                "checkpoint": generation.checkpoint,
            }  # fmt: skip
            await self._tell(self.leader, "sealed", fields)

    async def op_wait(self, message: dict[str, Any]) -> dict[str, Any]:
        """Wait until a generation is committed here, or can no longer be."""
        key = (message["step"], message["incarnation"])

        def over() -> bool:
            generation = self.generations.get(*key)
            return generation is None or generation.state is State.COMMITTED or generation.abandoned

        async with self._changed:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait_for(over), message["timeout_seconds"])
        generation = self.generations.get(*key)
        return {"committed": generation is not None and generation.state is State.COMMITTED}

    async def op_wait_checkpoint(self, message: dict[str, Any]) -> dict[str, Any]:
        step = message["step"]
        async with self._changed:
            with suppress(TimeoutError):
                await asyncio.wait_for(
                    self._changed.wait_for(lambda: step in self._checkpoints or step in self._failures),
                    message["timeout_seconds"],
                )
        if step in self._checkpoints:
            return {"path": self._checkpoints[step]}
        raise StoreError(f"checkpoint of step {step}: {self._failures.get(step, 'not written in time')}")

    async def op_checkpoint_outcome(self, message: dict[str, Any]) -> dict[str, Any]:
        """Where the checkpoint of a step lies, or why it was not written; both null while it is being written."""
        return {"path": self._checkpoints.get(message["step"]), "failure": self._failures.get(message["step"])}

    # Between stores.

    async def op_sealed(self, message: dict[str, Any]) -> dict[str, Any]:
        """To the leader: a node's ranks are sealed. With all of them in, the generation is committed everywhere."""
        self._current(message)
        key = (message["step"], message["incarnation"])
        ranks = self._reported.setdefault(key, set())
        ranks.update(message["ranks"])
        await self._give_up_passed(key[0], set(message["ranks"]))
        if ranks == set(self.nodes_of_ranks):
            del self._reported[key]
            await self._tell_all("commit", {"step": key[0], "incarnation": key[1]})
            if message["checkpoint"] and self._writer is not None:
                self._spawn(self._write_checkpoint(*key))
        return {}

    async def _give_up_passed(self, step: int, ranks: set[int]) -> None:
        """Ranks that seal a later step went on without an earlier one (their store was dead): nobody waits for it."""
        for earlier in [key for key, held in self._reported.items() if key[0] < step and ranks - held]:
            del self._reported[earlier]
            await self._tell_all("give_up", {"step": earlier[0], "incarnation": earlier[1]})

    async def op_commit(self, message: dict[str, Any]) -> dict[str, Any]:
        self._current(message)
        generation = self.generations.get(message["step"], message["incarnation"])
        if generation is not None and generation.state is State.SEALED:
            self.generations.commit(generation)
            self._reclaim()
            self._reading = {key: slot for key, slot in self._reading.items() if self.generations.get(*key[:2])}
            await self._notify()
        return {}

    async def _write_checkpoint(self, step: int, incarnation: int) -> None:
        assert self._writer is not None
        writer, loop = self._writer, asyncio.get_running_loop()
        fields: dict[str, Any] = {"step": step, "incarnation": incarnation, "path": None, "failure": None}
        try:
            fields["path"] = str(await loop.run_in_executor(self.threads, writer.write, step, incarnation))
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
        await self._notify()
        return {}

    async def op_write_part(self, message: dict[str, Any]) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        return {"results": await loop.run_in_executor(self.threads, write_own_part, self._place(), message)}

    async def op_index(self, message: dict[str, Any]) -> dict[str, Any]:
        """What this store holds of a step: per generation and rank the layout, the slot and its checksums."""
        return {"generations": [_index(g) for g in self.generations if g.step == message["step"] and g.sealed_ranks()]}

    async def op_fetch(self, message: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        """The packed elements of a fragment, verified."""
        loop = asyncio.get_running_loop()
        return {}, await loop.run_in_executor(self.threads, self._fetch, message)

    def _fetch(self, message: dict[str, Any]) -> bytes:
        key = (message["step"], message["incarnation"], message["rank"])
        generation = self.generations.get(*key[:2])
        if generation is None or key[2] not in generation.members:
            raise StoreError(f"generation {key[0]} of incarnation {key[1]}: rank {key[2]} is not here")
        if key not in self._reading:
            member = generation.members[key[2]]
            self._reading[key] = VerifiedSlot(member.slot, member.bytes, member.hashes or [])
        return self._reading[key].view(fragment_of(message), message["item_bytes"]).tobytes()

    # Machinery.

    def _place(self) -> Place:
        socket = str(self.folder / "store.sock")
        return Place(self.node, socket, self.stores, self.nodes_of_ranks, self.run_id, self.token)

    def _current(self, message: dict[str, Any]) -> None:
        if message["incarnation"] != self.incarnation:
            raise StoreError(f"incarnation {message['incarnation']} is stale; this store serves {self.incarnation}")

    async def _tell(self, node: str, op: str, fields: dict[str, Any]) -> None:
        """Send a message to a store; one that is gone hears of it no more, and the generation stays uncommitted."""
        with suppress(StoreError):
            if node == self.node:
                await getattr(self, f"op_{op}")(fields)
            else:
                loop = asyncio.get_running_loop()
                await loop.run_in_executor(self.threads, self._send, self.stores[node], op, fields)

    async def _tell_all(self, op: str, fields: dict[str, Any]) -> None:
        await asyncio.gather(*(self._tell(node, op, fields) for node in self.stores))

    def _send(self, address: str, op: str, fields: dict[str, Any]) -> None:
        connection = Connection(address, token=self.token, run_id=self.run_id, timeout_seconds=10)
        try:
            connection.request(op, **fields)
        finally:
            connection.close()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection: requests in turn."""
        with suppress(ConnectionError, ValueError):
            while (message := await read_request(reader)) is not None:
                if not hmac.compare_digest(str(message.get("token", "")), self.token):
                    break
                header, payload = await self._answer(message)
                writer.write(pack(header, len(payload)))
                writer.write(payload)
                await writer.drain()
        writer.close()

    async def _answer(self, message: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        operation = getattr(self, f"op_{message.get('op')}", None)
        if operation is None:
            return {"error": f"unknown request {message.get('op')!r}"}, b""
        try:
            answer = await operation(message)
        except (TrainrtError, OSError, KeyError) as error:
            return {"error": f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else str(error)}, b""
        return answer if isinstance(answer, tuple) else (answer, b"")

    async def watch_lease(self) -> None:
        while not self.done.is_set():
            if time.monotonic() - self._renewed > self._grace:
                self.done.set()
            with suppress(TimeoutError):
                await asyncio.wait_for(self.done.wait(), 0.5)


def _index(generation: Generation) -> dict[str, Any]:
    return {
        "incarnation": generation.incarnation,
        "world_size": generation.world_size,
        "members": {
            rank: {"slot": m.slot, "bytes": m.bytes, "layout": m.layout, "hashes": m.hashes, "metadata": m.metadata}
            for rank, m in generation.members.items()
            if m.hashes is not None
        },
    }


async def run(options: dict[str, Any]) -> None:
    """Listen until shutdown, a signal, or the end of the lease; leave nothing in shared memory."""
    store = Store(
        run_id=options["run_id"], node=options["node"], token=options["token"], grace_seconds=options["grace_seconds"]
    )
    store.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = store.folder / "store.sock"
    path.unlink(missing_ok=True)
    unix = await asyncio.start_unix_server(store.serve, str(path))
    tcp = await asyncio.start_server(store.serve, options["host"], 0)
    port = tcp.sockets[0].getsockname()[1]
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, store.done.set)
    write_json(store.folder / "store.json", {"pid": os.getpid(), "address": f"{options['host']}:{port}"})
    await store.watch_lease()
    unix.close()
    tcp.close()
    shutil.rmtree(store.folder, ignore_errors=True)
    if store.spill is not None:
        shutil.rmtree(store.spill, ignore_errors=True)
    with suppress(OSError):
        store.folder.parent.rmdir()


def main() -> None:
    """Read options from stdin, leave the parent's session, and serve."""
    options = json.loads(sys.stdin.readline())
    if os.fork():
        os._exit(0)
    os.setsid()
    log = os.open(options["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    null = os.open(os.devnull, os.O_RDONLY)
    for fd, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(fd, target)
    asyncio.run(run(options))
    os._exit(0)


if __name__ == "__main__":
    main()
