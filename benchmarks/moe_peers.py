"""The layer with its router beside DeepSpeed-MoE and Tutel: same weights, routing and capacity; a part of `benchmarks.moe`."""

from __future__ import annotations

import functools
import importlib.util
import os
import random
from collections.abc import Mapping
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.moe_hosts import limit, run_ranks
from benchmarks.moe_layer import RANKS, Layer, Run, timed
from benchmarks.pairs import Times, print_table, ratios, slowest
from tests.launch.hosts import Hosts
from trainrt.config import MoeConfig
from trainrt.parallel.moe.layer import MoeLayer
from trainrt.parallel.moe.strategy import Fixed, Strategy

EXPERTS, TOP_K, WIDTH, INNER = 4, 2, 256, 512
TOKENS, SHORT_TOKENS = (256, 2048), (256,)
FACTORS = {"dropless": 0.0, "capacity 1.25": 1.25}
OURS = {"r 0": Strategy(0), "degree 1": Strategy(), "degree 4": Strategy(1, 4, 4)}
SAME = 1e-5


class Swiglu(nn.Module):
    """One of our experts as a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(WIDTH, INNER, bias=False)
        self.up_proj = nn.Linear(WIDTH, INNER, bias=False)
        self.down_proj = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def our_layer(factor: float) -> MoeLayer:
    torch.manual_seed(0)
    config = MoeConfig(experts=EXPERTS, top_k=TOP_K, capacity_factor=factor)
    moe = MoeLayer(config, hidden_size=WIDTH, intermediate_size=INNER)
    for parameter in moe.parameters():
        nn.init.normal_(parameter, std=WIDTH**-0.5)
    return moe


def deepspeed_layer(moe: MoeLayer, factor: float) -> nn.Module:
    """DeepSpeed's layer with the weights of ours, which is still whole."""
    rank = dist.get_rank()
    os.environ |= {"DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(RANKS)}
    import deepspeed
    from deepspeed.moe.layer import MoE

    # Nothing is to be compiled (see tests/checkpoint/frameworks.py).
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    theirs = MoE(
        WIDTH, Swiglu(), num_experts=EXPERTS, ep_size=RANKS, k=TOP_K, capacity_factor=factor or 1.0, min_capacity=0,
        drop_tokens=bool(factor), use_rts=False, top2_2nd_expert_sampling=False,
    )  # fmt: skip
    theirs.set_deepspeed_parallelism()
    gate, experts = theirs.deepspeed_moe.gate, theirs.deepspeed_moe.experts.deepspeed_experts
    with torch.no_grad():
        gate.wg.weight.copy_(moe.router.weight)
        for i, expert in enumerate(experts):
            for name in moe.experts.INNER:
                held = getattr(moe.experts, name)[rank * len(experts) + i]
                getattr(expert, name).weight.copy_(held)
    return theirs


def tutel_layer(moe: MoeLayer, factor: float) -> nn.Module:
    """Tutel's layer with the weights of ours, which is still whole; its factor means what ours does."""
    from tutel import moe as tutel

    here = EXPERTS // RANKS
    theirs = tutel.moe_layer(
        model_dim=WIDTH, gate_type={"type": "top", "k": TOP_K, "fp32_gate": True, "capacity_factor": factor},
        experts={"type": "llama_ffn", "count_per_node": here, "hidden_size_per_expert": INNER},
    )  # fmt: skip
    names = {"W_fc1": "gate_proj", "W_fc2": "up_proj", "W_fc3": "down_proj"}
    with torch.no_grad():
        theirs.gates[0].wg.weight.copy_(moe.router.weight)
        for name, ours in names.items():
            held = getattr(moe.experts, ours)[here * dist.get_rank() :][:here]
            getattr(theirs.experts, name).copy_(held.transpose(1, 2).flatten())
    return theirs


def contenders(factor: float) -> dict[str, Run]:
    """Layers by name; those of ours share their weights."""
    moe = our_layer(factor)
    theirs = {"DeepSpeed": deepspeed_layer(moe, factor)}
    if tutel_is_installed():
        theirs["Tutel"] = tutel_layer(moe, factor)
    layer = Layer(moe.experts)

    def ours(x_TD: Tensor, way: Strategy) -> Tensor:
        layer.use(Fixed(way))
        moe.zero_grad(set_to_none=True)
        return moe(x_TD)[0]

    def peer(x_TD: Tensor, name: str) -> Tensor:
        theirs[name].zero_grad(set_to_none=True)
        y_TD = theirs[name](x_TD)
        return y_TD[0] if isinstance(y_TD, tuple) else y_TD

    field = {name: functools.partial(ours, way=way) for name, way in OURS.items()}
    return field | {name: functools.partial(peer, name=name) for name in theirs}


def compete(rank: int, cases: list[tuple[str, int]], pairs: int) -> list[Times]:
    """One race for each (kind, tokens)."""
    fields = {kind: contenders(FACTORS[kind]) for kind, _ in cases}
    return [race(rank, fields[kind], FACTORS[kind], tokens, pairs) for kind, tokens in cases]


def race(rank: int, field: dict[str, Run], factor: float, tokens: int, pairs: int) -> Times:
    """Seconds of forward and backward of each, in an order that changes. Without drops they have to agree first."""
    x_TD = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(rank))
    outputs = {name: run(x_TD).detach() for name, run in field.items()}
    for name, y_TD in outputs.items():
        error = float((y_TD - outputs["degree 1"]).norm() / outputs["degree 1"].norm())
        # Who is dropped is decided in another order.
        if not factor and error > SAME:
            raise RuntimeError(f"not the same computation: {name} is off by {error:.1e}")
    draw, times = random.Random(0), {name: [] for name in field}
    for run in field.values():
        timed(run, x_TD)
    for _ in range(pairs):
        for name in draw.sample(list(field), len(field)):
            times[name].append(timed(field[name], x_TD)[1])
    return times


def tutel_is_installed() -> bool:
    return importlib.util.find_spec("tutel") is not None


def peers(hosts: Hosts, rates: Mapping[str, float], *, pairs: int, short: bool) -> list[dict[str, Any]]:
    found = []
    cases = list(product(FACTORS, SHORT_TOKENS if short else TOKENS))
    for regime, megabits in rates.items():
        limit(hosts, megabits)
        lines = []
        races = zip(*run_ranks(hosts, compete, cases, pairs), strict=True)
        for (kind, tokens), of_ranks in zip(cases, races, strict=True):
            times = slowest(of_ranks)
            case = {"kind": kind, "tokens": tokens}
            rows = [
                case | {"peer": peer} | {name: ratios(times[peer], times[name]) for name in OURS}
                for peer in times
                if peer not in OURS
            ]
            lines += rows
            found.append({"regime": regime, "megabits": megabits, **case, "seconds": times, "ratios": rows})
        print_table(f"peers, {regime} ({megabits:.0f} Mbit/s): a peer's time over ours; above 1 ours is faster", lines)
    if not tutel_is_installed():
        print("  Tutel is not installed")
    return found
