"""The agent: one detached Ray actor per node. It starts and watches the node's workers and its store.

It hears of a worker's end from the kernel (a pidfd), not from the worker, so that an interpreter that
is stuck cannot blind it. What happens is kept as numbered events until the driver has fetched them:
a driver's poll is its heartbeat. Without one for `DRIVER_SILENCE_SECONDS` the workers are ended and
the agent waits, with its store, `grace_seconds` for another driver.

It decides nothing: who runs where, and what a fault means, is the driver's.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainrt.errors import StoreError
from trainrt.launch import stacks
from trainrt.launch.links import LinkReports
from trainrt.parallel import calls
from trainrt.run_dir import RunDir

DRIVER_SILENCE_SECONDS = 3.0
POLL_SECONDS = 1.0
WATCH_SECONDS = 0.25
RENEW_SECONDS = 1.0
EXIT_SECONDS = 5.0
"""How long a worker that was told to exit may take before it is killed."""
LAST_WORDS_SECONDS = 0.1
STORE_BYTES = 1 << 20
"""With less shared memory a store cannot even say why it does not start."""
LINE_BYTES = 1 << 24

Event = dict[str, Any]


@dataclass(frozen=True, slots=True)
class AgentOrders:
    """What an agent needs to know of the run. `entry` ("module:function") is what a worker runs."""

    run_dir: str
    run_id: str
    node: str
    secret: str
    grace_seconds: float
    entry: str
    preload: tuple[str, ...]
    host: str


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


class Agent:
    """All methods are called by the driver, over Ray."""

    def __init__(self, orders: AgentOrders) -> None:
        self._orders = orders
        self._run_dir = Path(orders.run_dir)
        self._events: list[Event] = []
        self._sequence = 0
        self._incarnation = 0
        self._news = asyncio.Event()
        self._workers: dict[int, Worker] = {}
        self._forked: dict[int, Worker] = {}
        self._calls: dict[int, int] = {}
        self._zygote: ZygoteHandle | None = None
        self._store: Any = None
        self._stopped: set[int] = set()
        self._last_poll = time.monotonic()
        self._tasks: set[asyncio.Task[None]] = set()
        self._ending = False
        self._epoch: float | None = None

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
        if self._zygote is None:
            self._zygote = ZygoteHandle(self._orders, on_message=self._on_zygote, on_end=self._on_zygote_end)
        if self._store is None:
            try:
                await self._start_store()
            except StoreError as error:
                # Whether a node without one gets ranks is the driver's to say.
                self._tell({"type": "store_failed", "message": str(error)})
        return {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "proof": read_text(self._run_dir / ".cluster" / "proof"),
            "python": sys.version.split()[0],
            "sequence": sequence,
            "store": self._store_record(),
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
                self._send(worker, {"op": "clock", "epoch": self._epoch})
            self._send(worker, {"op": "start", "spec": spec})

    async def stop(self) -> None:
        """Ask every worker for a checkpoint after its step, and an end."""
        for worker in self._workers.values():
            self._send(worker, {"op": "stop"})

    async def kill(self, ranks: list[int]) -> None:
        """SIGKILL the workers of some ranks; their exits come as events."""
        for rank in ranks:
            worker = self._workers.get(rank)
            if worker is None:
                self._tell_exit(rank, self._incarnation, code=None, why="was gone already")
            else:
                worker.killed = True
                kill(worker.pid)

    async def monotonic(self) -> float:
        """This host's clock that nobody sets."""
        return time.monotonic()

    async def follow_clock(self, epoch: float) -> None:
        """The driver's time of day when that clock was zero: what ranks tell of their steps is on it."""
        self._epoch = epoch
        for worker in self._workers.values():
            self._send(worker, {"op": "clock", "epoch": epoch})

    async def take_stacks(self, number: int) -> None:
        """Look at the stacks of this node's workers, from outside; they come as an event with the request's number, and with
        the workers' last collective calls.
        """
        dumps = RunDir(self._run_dir)
        pids = {rank: worker.pid for rank, worker in self._workers.items() if worker.pid is not None}
        taken = await asyncio.gather(
            *(asyncio.to_thread(stacks.take, pid, dumps.stack_dump(rank)) for rank, pid in pids.items())
        )
        found = {rank: stack.to_json() for rank, stack in zip(pids, taken, strict=True)}
        self._tell({"type": "stacks", "number": number, "ranks": found, "calls": await self.last_calls()})

    async def last_calls(self) -> dict[int, dict[str, Any]]:
        """The last collective calls of this node's ranks, of those too whose worker is dead."""
        logs = {rank: calls.read(fd) for rank, fd in self._calls.items()}
        return {rank: log.to_json() for rank, log in logs.items() if log is not None}

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
        if self._store is not None:
            kill(self._store.pid)

    async def end_workers(self, *, at_once: bool) -> None:
        """End all workers, without events: by request, or `at_once` with SIGKILL."""
        await self._end(list(self._workers.values()), at_once=at_once)

    async def shutdown(self) -> None:
        """End everything this node runs for the job, the store and its memory too."""
        self._ending = True
        self._sign_of_life().unlink(missing_ok=True)
        await self.end_workers(at_once=True)
        if self._zygote is not None:
            self._zygote.end()
        if self._store is not None:
            with suppress(StoreError, OSError):
                await asyncio.to_thread(self._store.shutdown)

    def processes(self) -> list[dict[str, Any]]:
        """This node's lines of cluster.json."""
        node = self._orders.node
        found: list[dict[str, Any]] = [{"role": "agent", "pid": os.getpid(), "node": node, "rank": None}]
        if self._store is not None:
            found.append({"role": "store", "pid": self._store.pid, "node": node, "rank": None})
        for rank, worker in sorted(self._workers.items()):
            if worker.pid is not None and not worker.ended.is_set():
                found.append({"role": "worker", "pid": worker.pid, "node": node, "rank": rank})
        return found

    # Workers.

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
        log = self._run_dir / "logs" / f"rank-{rank:05d}.log"
        if self._zygote is None:
            self._zygote = ZygoteHandle(self._orders, on_message=self._on_zygote, on_end=self._on_zygote_end)
        self._zygote.send({"op": "fork", "rank": rank, "log": str(log)}, theirs)
        theirs.close()
        worker.listener = self._spawn(self._listen(worker, reader))
        return worker

    async def _listen(self, worker: Worker, reader: asyncio.StreamReader) -> None:
        """Pass on what a worker says."""
        with suppress(ConnectionError):
            async for line in reader:
                if self._workers.get(worker.rank) is worker:
                    self._tell({"type": "said", "rank": worker.rank, "message": json.loads(line)})

    def _send(self, worker: Worker, message: dict[str, Any]) -> None:
        if not worker.writer.is_closing():
            worker.writer.write(json.dumps(message).encode() + b"\n")

    async def _end(self, workers: list[Worker], *, at_once: bool) -> None:
        for worker in workers:
            self._workers.pop(worker.rank, None)
            if at_once:
                kill(worker.pid)
            else:
                self._send(worker, {"op": "exit"})
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

    # The zygote.

    def _on_zygote(self, message: dict[str, Any]) -> None:
        if message["op"] == "ready":
            self._tell({"type": "zygote", "seconds": message["seconds"]})
        elif message["op"] == "forked":
            worker = self._workers.get(message["rank"])
            if worker is not None and worker.pid is None:
                worker.pid = message["pid"]
                self._forked[worker.pid] = worker
                self._tell({"type": "forked", "rank": worker.rank, "pid": worker.pid})
                self._watch_pid(worker.pid, lambda: self._spawn(self._on_exit(worker)))
        elif message["op"] == "exited":
            ended = self._forked.pop(message["pid"], None)
            if ended is not None:
                ended.exit_code.set_result(message["code"])

    def _on_zygote_end(self) -> None:
        """The zygote died. Workers live on; those it had still to fork never come."""
        self._zygote = None
        if self._ending:
            return
        log = self._run_dir / "logs" / f"zygote-{self._orders.node}.log"
        self._tell({"type": "zygote_ended", "message": read_text(log)[-4000:]})
        for worker in list(self._workers.values()):
            if worker.pid is None:
                self._spawn(self._on_exit(worker))

    # The store.

    async def _start_store(self) -> None:
        from trainrt.checkpoint.store import admin
        from trainrt.checkpoint.store.slots import memory_bytes

        orders = self._orders
        if memory_bytes(orders.run_id) < STORE_BYTES:
            raise StoreError(f"{orders.node}: /dev/shm is full")
        address = await asyncio.to_thread(
            admin.spawn, orders.run_id, orders.node,
            grace_seconds=orders.grace_seconds, token=orders.secret, host=orders.host,
        )  # fmt: skip
        self._store = StoreHandle(address, admin.StoreAdmin(address.address, orders.secret))
        self._watch_pid(address.pid, lambda: self._spawn(self._on_store_end()))

    async def _on_store_end(self) -> None:
        if self._ending:
            return
        self._store = None
        self._tell({"type": "store_ended"})
        try:
            await self._start_store()
        except (StoreError, OSError) as error:
            self._tell({"type": "store_failed", "message": str(error)})
            return
        self._tell({"type": "store_started", "store": self._store_record()})

    def _store_record(self) -> dict[str, str] | None:
        return None if self._store is None else self._store.record()

    # Watching.

    def _watch_pid(self, pid: int, then: Callable[[], object]) -> None:
        """Call `then` once, when a process has ended (it need not be a child)."""
        loop = asyncio.get_running_loop()
        try:
            watch = os.pidfd_open(pid)
        except ProcessLookupError:
            loop.call_soon(then)
            return

        def over() -> None:
            loop.remove_reader(watch)
            os.close(watch)
            then()

        loop.add_reader(watch, over)

    def _abandon_workers(self, silence: float) -> None:
        """SIGKILL the workers; a driver that does come back hears of their ends."""
        for worker in self._workers.values():
            worker.why = worker.why or f"was ended: its agent heard nothing of the driver for {silence:.1f} s"
            if worker.pid is None:
                worker.writer.close()
            kill(worker.pid)

    def _look_for_stopped(self) -> None:
        """Tell of processes that the kernel calls stopped, for as long as they are, and once when they go on."""
        watched: list[tuple[int | None, int | None]] = [(worker.pid, worker.rank) for worker in self._workers.values()]
        if self._store is not None:
            watched.append((self._store.pid, None))
        for pid, rank in watched:
            if pid is None:
                continue
            stopped = stacks.kernel_state(pid) == stacks.STOPPED
            if stopped or pid in self._stopped:
                self._tell({"type": "stopped", "rank": rank, "stopped": stopped})
            (self._stopped.add if stopped else self._stopped.discard)(pid)

    async def _watch(self) -> None:
        """The driver's heartbeat: end the workers without one, and everything after the grace time."""
        while not self._ending:
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
                self._abandon_workers(silence)
            stop_asked = silence > DRIVER_SILENCE_SECONDS and (self._run_dir / "stop").exists()
            if silence > self._orders.grace_seconds or stop_asked:
                await self.shutdown()
                leave()

    async def _renew(self) -> None:
        """Keep the store's lease for as long as there is a driver, and pass on what it measured."""
        reports = LinkReports()
        while not self._ending:
            await asyncio.sleep(RENEW_SECONDS)
            if self._store is not None and time.monotonic() - self._last_poll < DRIVER_SILENCE_SECONDS:
                with suppress(StoreError, OSError):
                    for link in reports.since(await asyncio.to_thread(self._store.renew)):
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


class StoreHandle:
    """The node's store: its address, and a line to it for the lease."""

    def __init__(self, address: Any, admin: Any) -> None:
        self.pid: int = address.pid
        self._address, self._admin = address, admin

    def record(self) -> dict[str, str]:
        return {"socket": str(self._address.socket), "address": self._address.address}

    def renew(self) -> dict[str, list[float]]:
        return self._admin.renew()

    def shutdown(self) -> None:
        self._admin.shutdown()


class ZygoteHandle:
    """The agent's zygote process. Forks asked for before it is ready wait in its socket."""

    def __init__(
        self, orders: AgentOrders, *, on_message: Callable[[dict[str, Any]], None], on_end: Callable[[], None]
    ) -> None:
        import subprocess

        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._on_message, self._on_end = on_message, on_end
        log = Path(orders.run_dir) / "logs" / f"zygote-{orders.node}.log"
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", "trainrt.launch.zygote", "--control", str(theirs.fileno()),
                    "--entry", orders.entry, "--preload", ",".join(orders.preload),
                ],
                pass_fds=[theirs.fileno()], env=zygote_environment(), start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip
        theirs.close()
        self._control.setblocking(False)
        asyncio.get_running_loop().add_reader(self._control, self._read)

    def send(self, message: dict[str, Any], connection: socket.socket) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):
            socket.send_fds(self._control, [json.dumps(message).encode()], [connection.fileno()])

    def end(self) -> None:
        """Close the control socket: the zygote ends its workers and itself."""
        if self._control.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._control)
            self._control.close()
        try:
            self.process.wait(timeout=1)
        except Exception:
            self.process.kill()
            self.process.wait()

    def _read(self) -> None:
        try:
            data = self._control.recv(65536)
        except BlockingIOError:
            return
        except ConnectionError:
            data = b""
        if data:
            self._on_message(json.loads(data))
            return
        self.end()
        self._on_end()


def zygote_environment() -> dict[str, str]:
    """The agent's environment with its import path, and no library threads before the forks."""
    path = os.pathsep.join(dict.fromkeys(filter(None, [os.getcwd(), *sys.path])))
    single = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", **single}


def kill(pid: int | None) -> None:
    if pid is not None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def read_text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


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
