"""A job's model as the planner wants it: made without storage, run on a small batch of the job's own kind."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from trainrt.config import JobConfig
from trainrt.parallel.planner.probe import Blueprint, hollow, shortened, small_model, source_of
from trainrt.training.data import collate
from trainrt.training.models.build import construct, huggingface_config
from trainrt.training.models.moe_lm import MoeLm
from trainrt.training.objectives import evaluate_loss
from trainrt.training.pipeline import Pipeline, loss_function

TOKENS = 16
"""Of a planning run: enough to reach every expert of a small mixture, no more than a tiny model has positions."""

SCALED_ELEMENTS = 30_000_000
"""Models with more in the layers that are kept are verified with smaller ones of the same structure, where that can be."""


def blueprint_of(config: JobConfig, pipeline: Pipeline, model: nn.Module | None = None) -> Blueprint:
    """How to make and run the model of a job; `model` is it, without storage, where it is there already."""
    loss = loss_function(config, pipeline)

    def make() -> nn.Module:
        with hollow():
            return pipeline.model() if pipeline.model is not None else construct(config, initialize=False)

    def run(small: nn.Module) -> Tensor:
        dtype = next(small.parameters()).dtype
        batch = {name: _as(value, dtype) for name, value in small_batch(config, pipeline, small).items()}
        return evaluate_loss(loss, small, batch).total()

    def sized(small: nn.Module, positions: int) -> Tensor:
        return evaluate_loss(loss, small, token_batch(config, pipeline, small, positions)).total()

    @cache
    def key() -> str:
        made = source_of(model if model is not None else make())
        return json.dumps([made, config.model.model_dump(), config.moe.model_dump()], default=str)

    if pipeline.samples is None:
        return Blueprint(make, run, key, sized)
    return Blueprint(make, run, key, None, len(own_samples(pipeline)))


def _as(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def scaled(config: JobConfig, pipeline: Pipeline) -> Blueprint:
    """The blueprint to verify with: a large Hugging Face model with its widths divided by a power of two."""
    blueprint = blueprint_of(config, pipeline)
    model = blueprint.make()
    shortened(model)
    elements = sum(parameter.numel() for parameter in model.parameters())
    if elements <= SCALED_ELEMENTS or pipeline.model is not None or config.model.kind != "huggingface":
        return blueprint
    document = huggingface_config(config).to_dict()
    for factor in (32, 16, 8, 4, 2):
        smaller = config.model_copy(
            update={"model": config.model.model_copy(update={"config": _divided(document, factor)})}
        )
        try:
            made = blueprint_of(smaller, pipeline)
            with torch.no_grad():
                made.loss(small_model(made))
        except Exception:
            # Such sizes are none that the model's code can run with; larger ones may be.
            continue
        return made
    return blueprint


def _divided(document: Any, factor: int) -> Any:
    """Widths of a configuration divided; numbers of things (heads, layers, experts, positions, tokens) stay."""
    if isinstance(document, dict):
        return {key: value if _counts(key) else _divided(value, factor) for key, value in document.items()}
    if (
        isinstance(document, int)
        and not isinstance(document, bool)
        and document >= 8 * factor
        and document % factor == 0
    ):
        return document // factor
    return document


def _counts(key: Any) -> bool:
    words = ("num_", "n_head", "n_layer", "position", "token", "window", "top", "group", "version")
    return any(word in str(key) for word in words)


def small_batch(config: JobConfig, pipeline: Pipeline, model: nn.Module) -> Mapping[str, Any]:
    """A batch of one or two samples: the user's own first ones, or random tokens."""
    if pipeline.samples is not None:
        return (pipeline.collate or collate)(own_samples(pipeline))
    return token_batch(config, pipeline, model, min(TOKENS, config.data.sequence_length))


def own_samples(pipeline: Pipeline) -> list[Any]:
    """The user's first samples."""
    assert pipeline.samples is not None
    samples = pipeline.samples()
    return [samples[index] for index in range(min(2, len(samples)))]


def token_batch(config: JobConfig, pipeline: Pipeline, model: nn.Module, positions: int) -> Mapping[str, Any]:
    """One sample of random tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocabulary_of(config, model), (positions + 1,), generator=generator).numpy()
    return (pipeline.collate or collate)([{"input_ids": tokens[:-1], "labels": tokens[1:]}])


def vocabulary_of(config: JobConfig, model: nn.Module) -> int:
    """Tokens that a model surely knows: a byte's, or fewer where it says so or has a smaller table."""
    if config.model.kind == "moe_lm" and isinstance(model, MoeLm):
        return min(256, config.moe_lm.vocab_size)
    said = getattr(getattr(model, "config", None), "vocab_size", None)
    if said:
        return min(256, int(said))
    return min((256, *(table.num_embeddings for table in model.modules() if isinstance(table, nn.Embedding))))
