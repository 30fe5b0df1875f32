"""What a mesh costs: bytes a rank holds and seconds a step takes, each number with its parts.

Bytes are counted. Seconds are a first model: compute at a device's sustained rate, collectives at a link's bandwidth plus
a latency, nothing overlapped. `plan.json` carries every part, so that each can be checked.
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


SUSTAINED = 0.4
"""The share of a device's operations that a model gets."""


@dataclass(frozen=True, slots=True)
class Work:
    """What one step of the job computes and holds, whatever the mesh.

    blocks: what the names of the repeated layers' parameters begin with. summed_late: gradients are summed over ranks in
    the last round of a step only, and are whole until then.
    """

    global_batch: int
    microbatch: int
    sequence_length: int
    layers: int
    hidden_size: int
    active_fraction: float
    compute_dtype: str
    blocks: str
    summed_late: bool

    def rounds(self, data_ranks: int) -> int:
        """Forward and backward passes of a rank in a step."""
        return math.ceil(self.global_batch / self.microbatch / data_ranks)


@dataclass(frozen=True, slots=True)
class Device:
    """The device and its links. flops: floating-point operations per second at best. Bandwidth in bytes per second, latency
    in seconds."""

    name: str
    flops: float
    memory_bytes: int
    link_bytes_per_second: float
    latency_seconds: float


def estimate(plan: Plan, work: Work, device: Device, activation_bytes: float | None) -> dict[str, float]:
    """The parts of memory (bytes a rank) and of a step (seconds). `step_seconds` is their sum, `memory_bytes` the peak.

    activation_bytes: as counted for one sample, or None where they could not be.
    """
    size = plan.mesh
    elements = sum(Box.whole(p.shape).elements for p in plan.parameters if not p.buffer)
    held = sum(p.held(size, 0).elements for p in plan.parameters if not p.buffer)
    item = ITEM_BYTES[work.compute_dtype]
    if activation_bytes is None:
        activation_bytes = 24.0 * item * work.sequence_length * work.hidden_size * work.layers / size.tp
    memory = {**_state(plan, work), "activation_bytes": activation_bytes * work.microbatch}
    rounds = work.rounds(size.data_ranks)
    tokens = rounds * work.microbatch * work.sequence_length
    width_bytes = tokens * work.hidden_size * item
    computed = 6.0 * elements * work.active_fraction * tokens / size.tp
    seconds = {
        "compute_seconds": computed / (SUSTAINED * device.flops),
        "fsdp_seconds": _moved(3.0 * rounds * elements * item / size.tp, size.fsdp, 3 * rounds * work.layers, device),
        "dp_seconds": _moved(2.0 * held * 4.0, size.dp, work.layers, device),
        "tp_seconds": _moved(8.0 * width_bytes * work.layers, size.tp, 4 * rounds * work.layers, device),
        "ep_seconds": _moved(8.0 * width_bytes * work.layers, size.ep, 6 * rounds * work.layers, device),
    }
    return {
        **memory,
        **seconds,
        "state_bytes": memory["parameter_bytes"] + memory["optimizer_bytes"],
        "memory_bytes": _peak(memory),
        "step_seconds": sum(seconds.values()),
    }


def _peak(memory: dict[str, float]) -> float:
    """The larger of two moments: all activations are there and no gradient is sharded, or the optimizer works on all of them."""
    backward = memory["gathered_bytes"] + memory["waiting_bytes"] + memory["activation_bytes"]
    update = 2 * memory["gradient_bytes"]
    return memory["parameter_bytes"] + memory["optimizer_bytes"] + max(backward, update)


def _state(plan: Plan, work: Work) -> dict[str, float]:
    """Parameters, gradients and optimizer of the first rank, and what FSDP2 gathers around computation.

    Gathered are the parameters of the root, of two layers (the next one is prefetched) and of two modules of experts.
    Gradients wait whole for the last round, where a step has several.
    """
    size = plan.mesh
    own = trainable = whole = 0
    units: dict[str, int] = {}
    for parameter in plan.parameters:
        bytes = parameter.held(size, 0).elements * ITEM_BYTES[parameter.dtype]
        own += bytes
        if parameter.buffer:
            continue
        gathered = parameter.held(size, 0, gathered=True).elements
        unit = _unit(parameter.name, plan, work)
        units[unit] = units.get(unit, 0) + gathered
        if parameter.trainable:
            trainable += bytes
            whole += gathered * ITEM_BYTES[parameter.dtype]
    experts = sorted((n for unit, n in units.items() if unit in plan.experts), reverse=True)
    layers = sorted((n for unit, n in units.items() if unit and unit not in plan.experts), reverse=True)
    computing = units.get("", 0) + sum(layers[:2]) + sum(experts[:2])
    waiting = work.summed_late and work.rounds(size.data_ranks) > 1
    return {
        "parameter_bytes": float(own),
        "gradient_bytes": float(trainable),
        "optimizer_bytes": 2.0 * trainable,
        "gathered_bytes": float(computing * ITEM_BYTES[work.compute_dtype]),
        "waiting_bytes": float(whole if waiting else 0),
    }


def _unit(name: str, plan: Plan, work: Work) -> str:
    """What FSDP2 gathers a parameter with: a module of spread experts, a layer, or the root."""
    for experts in plan.experts:
        if name.startswith(f"{experts}."):
            return experts
    if work.blocks and name.startswith(work.blocks):
        return work.blocks + name[len(work.blocks) :].partition(".")[0]
    return ""


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
