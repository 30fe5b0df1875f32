"""Work in several forked processes: they end with their parent, and the first error of one ends all."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

from trainrt.errors import TrainrtError

PR_SET_PDEATHSIG = 1
POLL_SECONDS = 0.1


def run_jobs(jobs: Sequence[Callable[[], None]], *, poll: Callable[[], None]) -> None:
    """Run all to their end; `poll` is called now and then. Raises the first error with a message that one of them had."""
    context = multiprocessing.get_context("fork")
    errors: Any = context.SimpleQueue()
    processes = [context.Process(target=_run, args=(job, errors, os.getpid())) for job in jobs]
    for process in processes:
        process.start()
    try:
        while any(process.is_alive() for process in processes) and errors.empty():
            time.sleep(POLL_SECONDS)
            poll()
    finally:
        if not errors.empty() or any(process.exitcode not in (0, None) for process in processes):
            for process in processes:
                process.terminate()
        for process in processes:
            process.join()
    if not errors.empty():
        raise errors.get()
    for process in processes:
        if process.exitcode:
            code = process.exitcode
            raise TrainrtError(f"a job ended by {signal.Signals(-code).name if code < 0 else f'exit code {code}'}")


def _run(job: Callable[[], None], errors: Any, parent: int) -> None:
    # Linux: whatever ends the parent ends this process too.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    try:
        job()
    except TrainrtError as error:
        errors.put(error)
    except Exception as error:
        # What it is called is all that a pickle of it is sure to bring across.
        errors.put(TrainrtError(f"{type(error).__name__}: {error}"))
