"""What a device and its links can do: known by name, read from a file, or measured on this machine.

A profile is a JSON object with the fields of `Device`: flops (per second), memory_bytes, link_bytes_per_second and
latency_seconds.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import psutil

from trainrt.errors import ConfigError, nearest
from trainrt.parallel.cost import MEMORY_BYTES, PEAK_FLOPS, Device
from trainrt.parallel.mesh import backend_of, choose_device
from trainrt.parallel.processes import last_word, run_ranks

if TYPE_CHECKING:
    import torch

MEASURED = "measured"
SMALL, LARGE = 1 << 12, 1 << 24
"""Bytes of the sums that are timed: one for the latency, one for the bandwidth."""

FIELDS = ("flops", "memory_bytes", "link_bytes_per_second", "latency_seconds")


def device_of(name: str) -> Device:
    """The profile of a named device, of a JSON file, or of this machine ("measured"; kept). Raises ConfigError."""
    if name == MEASURED:
        return known() or _kept(measure())
    if name.endswith(".json"):
        return _read(Path(name))
    if name not in PEAK_FLOPS:
        allowed = f"{', '.join(sorted(PEAK_FLOPS))}, {MEASURED}, or a profile.json"
        raise ConfigError(f"--device {name}{nearest(name, (*PEAK_FLOPS, MEASURED))}; allowed: {allowed}")
    link, latency = (2e9, 2e-4) if name == "cpu" else (5e10, 2e-5)
    return Device(name, PEAK_FLOPS[name], MEMORY_BYTES[name], link, latency)


def known() -> Device | None:
    """This machine's profile, if it was measured before."""
    try:
        return _read(_file())
    except ConfigError:
        return None


def own_device(kind: str) -> Device:
    """The profile of the device a job runs on: as measured here, or by name; an unknown GPU is taken for an H100."""
    if kind == "cpu":
        return known() or device_of("cpu")
    import torch

    name = torch.cuda.get_device_name().lower()
    return known() or device_of(next((known for known in PEAK_FLOPS if known in name), "h100"))


def _file() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "trainrt" / "profiles" / f"{socket.gethostname()}.json"


def _kept(device: Device) -> Device:
    file = _file()
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(asdict(device)))
    partial.replace(file)
    return device


def _read(file: Path) -> Device:
    try:
        document: Any = json.loads(file.read_text())
    except OSError as error:
        raise ConfigError(f"--device {file}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"--device {file}: no JSON: {error}") from error
    numbers: dict[str, Any] = {field: document.get(field) for field in FIELDS} if isinstance(document, dict) else {}
    for field in FIELDS:
        value = numbers.get(field)  # none of them where it is no object
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise ConfigError(f"--device {file}: {field} = {value!r}; allowed: a number above 0")
    return Device(name=str(document.get("name", file.stem)), **numbers)


def measure() -> Device:
    """Time products of matrices on one thread, as a rank has, and sums over two ranks of this machine. Takes seconds."""
    import torch

    kind = choose_device("auto")
    link = _links() if kind == "cpu" or torch.cuda.device_count() > 1 else device_of("h100")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        flops = product_flops(torch.device(kind))
    finally:
        torch.set_num_threads(threads)
    # Ranks on a CPU share its memory, a core each.
    own = psutil.virtual_memory().total // (os.cpu_count() or 1)
    memory = own if kind == "cpu" else torch.cuda.get_device_properties(0).total_memory
    return Device(MEASURED, flops, memory, link.link_bytes_per_second, link.latency_seconds)


def product_flops(device: torch.device) -> float:
    """Operations a second of products of matrices on a device: float32 on a CPU, bfloat16 on a GPU."""
    import torch

    size, dtype = (1024, torch.float32) if device.type == "cpu" else (8192, torch.bfloat16)
    a = torch.ones(size, size, dtype=dtype, device=device)
    return 2 * size**3 / _seconds(lambda: (a @ a).sum().item())


def _seconds(action: Callable[[], Any]) -> float:
    action()
    times = []
    for _ in range(7):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return median(times)


def _links() -> Device:
    """Two ranks of this machine, as processes of this module. Raises ConfigError where they do not answer."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            run_ranks(__name__, folder, 2, seconds=60)
        except TimeoutError as error:
            raise ConfigError(f"--device {MEASURED}: two ranks of this machine: {error}") from error
        seconds = folder / "seconds.json"
        if not seconds.exists():
            raise ConfigError(f"--device {MEASURED}: two ranks of this machine: {last_word(folder, 2)}")
        small, large = json.loads(seconds.read_text())
    # A ring of two passes half of the bytes twice; cost.py counts a latency for each rank.
    return Device(MEASURED, 1.0, 1, LARGE / max(large - small, 1e-9), small / 2)


def _rank(folder: str, rank: int) -> None:
    import torch
    import torch.distributed as dist

    kind = choose_device("auto")
    dist.init_process_group(backend_of(kind), init_method=f"file://{folder}/store", rank=rank, world_size=2)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    found = []
    for size in (SMALL, LARGE):
        values = torch.zeros(size // 4, device=device)
        found.append(_seconds(lambda values=values: (dist.all_reduce(values), values[0].item())))  # type: ignore[misc]
    if rank == 0:
        (Path(folder) / "seconds.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _rank(sys.argv[1], int(sys.argv[2]))
