"""What one node can do, measured on it in a fraction of a second: the self-checks of a host (MegaScale, section 4.3).

`python -m trainrt.diagnostics.selfcheck --folder DIR` prints one JSON object, measured value by name. It is a process of its
own so that a device or a disk that hangs holds up nobody, and one without torch where no GPU is asked for: it has begun in a
tenth of a second. Rates are the best of many short repetitions: what the hardware can do, whoever else uses it meanwhile.
What a value is worth is judged elsewhere (`outliers.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

SHORT = ("compute", "memory", "shared_memory", "disk")
"""What is measured before a start and after an incident."""
FULL = (*SHORT, "loopback")
SHARED = Path("/dev/shm")
LONGEST_SECONDS = 20
"""A process that measures ends itself after so long; what loads torch and a GPU takes some of it."""
MIB = 1 << 20
ONE_THREAD = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
PRODUCT = 384
"""Rows of the matrices that are multiplied: a product takes 1 to 3 ms, and so falls between two interruptions now and then."""


@dataclass(frozen=True, slots=True)
class Check:
    """How a measured value is judged.

    unit: its unit. ratio: below this share of the peers' median it is an outlier; None: not compared. gross: the same where
    there are too few peers for a median; None: not compared then. least, most: absolute bounds. evicts: whether a node that
    fails it gets no ranks.
    """

    unit: str
    ratio: float | None = 0.7
    gross: float | None = 0.4
    least: float = 0.0
    most: float = inf
    evicts: bool = False


CHECKS = {
    "compute": Check("GFLOP/s", least=0.1, evicts=True),
    "device_compute": Check("GFLOP/s", least=1.0, evicts=True),
    "memory": Check("GB/s", least=0.1, evicts=True),
    "device_memory": Check("GB/s", least=1.0, evicts=True),
    "shared_memory": Check("GB/s", ratio=0.4, gross=0.2, least=0.05, evicts=True),
    "shared_memory_free": Check("bytes", ratio=None, gross=None, least=16 * MIB, evicts=True),
    # The time of one fsync varies by more than the disks do; only one that cannot be written to costs a node its ranks.
    "disk": Check("MB/s", ratio=0.2, gross=0.05, least=0.1, evicts=True),
    # One connection is a matter of two free cores, so only gross differences count.
    "loopback": Check("GB/s", ratio=0.2, gross=0.1, least=0.01),
    "clock_offset": Check("s", ratio=None, gross=None, least=-1.0, most=1.0),
    "network_send": Check("GB/s", gross=None, least=1e-4),
    "network_receive": Check("GB/s", gross=None, least=1e-4),
    "link": Check("GB/s", least=1e-4),
    # Inside a host these are a matter of cores, which others use too.
    "host_link": Check("GB/s", ratio=0.4, gross=0.2, least=1e-4),
    "all_to_all": Check("GB/s", ratio=0.4, gross=0.2, least=1e-4),
    "all_reduce": Check("GB/s", ratio=0.5, gross=None, least=1e-4),
}
"""By the name of a check, or what comes before the ":" of one of several devices. See docs/doctor.md."""


def check_of(name: str) -> Check:
    """How a check of this name is judged; `device_compute:3` is device 3's."""
    return CHECKS[name.partition(":")[0]]


# Measuring.


def best_rate(work: Callable[[], object], amount: float, *, seconds: float) -> float:
    """`amount` a second, of the fastest repetition within so many seconds (at least one), after one that warms up."""
    work()
    best, end = 0.0, time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        work()
        now = time.perf_counter()
        best = max(best, amount / max(now - start, 1e-9))
        if now >= end:
            return best


def compute_gflops(*, seconds: float = 0.08) -> float:
    """GFLOP/s of float32 products of matrices, on as many threads as the BLAS library has here (one, in `main`)."""
    import numpy as np

    a = np.ones((PRODUCT, PRODUCT), np.float32)
    out = np.empty_like(a)
    return best_rate(lambda: np.matmul(a, a, out=out), 2 * PRODUCT**3 / 1e9, seconds=seconds)


def memory_gb_per_second(*, seconds: float = 0.06, size: int = 32 * MIB) -> float:
    """GB/s of a copy in main memory on one thread, bytes read and written counted."""
    import numpy as np

    source, target = np.ones(size, np.uint8), np.empty(size, np.uint8)
    return best_rate(lambda: np.copyto(target, source), 2 * size / 1e9, seconds=seconds)


def loopback_gb_per_second(*, seconds: float = 0.1, block: int = 16 * MIB) -> float:
    """GB/s of one TCP connection of this host to itself: the best block of the time. Raises OSError."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as sender:
        receiver, _ = server.accept()
        with receiver:
            threading.Thread(target=_pour, args=(sender,), daemon=True).start()
            receiver.settimeout(2.0)
            buffer = memoryview(bytearray(MIB))
            return best_rate(lambda: _drain(receiver, buffer, block), block / 1e9, seconds=seconds)


def _pour(connection: socket.socket) -> None:
    """Send until the other end has had enough."""
    data = bytes(MIB)
    with suppress(OSError):
        while True:
            connection.sendall(data)


def _drain(connection: socket.socket, buffer: memoryview, amount: int) -> None:
    while amount > 0:
        received = connection.recv_into(buffer)
        if not received:
            raise ConnectionError("the connection ended")
        amount -= received


def disk_mb_per_second(folder: Path, *, size: int = 4 * MIB, seconds: float = 0.1) -> float:
    """MB/s of writing a file into a folder and flushing it to the disk. Raises OSError."""
    data = os.urandom(size)
    with _nameless(folder) as fd:

        def write() -> None:
            os.pwrite(fd, data, 0)
            os.fsync(fd)

        return best_rate(write, size / 1e6, seconds=seconds)


def shared_memory_gb_per_second(*, size: int = 16 * MIB, seconds: float = 0.05) -> float:
    """GB/s of writing new pages into /dev/shm, as a snapshot does. Raises OSError where there is no room for them."""
    data = bytes(size)
    with _nameless(SHARED) as fd:

        def write() -> None:
            os.ftruncate(fd, 0)
            if os.pwrite(fd, data, 0) < size:
                raise OSError("/dev/shm is full")

        return best_rate(write, size / 1e9, seconds=seconds)


def shared_memory_free() -> int:
    """Free bytes of /dev/shm."""
    return shutil.disk_usage(SHARED).free


@contextmanager
def _nameless(folder: Path) -> Iterator[int]:
    """A file that has no name, so that nothing of it is left whatever ends this process."""
    try:
        fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:
        # Network file systems have no such files.
        fd, name = tempfile.mkstemp(prefix=".selfcheck-", dir=folder)
        os.unlink(name)
    try:
        yield fd
    finally:
        os.close(fd)


def devices(*, seconds: float = 0.1) -> dict[str, float]:
    """Products and copies on every GPU of this process, one after the other. Loads torch and CUDA, which takes seconds."""
    import torch

    from trainrt.parallel.profile import product_flops

    found: dict[str, float] = {}
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        source = torch.ones(256 * MIB, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)

        def copy(source: Any = source, target: Any = target, device: Any = device) -> None:
            target.copy_(source)
            torch.cuda.synchronize(device)

        found[f"device_compute:{index}"] = product_flops(device) / 1e9
        found[f"device_memory:{index}"] = best_rate(copy, 2 * source.numel() / 1e9, seconds=seconds)
    return found


def measure(only: Sequence[str], folder: Path, *, device: str = "cpu") -> dict[str, float]:
    """The checks of these names (of FULL), by name; 0 where a file system takes nothing.

    folder: on the disk that is checked. device: with `cuda` the GPUs too. What cannot be measured is left out.
    """
    found: dict[str, float] = {}
    if "compute" in only:
        found["compute"] = compute_gflops()
    if "memory" in only:
        found["memory"] = memory_gb_per_second()
    if "shared_memory" in only:
        free = shared_memory_free()
        found["shared_memory_free"] = float(free)
        size = min(16 * MIB, free // 2)
        if size >= MIB:
            # What is free now may be taken a moment later; that is no fault of the memory.
            with suppress(OSError):
                found["shared_memory"] = shared_memory_gb_per_second(size=size)
    if "disk" in only:
        try:
            found["disk"] = disk_mb_per_second(folder)
        except OSError:
            found["disk"] = 0.0
    if "loopback" in only:
        with suppress(OSError):
            found["loopback"] = loopback_gb_per_second()
    if device == "cuda":
        found.update(devices())
    return found


# As a process.


def environment() -> dict[str, str]:
    """This process's environment and import path; one thread for products, as a rank has."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **ONE_THREAD}


def run(
    only: Sequence[str], folder: str | Path, *, device: str = "cpu", seconds: float = LONGEST_SECONDS
) -> dict[str, float]:
    """Measure in a process of its own. Empty where that failed or took longer than so many seconds."""
    words = [sys.executable, "-m", __name__, "--only", ",".join(only), "--folder", str(folder), "--device", device]
    with suppress(OSError, subprocess.SubprocessError, ValueError):
        done = subprocess.run(
            words, env=environment(), timeout=seconds, check=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        return parsed(done.stdout)
    return {}


def parsed(output: bytes) -> dict[str, float]:
    """What the process printed. Raises ValueError where that is no object of numbers."""
    document: Any = json.loads(output)
    if not isinstance(document, dict):
        raise ValueError("no object")
    return {str(name): float(value) for name, value in document.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default=",".join(FULL))
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    os.environ.update(ONE_THREAD)
    # A measurement that hangs must not outlive whoever asked for it.
    signal.alarm(LONGEST_SECONDS)
    found = measure(options.only.split(","), Path(options.folder), device=options.device)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
