"""Real process groups for tests: `run_ranks(n, function, *args)` runs a function on n gloo ranks.

Processes come from a fork server that has torch imported, so that a group of four costs a fraction of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_PRELOADED = ["torch", "torch.distributed.fsdp", "torch.distributed.tensor", "trainrt.training.engines.native"]
_CONTEXT.set_forkserver_preload(_PRELOADED)


def preload(*modules: str) -> None:
    """Have processes come with these modules too. Before the first of them."""
    _CONTEXT.set_forkserver_preload([*_PRELOADED, *modules])


def run_ranks(ranks: int, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """Call `function(rank, *args)` on every rank of a fresh group; return the results in rank order."""
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(ranks):
            receive, send = _CONTEXT.Pipe(duplex=False)
            process = _CONTEXT.Process(
                target=_main, args=(rank, ranks, f"{folder}/store", send, timeout, function, args)
            )
            process.start()
            send.close()
            pipes.append(receive)
            processes.append(process)
        try:
            results = [_receive(pipe, rank, timeout) for rank, pipe in enumerate(pipes)]
        finally:
            for process in processes:
                process.join(10)
                if process.is_alive():
                    process.kill()
                    process.join()
    failures = [text for ok, text in results if not ok]
    if failures:
        raise AssertionError("\n".join(failures))
    return [value for _, value in results]


def _receive(pipe: Connection, rank: int, timeout: float) -> tuple[bool, Any]:
    if not pipe.poll(timeout):
        return False, f"rank {rank}: no result within {timeout} s"
    try:
        return pipe.recv()
    except EOFError:
        return False, f"rank {rank}: died without a result"


def _main(
    rank: int,
    ranks: int,
    store: str,
    send: Connection,
    timeout: float,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout)
        )
        send.send((True, function(rank, *args)))
        dist.barrier()
    except BaseException:
        send.send((False, f"rank {rank}:\n{traceback.format_exc()}"))
    os._exit(0)
