"""Messages between trainers, stores and drivers: a length, a JSON header, and a payload of raw bytes.

    8 bytes   length of the header, length of the payload (two little-endian u32, in bytes)
    header    JSON object; requests carry "op", "token", "run_id", and "one_way" where no answer is
              wanted; answers "error" if refused
    payload   raw bytes

A request without the run's token is answered by closing the connection.
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

from trainrt.errors import StaleIncarnation, StoreError

LENGTHS = struct.Struct("<II")
MOST_HEADER_BYTES = 256 << 20


def pack(header: dict[str, Any], payload_bytes: int) -> bytes:
    text = json.dumps(header).encode()
    return LENGTHS.pack(len(text), payload_bytes) + text


CONNECT_SECONDS = 2.0
"""A host that lives takes a connection at once, however busy the store is; in this time a lost packet is sent again."""


SEND_SECONDS = 30.0
LARGE_BYTES = 1 << 16
"""From here on a payload is sent by a thread, from where it lies: the event loop would copy it, and be busy meanwhile."""


def _new(length: int) -> memoryview:
    return memoryview(bytearray(length))


class Connection:
    """A blocking connection to a store: one request at a time. `address` is a Unix path or "host:port"."""

    def __init__(self, address: str, *, token: str, run_id: str = "", timeout_seconds: float = 30.0) -> None:
        self.address, self._head = address, {"token": token, "run_id": run_id}
        self._timeout = timeout_seconds
        # Of payloads, from the header on: a store answers when it has what it was asked for.
        self.arriving_seconds = 0.0
        try:
            if address.startswith("/"):
                self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                self._socket.settimeout(timeout_seconds)
                self._socket.connect(address)
            else:
                host, _, port = address.rpartition(":")
                self._socket = socket.create_connection((host, int(port)), min(CONNECT_SECONDS, timeout_seconds))
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            raise StoreError(f"store {address}: {error.strerror or error}") from error

    def request(self, op: str, *, wait_seconds: float = 0.0, **fields: Any) -> tuple[dict[str, Any], memoryview]:
        """Ask and wait for the answer, `wait_seconds` longer than usual. Raises StoreError if the store is gone or refuses."""
        self.send(op, **fields)
        return self.receive(wait_seconds=wait_seconds)

    def send(self, op: str, **fields: Any) -> None:
        """Ask; `receive` brings the answer (none comes to a message with `one_way`). Raises StoreError if the store is gone."""
        try:
            self._socket.settimeout(self._timeout)
            self._socket.sendall(pack({"op": op, **self._head, **fields}, 0))
        except OSError as error:
            raise StoreError(f"store {self.address}: {error.strerror or error}") from error

    def receive(
        self, *, wait_seconds: float = 0.0, into: Callable[[int], memoryview] = _new
    ) -> tuple[dict[str, Any], memoryview]:
        """The answer to the oldest request that has none yet; `into` gives the memory for so many bytes of payload."""
        try:
            self._socket.settimeout(self._timeout + wait_seconds)
            header_bytes, payload_bytes = LENGTHS.unpack(self._exactly(_new(LENGTHS.size)))
            header = json.loads(bytes(self._exactly(_new(header_bytes))))
            began = time.monotonic()
            payload = self._exactly(into(payload_bytes))
            self.arriving_seconds += time.monotonic() - began
        except OSError as error:
            raise StoreError(f"store {self.address}: {error.strerror or error}") from error
        if "error" in header:
            raise (StaleIncarnation if "stale" in header else StoreError)(f"store {self.address}: {header['error']}")
        return header, payload

    def _exactly(self, whole: memoryview) -> memoryview:
        view = whole
        while view:
            got = self._socket.recv_into(view)
            if got == 0:
                raise ConnectionResetError("the store closed the connection")
            view = view[got:]
        return whole

    def close(self) -> None:
        self._socket.close()


def send_all(fd: int, data: memoryview) -> None:
    """Send to a socket that does not block, for as long as it takes. Raises ConnectionError where it takes nothing for long."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    while data:
        try:
            data = data[os.write(fd, data) :]
        except BlockingIOError:
            if not poll.poll(SEND_SECONDS * 1000):
                raise ConnectionError("the other side takes nothing") from None


async def read_request(reader: asyncio.StreamReader) -> dict[str, Any] | None:
    """The next request of a connection, or None at its end. Raises ValueError for what is no message."""
    try:
        header_bytes, payload_bytes = LENGTHS.unpack(await reader.readexactly(LENGTHS.size))
        if header_bytes > MOST_HEADER_BYTES or payload_bytes:
            raise ValueError("no message of ours")
        return json.loads(await reader.readexactly(header_bytes))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
