"""The embedded cluster's nodes: one guard process per simulated node, with a lease.

`python -m trainrt.launch.guard ORDERS.json` imports Ray's command line once and forks a guard for
each node. A guard is the subreaper of everything that its `ray start` leaves behind. It ends all of
it, and removes the node's files, when the lease runs out or is taken away; when the raylet dies it ends what
the raylet ran (a machine that lost Ray), but not, on the first node, the head's own processes, which
the other nodes need. Snapshot stores are left alone: they are no children of Ray's and have a lease
of their own.

This is not the place where jobs are looked after: a guard knows processes and files, no ranks.
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import select
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PERIOD_SECONDS = 0.1
ORPHANED_SECONDS = 5.0
"""A lease this old has no driver: a request to stop is then the guard's to carry out."""
HEAD_WAIT_SECONDS = 60.0
NODE_ID_BYTES = 28
PR_SET_CHILD_SUBREAPER = 36
STORE_MODULE = "trainrt.checkpoint.store.daemon"


@dataclass(frozen=True, slots=True)
class NodeOrders:
    """A node to start: its name, the arguments of `ray start`, its scratch directory, extra environment."""

    name: str
    arguments: list[str]
    scratch: str
    environment: dict[str, str]


@dataclass(frozen=True, slots=True)
class Orders:
    """What one embedded cluster needs. `lease` is renewed by the driver (its modification time)."""

    nodes: list[NodeOrders]
    scratch: str
    directory: str
    logs: str
    lease: str
    stop_request: str
    grace_seconds: float
    port: int

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> Orders:
        document = json.loads(path.read_text())
        return cls(**{**document, "nodes": [NodeOrders(**node) for node in document["nodes"]]})


def main(orders_path: str) -> int:
    """Fork the guards and wait for their ends; then remove the cluster's scratch directory."""
    orders = Orders.load(Path(orders_path))
    from ray.scripts import scripts

    # Nobody uses Ray's client server here; without its dependencies `ray start` leaves it out.
    scripts.get_ray_client_dependency_error = lambda: ImportError("not wanted")
    if not os.path.exists(orders.lease):
        # The driver has given up in the meantime.
        shutil.rmtree(orders.scratch, ignore_errors=True)
        return 0
    guards = [_fork(lambda node=node: Guard(orders, node).run(scripts.cli)) for node in orders.nodes]  # type: ignore[misc]
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for guard in guards:
        os.waitpid(guard, 0)
    shutil.rmtree(orders.scratch, ignore_errors=True)
    return 0


def _fork(body: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        body()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


class Lease:
    """How long ago a file was touched, by this process's own clock: it may be set by an hour while a job runs."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._touched: int | None = None
        self._at = 0.0

    def age(self) -> float:
        """Seconds since the last touch, or since the first look. Raises OSError where the file is gone."""
        touched = os.stat(self._path).st_mtime_ns
        if touched != self._touched:
            self._touched, self._at = touched, time.monotonic()
        return time.monotonic() - self._at


class Guard:
    """One simulated node. `run` returns when nothing of it is left."""

    def __init__(self, orders: Orders, node: NodeOrders) -> None:
        self.orders, self.node = orders, node
        self._lease = Lease(orders.lease)
        self.record = Path(orders.directory) / f"{node.name}.json"
        self.head = node is orders.nodes[0]

    def run(self, cli: Any) -> None:
        os.setsid()
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        starter = _fork(lambda: self._start_ray(cli))
        raylet: int | None = None
        watch: int | None = None
        failed = False
        try:
            while not self._over():
                codes = reap()
                if codes.get(starter, 0) != 0:
                    failed = True
                    self._write(raylet, failed=True)
                    return
                if raylet is None:
                    raylet = self._find_raylet()
                    watch = None if raylet is None else os.pidfd_open(raylet)
                if self.record.exists():
                    os.utime(self.record)
                if watch is not None and select.select([watch], [], [], PERIOD_SECONDS)[0]:
                    end_below(keep=self._kept())
                    raylet, watch = 0, None
                    self._write(raylet)
                elif watch is None:
                    time.sleep(PERIOD_SECONDS)
        finally:
            end_below(keep=is_store)
            if not failed:
                self.record.unlink(missing_ok=True)
            shutil.rmtree(self.node.scratch, ignore_errors=True)

    def _start_ray(self, cli: Any) -> None:
        """In a child: be `ray start`. Its daemons outlive it and become the guard's."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        os.environ.update(self.node.environment)
        log = os.open(f"{self.orders.logs}/ray-{self.node.name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for fd in (1, 2):
            os.dup2(log, fd)
        if not self.head:
            _wait_for_port(self.orders.port)
        # Ray would draw the node's id from a generator that is the same in every fork.
        os.environ["RAY_OVERRIDE_NODE_ID_FOR_TESTING"] = secrets.token_hex(NODE_ID_BYTES)
        cli(["start", *self.node.arguments], standalone_mode=False)

    def _find_raylet(self) -> int | None:
        for pid in descendants(os.getpid()):
            if command(pid)[:1] and command(pid)[0].endswith("/raylet"):
                self._write(pid)
                return pid
        return None

    def _kept(self) -> Callable[[int], bool]:
        """What stays when the raylet is gone."""

        def keep(pid: int) -> bool:
            of_the_head = any(word.endswith(("/gcs_server", "dashboard/dashboard.py")) for word in command(pid)[:2])
            return is_store(pid) or (self.head and of_the_head)

        return keep

    def _over(self) -> bool:
        try:
            age = self._lease.age()
        except OSError:
            return True
        stop_asked = age > ORPHANED_SECONDS and os.path.exists(self.orders.stop_request)
        return stop_asked or age > self.orders.grace_seconds

    def _write(self, raylet: int | None, *, failed: bool = False) -> None:
        document = {"guard": os.getpid(), "raylet": raylet, "failed": failed}
        scratch = self.record.with_suffix(".part")
        scratch.write_text(json.dumps(document))
        os.replace(scratch, self.record)


def _wait_for_port(port: int) -> None:
    deadline = time.monotonic() + HEAD_WAIT_SECONDS
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise TimeoutError(f"no head at port {port}")


def reap() -> dict[int, int]:
    """Collect ended children: their exit codes by pid."""
    ended: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended[pid] = os.waitstatus_to_exitcode(status)


def end_below(*, keep: Callable[[int], bool] = lambda pid: False) -> None:
    """SIGKILL every descendant that is not kept, until none is left: orphans come to the subreaper."""
    while True:
        reap()
        left = [pid for pid in descendants(os.getpid()) if not keep(pid)]
        if not left:
            return
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.01)


def descendants(root: int) -> list[int]:
    """Pids of all processes below `root` that have not ended."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            parent = _parent(int(entry))
            if parent is not None:
                children.setdefault(parent, []).append(int(entry))
    found, queue = [], [root]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def _parent(pid: int) -> int | None:
    """The parent of a live process; None where it has ended (a zombie keeps its children's place, though)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, parent = text.rpartition(")")[2].split()[:2]
    return None if state in "ZX" else int(parent)


def alive(pid: int) -> bool:
    """Whether a process exists and has not ended (a zombie has)."""
    return _parent(pid) is not None


def is_store(pid: int) -> bool:
    """Whether a process is a snapshot store: those end by their own lease, and clean up after themselves."""
    return STORE_MODULE in command(pid)


def command(pid: int) -> list[str]:
    """The words of a process's command line; empty where it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return []


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
