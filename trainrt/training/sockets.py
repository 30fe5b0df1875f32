"""Freeing peers: a rank that lost one closes its own connections, so that all ranks hear of it at once.

gloo keeps a group's sockets open for as long as anything refers to the group, and FSDP's hooks do. A rank
that waits for this one would wait until its time-out; shutting the sockets down frees it in milliseconds.
(Only connected ones: gloo aborts the process when its listening socket is touched.)
"""

from __future__ import annotations

import os
import socket

WELL_KNOWN_PORTS = 1024


def open_connections() -> set[str]:
    """Names of the connected TCP sockets of this process."""
    found = _connections()
    for connection in found.values():
        connection.close()
    return set(found)


def shut_connections(*, since: set[str], keep: str) -> int:
    """Shut down the TCP connections opened since `since`, but those to the address `keep` ("host:port")
    and to services on well-known ports, which are no ranks. Returns how many there were.
    """
    kept_port, shut = int(keep.rpartition(":")[2]), 0
    for name, connection in _connections().items():
        port = connection.getpeername()[1]
        if name not in since and port != kept_port and port >= WELL_KNOWN_PORTS:
            connection.shutdown(socket.SHUT_RDWR)
            shut += 1
        connection.close()
    return shut


def _connections() -> dict[str, socket.socket]:
    """Duplicates of the connected TCP sockets, by the kernel's name of each."""
    found: dict[str, socket.socket] = {}
    for entry in os.listdir("/proc/self/fd"):
        try:
            name = os.readlink(f"/proc/self/fd/{entry}")
            if not name.startswith("socket:"):
                continue
            connection = socket.socket(fileno=os.dup(int(entry)))
        except OSError:
            continue
        try:
            inet = connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM
            if inet and connection.getpeername():
                found[name] = connection
                continue
        except OSError:
            pass
        connection.close()
    return found
