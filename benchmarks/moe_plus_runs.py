"""What the ranks of `benchmarks.moe_plus` do: one model with FFN experts only, and with zero-computation experts beside them.

Legend: W ranks, S steps, A experts of all kinds.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.jobs import engine, job
from trainrt.config import JobConfig
from trainrt.events import ring
from trainrt.parallel.moe.layer import MoeLayer
from trainrt.parallel.moe.router import Routing
from trainrt.training.data import collate, logical_shards, open_corpus, sample_ids
from trainrt.training.data.corpus import Samples

PLAIN, PLUS = "plain", "MoE++"
ARMS: dict[str, dict[str, int]] = {PLAIN: {}, PLUS: {"zero_experts": 1, "copy_experts": 1, "constant_experts": 2}}
EXPERTS, TOP_K, TAU = 8, 2, 0.75
VALIDATION = 128
"""Samples of the validation split."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of the model and of a step; batches in samples, `length` in tokens a sample."""

    layers: int = 4
    hidden_size: int = 64
    intermediate_size: int = 128
    length: int = 128
    batch: int = 8
    microbatch: int = 4


@dataclass(slots=True)
class Curve:
    """Of each step the loss (nats a token), seconds and the share of choices that went to zero-computation experts."""

    loss: list[float]
    seconds: list[float]
    share: list[float]
    validation: float = 0.0


class Chosen:
    """How many rows chose each expert of a model, counted where its routers are called."""

    def __init__(self, model: nn.Module) -> None:
        self._rows_A: Tensor | None = None
        for module in model.modules():
            if isinstance(module, MoeLayer):
                module.router.register_forward_hook(self._count)

    def _count(self, router: nn.Module, args: Any, routing: Routing) -> None:
        rows_A = routing.rows.count_E
        self._rows_A = rows_A if self._rows_A is None else self._rows_A + rows_A

    def take(self) -> list[int]:
        """The counts since they were last taken."""
        assert self._rows_A is not None
        counts, self._rows_A = self._rows_A.tolist(), None
        return counts


def config_of(arm: str, shape: Shape, *, steps: int, seed: int, ranks: int = 1) -> JobConfig:
    """The job of an arm. Rows travel to whole experts over all ranks, straight and in one chunk."""
    sizes = {"layers": shape.layers, "hidden_size": shape.hidden_size, "intermediate_size": shape.intermediate_size}
    way = {"r": 1, "degree": 1, "backward_degree": 1, "all_to_all": "linear", "hot_experts": 0}
    return job(
        mesh={"fsdp": ranks, "ep": ranks},
        run={"steps": steps, "seed": seed},
        model={"config": {**sizes, "heads": 4, "kv_heads": 2}},
        data={"sequence_length": shape.length, "global_batch": shape.batch, "microbatch": shape.microbatch},
        optimizer={"learning_rate": 3e-3},
        moe={"experts": EXPERTS, "top_k": TOP_K, "tau": TAU, **way, **ARMS[arm]},
    )


def exchanged(rank: int, shape: Shape, steps: int, ranks: int) -> dict[str, dict[str, list[Any]]]:
    """Of each arm and step: the rows that this rank handed to all-to-alls, and how many of its rows chose each expert.

    Rows are bytes of the collectives' events over those of a row; what stays on the rank is among them.
    """
    found: dict[str, dict[str, list[Any]]] = {}
    for arm in ARMS:
        config = config_of(arm, shape, steps=steps, seed=0, ranks=ranks)
        made, samples = engine(config, rank), open_corpus(config.data).train
        chosen = Chosen(made.model)
        found[arm] = {"rows": [], "chosen": []}
        for step in range(1, steps + 1):
            ring.drain()
            _step(made, config, samples, step)
            sent = sum(event.bytes for event in ring.drain() if event.name == "all_to_all")
            rows, rest = divmod(sent, 4 * shape.hidden_size)
            assert rest == 0, "the events hold something else than rows"
            found[arm]["rows"].append(rows)
            found[arm]["chosen"].append(chosen.take())
    return found


def curves(rank: int, shape: Shape, steps: int, seed: int) -> dict[str, Curve]:
    """Both arms from the same start over the same batches, in turn step by step; who is first changes."""
    configs = {arm: config_of(arm, shape, steps=steps, seed=seed) for arm in ARMS}
    engines = {arm: engine(config, rank) for arm, config in configs.items()}
    _start_alike(engines[PLAIN], engines[PLUS])
    chosen = {arm: Chosen(made.model) for arm, made in engines.items()}
    found = {arm: Curve([], [], []) for arm in ARMS}
    corpus = open_corpus(configs[PLAIN].data)
    for step in range(1, steps + 1):
        for arm in sorted(ARMS, reverse=step % 2 == 0):
            loss, seconds = _step(engines[arm], configs[arm], corpus.train, step)
            counts, curve = chosen[arm].take(), found[arm]
            curve.loss.append(loss)
            curve.seconds.append(seconds)
            curve.share.append(sum(counts[EXPERTS:]) / sum(counts))
    held_out = _held_out(corpus.validation, shape)
    for arm, curve in found.items():
        curve.validation = engines[arm].evaluate(held_out)
    return found


@torch.no_grad()
def _start_alike(plain: Any, plus: Any) -> None:
    """What both have starts with the same numbers: all but rows of routers, their residuals and constant experts."""
    for name, tensor in plain.local.items():
        plus.local[name][: len(tensor)].copy_(tensor)


def _step(made: Any, config: JobConfig, samples: Samples, step: int) -> tuple[float, float]:
    """The loss of a step and its seconds, without those of its data."""
    data = config.data
    shards = logical_shards(
        config.run.seed, step - 1, global_batch=data.global_batch, microbatch=data.microbatch, length=len(samples)
    )
    mine = [made.leaf_of(turn, len(shards)) for turn in range(made.rounds(len(shards)))]
    batches = [(_batch(samples, shards[leaf]), 0) for leaf in mine]
    start = time.perf_counter()
    result = made.step(step, batches, leaves=len(shards), steps=config.run.steps)
    return result.loss, time.perf_counter() - start


def _held_out(samples: Samples, shape: Shape) -> list[tuple[dict[str, Tensor], bool]]:
    """The same samples of the validation split for all."""
    ids = sample_ids(0, 0, global_batch=min(VALIDATION, len(samples)), length=len(samples))
    return [(_batch(samples, group), True) for group in np.array_split(ids, -(-len(ids) // shape.microbatch))]


def _batch(samples: Samples, ids: Sequence[int]) -> dict[str, Tensor]:
    return collate([samples[int(index)] for index in ids])
