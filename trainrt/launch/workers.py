"""The workers of a node: forked by its zygote, given orders, listened to, ended.

A worker's end is heard of from the kernel, not from the worker, so that an interpreter that is stuck cannot hide it.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainrt.launch.orders import AgentOrders, Spawn, Tell
from trainrt.launch.processes import kill, when_ended
from trainrt.launch.zygote_handle import ZygoteHandle
from trainrt.parallel import calls
from trainrt.run_dir import read_text

EXIT_SECONDS = 5.0
"""How long a worker that was told to exit may take before it is killed."""
LAST_WORDS_SECONDS = 0.1
LINE_BYTES = 1 << 24


@dataclass(slots=True)
class Worker:
    """A forked worker: its rank for life, and the agent's end of its control socket. `why`: the agent ended it."""

    rank: int
    writer: asyncio.StreamWriter
    pid: int | None = None
    listener: asyncio.Task[None] | None = None
    exit_code: asyncio.Future[int] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    why: str | None = None
    incarnation: int = 0
    killed: bool = False


class Workers:
    """One worker a rank. over: the agent ends everything, and the end of the zygote is no news."""

    def __init__(self, orders: AgentOrders, *, tell: Tell, spawn: Spawn, over: asyncio.Event) -> None:
        self._orders, self._tell, self._spawn, self._over = orders, tell, spawn, over
        self._logs = Path(orders.run_dir) / "logs"
        self._workers: dict[int, Worker] = {}
        self._forked: dict[int, Worker] = {}
        self._calls: dict[int, int] = {}
        self._zygote: ZygoteHandle | None = None
        self._incarnation = 0
        self._epoch: float | None = None

    # Orders.

    def warm_up(self) -> ZygoteHandle:
        """A zygote, so that a worker is only a fork away."""
        if self._zygote is None:
            self._zygote = ZygoteHandle(self._orders, on_message=self._on_zygote, on_end=self._on_zygote_end)
        return self._zygote

    async def start(self, specs: list[dict[str, Any]]) -> None:
        """Run an incarnation: ranks with a live worker keep it, the others are forked, the rest is ended."""
        wanted = {spec["rank"] for spec in specs}
        await self._end([worker for rank, worker in self._workers.items() if rank not in wanted], at_once=True)
        for spec in specs:
            worker = self._workers.get(spec["rank"])
            if worker is not None and worker.killed:
                await worker.ended.wait()
            if worker is None or worker.ended.is_set():
                worker = await self._fork(spec["rank"])
            worker.incarnation = self._incarnation = spec["incarnation"]
            if self._epoch is not None:
                _send(worker, {"op": "clock", "epoch": self._epoch})
            _send(worker, {"op": "start", "spec": spec})

    def stop(self) -> None:
        """Ask every worker for a checkpoint after its step, and an end."""
        for worker in self._workers.values():
            _send(worker, {"op": "stop"})

    def follow_clock(self, epoch: float) -> None:
        """For the workers that there are, and those to come."""
        self._epoch = epoch
        for worker in self._workers.values():
            _send(worker, {"op": "clock", "epoch": epoch})

    def kill(self, ranks: Collection[int]) -> None:
        """SIGKILL the workers of some ranks; their exits come as events."""
        for rank in ranks:
            worker = self._workers.get(rank)
            if worker is None:
                self._tell_exit(rank, self._incarnation, code=None, why="was gone already")
            else:
                worker.killed = True
                kill(worker.pid)

    def abandon(self, why: str) -> None:
        """SIGKILL all workers, for a reason that their exits tell."""
        for worker in self._workers.values():
            worker.why = worker.why or why
            if worker.pid is None:
                worker.writer.close()
            kill(worker.pid)

    async def end(self, *, at_once: bool) -> None:
        """End all workers, without events: by request, or `at_once` with SIGKILL."""
        await self._end(list(self._workers.values()), at_once=at_once)

    def close(self) -> None:
        """End the zygote."""
        if self._zygote is not None:
            self._zygote.end()

    # What is known of them.

    def pids(self) -> dict[int, int]:
        """By rank, of those that have been forked and have not ended."""
        return {rank: worker.pid for rank, worker in self._workers.items() if worker.pid is not None}

    def last_calls(self) -> dict[int, dict[str, Any]]:
        """The last collective calls of the ranks, of those too whose worker is dead."""
        logs = {rank: calls.read(fd) for rank, fd in self._calls.items()}
        return {rank: log.to_json() for rank, log in logs.items() if log is not None}

    # A worker's life.

    async def _fork(self, rank: int) -> Worker:
        ours, theirs = socket.socketpair()
        if rank in self._calls:
            os.close(self._calls[rank])
        self._calls[rank] = calls.make_memory()
        # Before all orders: the memory in which the worker keeps its collective calls. It outlives the worker here.
        socket.send_fds(ours, [b"\n"], [self._calls[rank]])
        reader, writer = await asyncio.open_connection(sock=ours, limit=LINE_BYTES)
        worker = Worker(rank, writer)
        self._workers[rank] = worker
        log = self._logs / f"rank-{rank:05d}.log"
        self.warm_up().send({"op": "fork", "rank": rank, "log": str(log)}, theirs)
        theirs.close()
        worker.listener = self._spawn(self._listen(worker, reader))
        return worker

    async def _listen(self, worker: Worker, reader: asyncio.StreamReader) -> None:
        """Pass on what a worker says."""
        with suppress(ConnectionError):
            async for line in reader:
                if self._workers.get(worker.rank) is worker:
                    self._tell({"type": "said", "rank": worker.rank, "message": json.loads(line)})

    async def _end(self, workers: list[Worker], *, at_once: bool) -> None:
        for worker in workers:
            self._workers.pop(worker.rank, None)
            if at_once:
                kill(worker.pid)
            else:
                _send(worker, {"op": "exit"})
        for worker in workers:
            if worker.pid is None:
                # Its fork is still on the way; the closed socket ends it.
                worker.writer.close()
                continue
            try:
                await asyncio.wait_for(worker.ended.wait(), EXIT_SECONDS)
            except TimeoutError:
                kill(worker.pid)
                await worker.ended.wait()

    async def _on_exit(self, worker: Worker) -> None:
        """The kernel says that a worker is gone: hear its last words and its exit code, then report it."""
        waiting = [future for future in (worker.listener, worker.exit_code) if future is not None]
        await asyncio.wait(waiting, timeout=LAST_WORDS_SECONDS)
        code = worker.exit_code.result() if worker.exit_code.done() else None
        worker.ended.set()
        worker.writer.close()
        if self._workers.get(worker.rank) is worker:
            del self._workers[worker.rank]
            self._tell_exit(worker.rank, worker.incarnation, code=code, why=worker.why)

    def _tell_exit(self, rank: int, incarnation: int, *, code: int | None, why: str | None) -> None:
        self._tell({"type": "exited", "rank": rank, "incarnation": incarnation, "code": code, "why": why})

    # What the zygote says.

    def _on_zygote(self, message: dict[str, Any]) -> None:
        if message["op"] == "ready":
            self._tell({"type": "zygote", "seconds": message["seconds"]})
        elif message["op"] == "forked":
            worker = self._workers.get(message["rank"])
            if worker is not None and worker.pid is None:
                worker.pid = message["pid"]
                self._forked[worker.pid] = worker
                self._tell({"type": "forked", "rank": worker.rank, "pid": worker.pid})
                when_ended(worker.pid, lambda: self._spawn(self._on_exit(worker)))
        elif message["op"] == "exited":
            ended = self._forked.pop(message["pid"], None)
            if ended is not None:
                ended.exit_code.set_result(message["code"])

    def _on_zygote_end(self) -> None:
        """The zygote died. Workers live on; those it had still to fork never come."""
        self._zygote = None
        if self._over.is_set():
            return
        log = self._logs / f"zygote-{self._orders.node}.log"
        self._tell({"type": "zygote_ended", "message": read_text(log)[-4000:]})
        for worker in list(self._workers.values()):
            if worker.pid is None:
                self._spawn(self._on_exit(worker))


def _send(worker: Worker, message: dict[str, Any]) -> None:
    if not worker.writer.is_closing():
        worker.writer.write(json.dumps(message).encode() + b"\n")
