"""What a mesh costs: bytes a rank holds and seconds a step takes, each number with its parts.

A first model: compute at a device's sustained rate, collectives at a link's bandwidth plus a
latency, nothing overlapped. `plan.json` carries every part, so that each can be checked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainrt.parallel.layout import ITEM_BYTES, Box
from trainrt.parallel.plan import Plan

PEAK_FLOPS = {
    "cpu": 6.0e10, "a100": 3.12e14, "h100": 9.89e14, "h200": 9.89e14, "b200": 2.25e15, "l40s": 3.62e14, "v100": 1.25e14,
}  # fmt: skip
"""Dense bf16 floating-point operations per second of a device (vendors' sheets); cpu: one core, fp32, measured."""

MEMORY_BYTES = {
    "cpu": 8 << 30, "a100": 80 << 30, "h100": 80 << 30, "h200": 141 << 30, "b200": 192 << 30, "l40s": 48 << 30, "v100": 32 << 30,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Work:
    """What one step of the job computes and holds, whatever the mesh."""

    global_batch: int
    microbatch: int
    sequence_length: int
    layers: int
    hidden_size: int
    active_fraction: float
    compute_dtype: str


@dataclass(frozen=True, slots=True)
class Device:
    """The device and its links. Bandwidth in bytes per second, latency in seconds."""

    name: str
    flops: float
    memory_bytes: int
    link_bytes_per_second: float
    latency_seconds: float


def device_of(name: str) -> Device:
    """The profile of a named device."""
    link, latency = (2e9, 2e-4) if name == "cpu" else (5e10, 2e-5)
    return Device(name, PEAK_FLOPS[name], MEMORY_BYTES[name], link, latency)


def estimate(plan: Plan, work: Work, device: Device) -> dict[str, float]:
    """The parts of memory (bytes a rank) and of a step (seconds). `memory_bytes` and `step_seconds` are their sums."""
    size = plan.mesh
    elements = sum(Box.whole(p.shape).elements for p in plan.parameters if not p.buffer)
    held = sum(p.held(size, 0).elements for p in plan.parameters if not p.buffer)
    item = ITEM_BYTES[work.compute_dtype]
    memory = {
        "state_bytes": held * 16.0,
        "gathered_bytes": 2.0 * item * elements / max(work.layers, 1) / size.tp,
        "activation_bytes": 24.0
        * item
        * work.microbatch
        * work.sequence_length
        * work.hidden_size
        * work.layers
        / size.tp,
    }
    rounds = math.ceil(work.global_batch / work.microbatch / size.data_ranks)
    tokens = rounds * work.microbatch * work.sequence_length
    width_bytes = tokens * work.hidden_size * item
    seconds = {
        "compute_seconds": 6.0 * elements * work.active_fraction * tokens / size.tp / (0.4 * device.flops),
        "fsdp_seconds": _moved(3.0 * rounds * elements * item / size.tp, size.fsdp, 3 * rounds * work.layers, device),
        "dp_seconds": _moved(2.0 * held * 4.0, size.dp, work.layers, device),
        "tp_seconds": _moved(8.0 * width_bytes * work.layers, size.tp, 4 * rounds * work.layers, device),
        "ep_seconds": _moved(8.0 * width_bytes * work.layers, size.ep, 6 * rounds * work.layers, device),
    }
    return {
        **memory,
        **seconds,
        "memory_bytes": sum(memory.values()),
        "step_seconds": sum(seconds.values()),
    }


def _moved(whole_bytes: float, ranks: int, messages: int, device: Device) -> float:
    """Seconds of ring collectives that carry `whole_bytes` in all over `ranks`."""
    if ranks == 1:
        return 0.0
    return whole_bytes * (ranks - 1) / ranks / device.link_bytes_per_second + messages * ranks * device.latency_seconds


def flops_per_token(parameters: int, *, layers: int, hidden_size: int, sequence_length: int) -> float:
    """Model operations of training on one token: 6 per active parameter, and attention's 12 L D S (causal: half).

    PaLM (arXiv 2204.02311, appendix B). MFU = tokens per second * this / (ranks * peak).
    """
    return 6.0 * parameters + 6.0 * layers * hidden_size * sequence_length
