"""The agent: one detached Ray actor per node. It starts and watches the node's workers and its store.

What happens to them (`workers.py`, `store_process.py`) is kept as numbered events until the driver has fetched them:
a driver's poll is its heartbeat. Without one for `DRIVER_SILENCE_SECONDS` the workers are ended and
the agent waits, with its store, `grace_seconds` for another driver.

It decides nothing: who runs where, and what a fault means, is the driver's.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainrt.errors import StoreError
from trainrt.launch import stacks
from trainrt.launch.links import LinkReports
from trainrt.launch.orders import AgentOrders, Event
from trainrt.launch.store_process import StoreProcess
from trainrt.launch.workers import Workers
from trainrt.run_dir import RunDir, read_text

DRIVER_SILENCE_SECONDS = 3.0
POLL_SECONDS = 1.0
WATCH_SECONDS = 0.25
RENEW_SECONDS = 1.0


class Agent:
    """All methods are called by the driver, over Ray."""

    def __init__(self, orders: AgentOrders) -> None:
        self._orders = orders
        self._run_dir = Path(orders.run_dir)
        self._events: list[Event] = []
        self._sequence = 0
        self._news = asyncio.Event()
        self._over = asyncio.Event()
        self._workers = Workers(orders, tell=self._tell, spawn=self._spawn, over=self._over)
        self._store = StoreProcess(orders, tell=self._tell, spawn=self._spawn, over=self._over)
        self._stopped: set[int] = set()
        self._last_poll = time.monotonic()
        self._tasks: set[asyncio.Task[None]] = set()

    # What the driver asks.

    async def setup(self) -> dict[str, Any]:
        """Start the zygote and the store; idempotent, so that a new driver may ask again.

        Workers of an earlier driver are ended. Returns what the driver must know of this node.
        """
        from trainrt.checkpoint.store.slots import memory_bytes

        self._last_poll = time.monotonic()
        await self.end_workers(at_once=True)
        self._events.clear()
        sequence = self._sequence
        if not self._tasks:
            self._spawn(self._watch())
            self._spawn(self._renew())
        self._workers.warm_up()
        if self._store.pid is None:
            try:
                await self._store.start()
            except StoreError as error:
                # Whether a node without one gets ranks is the driver's to say.
                self._tell({"type": "store_failed", "message": str(error)})
        return {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "proof": read_text(self._run_dir / ".cluster" / "proof"),
            "python": sys.version.split()[0],
            "sequence": sequence,
            "store": self._store.record(),
            "memory_bytes": memory_bytes(self._orders.run_id),
        }

    async def poll(self, after: int) -> dict[str, Any]:
        """Events with a sequence number above `after` (those up to it are forgotten). Waits a second for one."""
        self._last_poll = time.monotonic()
        self._events = [event for event in self._events if event["sequence"] > after]
        if not self._events:
            self._news.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), POLL_SECONDS)
        self._last_poll = time.monotonic()
        return {"events": list(self._events), "processes": self.processes()}

    async def start(self, specs: list[dict[str, Any]]) -> None:
        """Run an incarnation: ranks with a live worker keep it, the others are forked, the rest is ended."""
        await self._workers.start(specs)

    async def stop(self) -> None:
        """Ask every worker for a checkpoint after its step, and an end."""
        self._workers.stop()

    async def kill(self, ranks: list[int]) -> None:
        """SIGKILL the workers of some ranks; their exits come as events."""
        self._workers.kill(ranks)

    async def monotonic(self) -> float:
        """This host's clock that nobody sets."""
        return time.monotonic()

    async def follow_clock(self, epoch: float) -> None:
        """The driver's time of day when that clock was zero: what ranks tell of their steps is on it."""
        self._workers.follow_clock(epoch)

    async def take_stacks(self, number: int) -> None:
        """Look at the stacks of this node's workers, from outside; they come as an event with the request's number, and with
        the workers' last collective calls.
        """
        dumps = RunDir(self._run_dir)
        pids = self._workers.pids()
        taken = await asyncio.gather(
            *(asyncio.to_thread(stacks.take, pid, dumps.stack_dump(rank)) for rank, pid in pids.items())
        )
        found = {rank: stack.to_json() for rank, stack in zip(pids, taken, strict=True)}
        self._tell({"type": "stacks", "number": number, "ranks": found, "calls": self._workers.last_calls()})

    async def last_calls(self) -> dict[int, dict[str, Any]]:
        """The last collective calls of this node's ranks, of those too whose worker is dead."""
        return self._workers.last_calls()

    async def selfcheck(self, device: str, seconds: float) -> dict[str, float]:
        """What this node can do, in the short form (`diagnostics/selfcheck.py`), or what of it is known after so long.

        With 0 seconds nothing is measured that takes any.
        """
        from trainrt.checkpoint.store.slots import memory_bytes
        from trainrt.diagnostics import selfcheck

        measured = {}
        if seconds > 0:
            measured = await asyncio.to_thread(
                selfcheck.run, selfcheck.SHORT, self._run_dir, device=device, seconds=seconds
            )
        # What the store has already counts as free.
        return {**measured, "shared_memory_free": float(memory_bytes(self._orders.run_id))}

    async def kill_store(self) -> None:
        """SIGKILL the store; another one is started as after any death of it."""
        self._store.kill()

    async def end_workers(self, *, at_once: bool) -> None:
        """End all workers, without events: by request, or `at_once` with SIGKILL."""
        await self._workers.end(at_once=at_once)

    async def shutdown(self) -> None:
        """End everything this node runs for the job, the store and its memory too."""
        self._over.set()
        self._sign_of_life().unlink(missing_ok=True)
        await self.end_workers(at_once=True)
        self._workers.close()
        await self._store.shutdown()

    def processes(self) -> list[dict[str, Any]]:
        """This node's lines of cluster.json."""
        node = self._orders.node
        found: list[dict[str, Any]] = [{"role": "agent", "pid": os.getpid(), "node": node, "rank": None}]
        if self._store.pid is not None:
            found.append({"role": "store", "pid": self._store.pid, "node": node, "rank": None})
        for rank, pid in sorted(self._workers.pids().items()):
            found.append({"role": "worker", "pid": pid, "node": node, "rank": rank})
        return found

    # Watching.

    def _look_for_stopped(self) -> None:
        """Tell of processes that the kernel calls stopped, for as long as they are, and once when they go on."""
        watched: list[tuple[int, int | None]] = [(pid, rank) for rank, pid in self._workers.pids().items()]
        if self._store.pid is not None:
            watched.append((self._store.pid, None))
        for pid, rank in watched:
            stopped = stacks.kernel_state(pid) == stacks.STOPPED
            if stopped or pid in self._stopped:
                self._tell({"type": "stopped", "rank": rank, "stopped": stopped})
            (self._stopped.add if stopped else self._stopped.discard)(pid)

    async def _watch(self) -> None:
        """The driver's heartbeat: end the workers without one, and everything after the grace time."""
        while not self._over.is_set():
            self._sign_of_life().touch()
            before = time.monotonic()
            await asyncio.sleep(WATCH_SECONDS)
            late = time.monotonic() - before - WATCH_SECONDS
            if late > WATCH_SECONDS:
                # This process stood still, and could not have heard the driver.
                self._last_poll = min(self._last_poll + late, time.monotonic())
            self._look_for_stopped()
            silence = time.monotonic() - self._last_poll
            if silence > DRIVER_SILENCE_SECONDS:
                # A driver that does come back hears of their ends.
                self._workers.abandon(f"was ended: its agent heard nothing of the driver for {silence:.1f} s")
            stop_asked = silence > DRIVER_SILENCE_SECONDS and (self._run_dir / "stop").exists()
            if silence > self._orders.grace_seconds or stop_asked:
                await self.shutdown()
                leave()

    async def _renew(self) -> None:
        """Keep the store's lease for as long as there is a driver, and pass on what it measured."""
        reports = LinkReports()
        while not self._over.is_set():
            await asyncio.sleep(RENEW_SECONDS)
            if time.monotonic() - self._last_poll < DRIVER_SILENCE_SECONDS:
                for link in reports.since(await self._store.renew()):
                    self._tell({"type": "link", "link": link})

    def _sign_of_life(self) -> Path:
        return self._run_dir / ".cluster" / f"agent-{self._orders.node}"

    def _tell(self, event: Event) -> None:
        self._sequence += 1
        self._events.append({"sequence": self._sequence, "time": time.time(), **event})
        self._news.set()

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def leave() -> None:
    """End this actor's process, and give back what it reserved."""
    import ray
    from ray.util import get_current_placement_group, remove_placement_group

    with suppress(Exception):
        group = get_current_placement_group()
        if group is not None:
            remove_placement_group(group)
    with suppress(Exception):
        ray.shutdown()
    os._exit(0)
