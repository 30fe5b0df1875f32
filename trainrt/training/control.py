"""The worker's line to its agent: JSON lines over one socket, both ways.

A thread reads, so that orders arrive while the interpreter computes: `exit`, and the end of the
connection, take effect at once; `stop` sets a flag that the step loop shares with all ranks.
"""

from __future__ import annotations

import json
import os
import queue
import socket
import threading
import time
from typing import Any


class Control:
    """Orders in, reports out. Thread-safe."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._sending = threading.Lock()
        self._starts: queue.Queue[dict[str, Any]] = queue.Queue()
        self._incarnation = 0
        self.stop_requested = threading.Event()
        # Seconds since the epoch on the driver's clock at zero of this host's monotonic one; its own until it is told.
        self.epoch = time.time() - time.monotonic()
        threading.Thread(target=self._read, name="control", daemon=True).start()

    def _read(self) -> None:
        with self._socket.makefile("r", encoding="utf-8") as lines:
            for line in lines:
                message = json.loads(line)
                if message["op"] == "start":
                    self.stop_requested.clear()
                    self._starts.put(message["spec"])
                elif message["op"] == "stop":
                    self.stop_requested.set()
                elif message["op"] == "clock":
                    self.epoch = message["epoch"]
                elif message["op"] == "exit":
                    os._exit(0)
        # The agent is gone: nobody would hear of what this process does.
        os._exit(1)

    def next_start(self) -> dict[str, Any]:
        """Wait for the order to run an incarnation; of several only the latest counts."""
        spec = self._starts.get()
        while not self._starts.empty():
            spec = self._starts.get()
        self._incarnation = spec["incarnation"]
        return spec

    def busy(self, name: str, *, worth: float = 1.0) -> None:
        """This rank begins something that is no step: nobody should take it for a hang. `worth`: how many steps' time."""
        self.send("busy", name=name, worth=worth)

    def send(self, op: str, **fields: Any) -> None:
        """Report, as of the incarnation that runs: what is heard of an older one counts no more."""
        data = json.dumps({"op": op, "incarnation": self._incarnation, **fields}).encode() + b"\n"
        with self._sending:
            self._socket.sendall(data)
