"""Two hosts with limited links on one machine, and gloo ranks on them; used by `benchmarks.moe`, which see.

    python -m benchmarks.moe_hosts FOLDER RANK RANKS

is one rank: it calls the function that is pickled in the folder and leaves there what it returns.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.launch.hosts import Hosts

STOPS = {signal.SIGINT, signal.SIGTERM}
INTERFACE = "eth0"
"""What the link of a host is called there."""


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Hosts 1 and 2. They are made and removed whole, whatever signal comes."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        with Hosts() as hosts:
            for _ in range(2):
                hosts.add()
            try:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
                yield hosts
            finally:
                signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


def limit(hosts: Hosts, megabits: float) -> None:
    """Each host sends at so many Mbit/s."""
    for host in (1, 2):
        hosts.limit(host, megabits)


def run_ranks(hosts: Hosts, function: Callable[..., Any], *args: Any, ranks: int = 2) -> list[Any]:
    """Call `function(rank, *args)` on ranks spread over both hosts, neighbours on one; what they return, in rank order."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "call").write_bytes(pickle.dumps((function, args)))
        environment = os.environ | {"GLOO_SOCKET_IFNAME": INTERFACE}
        processes = []
        for rank in range(ranks):
            words = [sys.executable, "-m", "benchmarks.moe_hosts", name, str(rank), str(ranks)]
            place = {"cwd": Path(__file__).parents[1], "env": environment, "stdout": subprocess.DEVNULL}
            processes.append(subprocess.Popen([*hosts.prefix(1 + rank * 2 // ranks), *words], **place))
        try:
            _wait(processes)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        return [pickle.loads((folder / f"result{rank}").read_bytes()) for rank in range(ranks)]


def _wait(processes: list[subprocess.Popen[bytes]]) -> None:
    """Until all ranks have ended. The first that fails ends the benchmark: the others would wait for it."""
    while any(process.poll() is None for process in processes):
        time.sleep(0.05)
        if any(process.returncode for process in processes):
            break
    if any(process.returncode for process in processes):
        raise SystemExit("a rank has failed, see above")


def _rank(folder: Path, rank: int, ranks: int) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=ranks)
    function, args = pickle.loads((folder / "call").read_bytes())
    (folder / f"result{rank}").write_bytes(pickle.dumps(function(rank, *args)))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _rank(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
