"""Collectives over real groups, timed: all-to-all inside a node, all-reduce between neighbours (MegaScale, section 4.3).

`python -m trainrt.diagnostics.collective_speed` is a node's end of it: it imports torch once, says so on standard output, reads
an order a line on standard input, and forks the node's ranks of that group for each. A group that fails or hangs takes
its own ranks with it and nothing else. An answer is one line, {"bytes_per_second"} or {"error"}.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from trainrt.diagnostics.selfcheck import environment

READY_SECONDS = 60.0
"""How long torch may take to import: ten seconds where many nodes of one machine do it at once."""
GROUP_SECONDS = 20.0
TIMED_SECONDS = 0.2
MOST_REPETITIONS = 20
BYTES = {"cpu": 1 << 20, "cuda": 1 << 27}
"""What each rank passes in: little enough for a slow link, enough for a fast one to be busy."""
OPERATIONS = ("all_to_all", "all_reduce")


@dataclass(frozen=True, slots=True)
class Order:
    """A group to make and time, as one node of it is told: its ranks are `first_rank` and on.

    rendezvous: HOST:PORT at which rank 0 listens. way: the address of another host of the group, which the network
    interface is chosen by; empty inside a node.
    """

    operation: str
    rendezvous: str
    first_rank: int
    ranks: int
    world_size: int
    device: str
    way: str = ""


class Ranks:
    """A node's process for groups. `order` waits for the answer; `close` ends it and all ranks below it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__], env=environment(), start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def ready(self) -> bool:
        """Wait until torch is imported."""
        return self._line(READY_SECONDS) == {"ready": True}

    def order(self, order: Order) -> dict[str, Any]:
        """Make the group and time it. What came of it: bytes_per_second of each rank's input, or error."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(asdict(order)).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            return {"error": f"the process for groups is gone: {error.strerror}"}
        return self._line(GROUP_SECONDS + 5) or {"error": f"no answer within {GROUP_SECONDS:.0f} s"}

    def close(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _line(self, seconds: float) -> dict[str, Any]:
        """The next line; empty where none comes in time."""
        output = self._process.stdout
        assert output is not None
        if not select.select([output], [], [], seconds)[0]:
            return {}
        text = output.readline()
        return dict(json.loads(text)) if text else {}


# The process.


def main() -> None:
    # torch, before the forks; without a process group and without a thread.
    import torch.distributed  # noqa: F401

    _say({"ready": True})
    for line in sys.stdin:
        _say(_run(Order(**json.loads(line))))


def _say(document: dict[str, Any]) -> None:
    print(json.dumps(document), flush=True)


def _run(order: Order) -> dict[str, Any]:
    """Fork this node's ranks, and wait for the first one's answer."""
    read, write = os.pipe()
    children = [_fork(order, local, write if local == 0 else None) for local in range(order.ranks)]
    os.close(write)
    with open(read, "rb") as answers:
        told = select.select([answers], [], [], GROUP_SECONDS)[0]
        text = answers.readline() if told else b""
        # The others are as far as the first.
        for child in children:
            _end(child, patience=1.0 if text else 0.0)
    if not told:
        return {"error": f"no end within {GROUP_SECONDS:.0f} s"}
    return dict(json.loads(text)) if text else {"error": "the rank died"}


def _end(child: int, *, patience: float) -> None:
    end = time.monotonic() + patience
    while time.monotonic() < end:
        if os.waitpid(child, os.WNOHANG)[0]:
            return
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def _fork(order: Order, local: int, answers: int | None) -> int:
    pid = os.fork()
    if pid:
        return pid
    signal.alarm(int(GROUP_SECONDS) + 5)
    document: dict[str, Any]
    try:
        document = {"bytes_per_second": time_group(order, local)}
    except Exception as error:
        document = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
    if answers is not None:
        os.write(answers, json.dumps(document).encode() + b"\n")
    os._exit(0)


def time_group(order: Order, local: int) -> float:
    """As one rank of the group: bytes per second of each rank's input, at the best repetition. Raises what torch raises."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    from trainrt.parallel.mesh import backend_of, talk_over_the_way_to

    if order.operation not in OPERATIONS:
        raise ValueError(f"operation {order.operation}: allowed: {', '.join(OPERATIONS)}")
    if order.way:
        talk_over_the_way_to(order.way)
    torch.set_num_threads(1)
    device = torch.device(order.device, local) if order.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend_of(order.device), init_method=f"tcp://{order.rendezvous}", rank=order.first_rank + local,
        world_size=order.world_size, timeout=timedelta(seconds=GROUP_SECONDS),
    )  # fmt: skip
    size = BYTES[order.device] // 4 // order.world_size * order.world_size
    values, received = torch.zeros(size, device=device), torch.zeros(size, device=device)

    def once() -> None:
        if order.operation == "all_reduce":
            dist.all_reduce(values)
        else:
            dist.all_to_all_single(received, values)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    best = _best_seconds(once, device)
    # Nobody leaves while another one still reads.
    dist.barrier()
    return size * 4 / best


def _best_seconds(once: Callable[[], None], device: Any) -> float:
    """The fastest of so many repetitions as every rank has time for."""
    import torch
    import torch.distributed as dist

    once()
    start = time.perf_counter()
    once()
    longest = torch.tensor([time.perf_counter() - start], dtype=torch.float64, device=device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    best = float(longest)
    for _ in range(max(1, min(MOST_REPETITIONS, int(TIMED_SECONDS / max(best, 1e-6))))):
        start = time.perf_counter()
        once()
        best = min(best, time.perf_counter() - start)
    return best


if __name__ == "__main__":
    main()
