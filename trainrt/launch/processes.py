"""Processes of one node, by pid: hear of an end, end one. They need not be children of whoever does."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import suppress


def when_ended(pid: int, then: Callable[[], object]) -> None:
    """Call `then` once, in the running event loop, when a process has ended: the kernel says so (a pidfd)."""
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


def kill(pid: int | None) -> None:
    if pid is not None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
