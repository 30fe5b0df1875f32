"""The zygote: a process with every import done, which forks workers on demand.

Imports of torch cost seconds, a fork a tenth of one. It runs one thread and joins no process group,
so that what it forks starts clean. It is the workers' parent: it collects their exit codes, and ends
them when its agent is gone.

Messages are JSON, one a packet. In: {"op": "fork", "rank", "log"} with one end of the worker's control
socket as a file descriptor. Out: {"op": "ready", "seconds"}, {"op": "forked", "rank", "pid"},
{"op": "exited", "pid", "code"} (a signal's number negative).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

PACKET_BYTES = 65536
PR_SET_NAME = 15

Entry = Callable[[socket.socket], None]
"""What a worker runs: it serves the control socket it is given until it is told to exit."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--control", type=int, required=True)
    parser.add_argument("--entry", required=True)
    parser.add_argument("--preload", default="")
    options = parser.parse_args()
    started = time.perf_counter()
    module, _, function = options.entry.partition(":")
    for name in filter(None, options.preload.split(",")):
        importlib.import_module(name)
    entry: Entry = getattr(importlib.import_module(module), function)
    gc.collect()
    gc.freeze()
    Zygote(socket.socket(fileno=options.control), entry).serve(time.perf_counter() - started)


class Zygote:
    """Forks on request and reports exits, until the agent's end of the control socket closes."""

    def __init__(self, control: socket.socket, entry: Entry) -> None:
        self._control, self._entry = control, entry
        self._selector = selectors.DefaultSelector()
        self._children: dict[int, int] = {}

    def serve(self, seconds: float) -> None:
        self._send({"op": "ready", "seconds": seconds})
        self._selector.register(self._control, selectors.EVENT_READ)
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._control:
                    if not self._order():
                        return self._end()
                else:
                    self._collect(key.fd, key.data)

    def _order(self) -> bool:
        """Carry out one order; False where the agent is gone."""
        data, fds, _, _ = socket.recv_fds(self._control, PACKET_BYTES, 1)
        if not data:
            return False
        order = json.loads(data)
        pid = os.fork()
        if pid == 0:
            self._become_worker(socket.socket(fileno=fds[0]), order)
        os.close(fds[0])
        watch = os.pidfd_open(pid)
        self._children[pid] = watch
        self._selector.register(watch, selectors.EVENT_READ, pid)
        self._send({"op": "forked", "rank": order["rank"], "pid": pid})
        return True

    def _become_worker(self, connection: socket.socket, order: dict[str, Any]) -> None:
        """In the child: leave the zygote's things behind and run the entry. Does not return."""
        code = 1
        try:
            self._selector.close()
            self._control.close()
            for watch in self._children.values():
                os.close(watch)
            redirect(order["log"])
            ctypes.CDLL(None).prctl(PR_SET_NAME, f"trainrt-rank{order['rank']}".encode(), 0, 0, 0)
            self._entry(connection)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _collect(self, watch: int, pid: int) -> None:
        _, status = os.waitpid(pid, 0)
        self._selector.unregister(watch)
        os.close(watch)
        del self._children[pid]
        self._send({"op": "exited", "pid": pid, "code": os.waitstatus_to_exitcode(status)})

    def _end(self) -> None:
        for pid in self._children:
            os.kill(pid, signal.SIGKILL)
        for pid in self._children:
            os.waitpid(pid, 0)

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._control.send(json.dumps(message).encode())
        except (BrokenPipeError, ConnectionResetError):
            self._end()
            os._exit(0)


def redirect(log: str) -> None:
    """Standard output and error of this process go to the end of a file, line by line; input is empty."""
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(nothing)
    os.close(target)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115


if __name__ == "__main__":
    main()
