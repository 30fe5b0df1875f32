"""The doctor's hand on a node: a Ray actor that measures there, alone and together with those of other nodes."""

from __future__ import annotations

import os
import socket
import threading
import time
from contextlib import suppress
from typing import Any

from trainrt.diagnostics import selfcheck
from trainrt.diagnostics.collective_speed import Order, Ranks

STREAM_SECONDS = 0.25
"""How long a link is measured in one direction."""
LEAD_SECONDS = 0.05
"""What a connection takes until it is as fast as it gets; it is not counted."""
CONNECT_SECONDS = 3.0
BLOCK = 1 << 18


class Examiner:
    """All methods are called by `doctor`, over Ray."""

    def __init__(self) -> None:
        self._ranks: Ranks | None = None
        self._stream: Stream | None = None

    def about(self) -> dict[str, Any]:
        return {"host": socket.gethostname(), "pid": os.getpid()}

    def clock(self) -> float:
        """This host's time."""
        return time.time()

    def check(self, folder: str, device: str) -> dict[str, float]:
        """The self-checks; see `selfcheck.measure`."""
        return selfcheck.run(selfcheck.FULL, folder, device=device)

    # Links.

    def listen(self) -> int:
        """Wait, beside everything else, for a stream of another node's. Returns the port."""
        self._stream = Stream()
        return self._stream.port

    def send(self, address: str, port: int) -> None:
        """Send to a node that listens, for as long as it wants to hear."""
        data = bytes(BLOCK)
        with suppress(OSError), socket.create_connection((address, port), timeout=CONNECT_SECONDS) as connection:
            end = time.monotonic() + CONNECT_SECONDS
            while time.monotonic() < end:
                connection.sendall(data)

    def received(self) -> float:
        """Bytes a second of the stream that was listened for; 0 where none came."""
        return self._stream.result() if self._stream is not None else 0.0

    # Groups.

    def prepare_groups(self) -> bool:
        """Start the process that forks ranks, and wait until it is ready."""
        self._ranks = Ranks()
        return self._ranks.ready()

    def free_port(self) -> int:
        """A port of all addresses of this host that nobody listens at, now."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return int(probe.getsockname()[1])

    def group(self, order: Order) -> dict[str, Any]:
        """Be a node of a group; see `Ranks.order`."""
        return {"error": "not ready"} if self._ranks is None else self._ranks.order(order)

    def close(self) -> None:
        if self._ranks is not None:
            self._ranks.close()


class Stream:
    """The receiving end of one link: counts what comes in a while, in a thread."""

    def __init__(self) -> None:
        self._server = socket.create_server(("", 0))
        self._server.settimeout(CONNECT_SECONDS)
        self.port: int = self._server.getsockname()[1]
        self._rate = 0.0
        self._thread = threading.Thread(target=self._run, name="stream", daemon=True)
        self._thread.start()

    def result(self) -> float:
        self._thread.join(2 * CONNECT_SECONDS)
        return self._rate

    def _run(self) -> None:
        with suppress(OSError), self._server:
            connection, _ = self._server.accept()
            with connection:
                connection.settimeout(CONNECT_SECONDS)
                self._count(connection)

    def _count(self, connection: socket.socket) -> None:
        buffer = bytearray(BLOCK)
        begin = time.perf_counter() + LEAD_SECONDS
        while time.perf_counter() < begin:
            if not connection.recv_into(buffer):
                return
        start, received = time.perf_counter(), 0
        while (now := time.perf_counter()) - start < STREAM_SECONDS:
            received += connection.recv_into(buffer)
        self._rate = received / (now - start)
