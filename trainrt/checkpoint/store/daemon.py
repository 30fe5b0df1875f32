"""The store's process: one per node, child of nobody, ends by itself when its lease runs out."""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import shutil
import signal
import sys
from contextlib import suppress
from functools import partial
from typing import Any

from trainrt.checkpoint.store.protocol import LARGE_BYTES, pack, read_request, send_all
from trainrt.checkpoint.store.store import Store
from trainrt.run_dir import write_json


async def serve(store: Store, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One connection: requests in turn. One without the run's token is closed."""
    # Drained is sent: what a thread sends then comes behind it, through a descriptor that nobody else closes.
    writer.transport.set_write_buffer_limits(0)
    fd = os.dup(writer.get_extra_info("socket").fileno())
    try:
        with suppress(ConnectionError, ValueError):
            while (message := await read_request(reader)) is not None:
                if not hmac.compare_digest(str(message.get("token", "")), store.token):
                    break
                header, payload = await store.answer(message)
                if not message.get("one_way"):
                    await _send(store, writer, fd, header, memoryview(payload))
    finally:
        os.close(fd)
        writer.close()


async def _send(
    store: Store, writer: asyncio.StreamWriter, fd: int, header: dict[str, Any], payload: memoryview
) -> None:
    writer.write(pack(header, len(payload)))
    if len(payload) < LARGE_BYTES:
        writer.write(payload)
    await writer.drain()
    if len(payload) >= LARGE_BYTES:
        await asyncio.get_running_loop().run_in_executor(store.sending, send_all, fd, payload)


async def run(options: dict[str, Any]) -> None:
    """Listen until shutdown, a signal, or the end of the lease; leave nothing in shared memory."""
    store = Store(
        run_id=options["run_id"], node=options["node"], token=options["token"], grace_seconds=options["grace_seconds"]
    )
    store.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = store.folder / "store.sock"
    path.unlink(missing_ok=True)
    unix = await asyncio.start_unix_server(partial(serve, store), str(path))
    tcp = await asyncio.start_server(partial(serve, store), options["host"], 0)
    port = tcp.sockets[0].getsockname()[1]
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, store.done.set)
    write_json(store.folder / "store.json", {"pid": os.getpid(), "address": f"{options['host']}:{port}"})
    rot = asyncio.create_task(store.watch_rot())
    await store.watch_lease()
    rot.cancel()
    unix.close()
    tcp.close()
    shutil.rmtree(store.folder, ignore_errors=True)
    if store.spill is not None:
        shutil.rmtree(store.spill, ignore_errors=True)
    with suppress(OSError):
        store.folder.parent.rmdir()


def main() -> None:
    """Read options from stdin, leave the parent's session, and serve."""
    options = json.loads(sys.stdin.readline())
    if os.fork():
        os._exit(0)
    os.setsid()
    log = os.open(options["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    null = os.open(os.devnull, os.O_RDONLY)
    for fd, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(fd, target)
    asyncio.run(run(options))
    os._exit(0)


if __name__ == "__main__":
    main()
