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
import socket
import struct
from typing import Any

from trainrt.errors import StoreError

LENGTHS = struct.Struct("<II")
MOST_HEADER_BYTES = 256 << 20


def pack(header: dict[str, Any], payload_bytes: int) -> bytes:
    text = json.dumps(header).encode()
    return LENGTHS.pack(len(text), payload_bytes) + text


CONNECT_SECONDS = 2.0
"""A host that lives takes a connection at once, however busy the store is; in this time a lost packet is sent again."""


class Connection:
    """A blocking connection to a store: one request at a time. `address` is a Unix path or "host:port"."""

    def __init__(self, address: str, *, token: str, run_id: str = "", timeout_seconds: float = 30.0) -> None:
        self.address, self._head = address, {"token": token, "run_id": run_id}
        self._timeout = timeout_seconds
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

    def request(self, op: str, *, wait_seconds: float = 0.0, **fields: Any) -> tuple[dict[str, Any], bytearray]:
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

    def receive(self, *, wait_seconds: float = 0.0) -> tuple[dict[str, Any], bytearray]:
        """The answer to the oldest request that has none yet."""
        try:
            self._socket.settimeout(self._timeout + wait_seconds)
            header_bytes, payload_bytes = LENGTHS.unpack(self._exactly(LENGTHS.size))
            header = json.loads(self._exactly(header_bytes))
            payload = self._exactly(payload_bytes)
        except OSError as error:
            raise StoreError(f"store {self.address}: {error.strerror or error}") from error
        if "error" in header:
            raise StoreError(f"store {self.address}: {header['error']}")
        return header, payload

    def _exactly(self, length: int) -> bytearray:
        data = bytearray(length)
        view = memoryview(data)
        while view:
            got = self._socket.recv_into(view)
            if got == 0:
                raise ConnectionResetError("the store closed the connection")
            view = view[got:]
        return data

    def close(self) -> None:
        self._socket.close()


async def read_request(reader: asyncio.StreamReader) -> dict[str, Any] | None:
    """The next request of a connection, or None at its end. Raises ValueError for what is no message."""
    try:
        header_bytes, payload_bytes = LENGTHS.unpack(await reader.readexactly(LENGTHS.size))
        if header_bytes > MOST_HEADER_BYTES or payload_bytes:
            raise ValueError("no message of ours")
        return json.loads(await reader.readexactly(header_bytes))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
