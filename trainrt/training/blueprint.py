"""A job's model as the planner wants it: made without storage, run on a small batch of the job's own kind."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainrt.config import JobConfig
from trainrt.parallel.planner.probe import Blueprint, hollow, source_of
from trainrt.training.data import collate
from trainrt.training.models.build import construct
from trainrt.training.objectives import evaluate_loss
from trainrt.training.pipeline import Pipeline, loss_function

TOKENS = 16
"""Of a planning run: enough to reach every expert of a small mixture, no more than a tiny model has positions."""


def blueprint_of(config: JobConfig, pipeline: Pipeline, model: nn.Module) -> Blueprint:
    """How to make and run the model of a job; `model` is it, without storage."""
    loss = loss_function(config, pipeline)

    def make() -> nn.Module:
        with hollow():
            return pipeline.model() if pipeline.model is not None else construct(config, initialize=False)

    def run(small: nn.Module) -> Tensor:
        return evaluate_loss(loss, small, small_batch(config, pipeline, small)).total()

    key = json.dumps([source_of(model), config.model.model_dump(), config.moe.model_dump()], default=str)
    return Blueprint(make, run, key)


def small_batch(config: JobConfig, pipeline: Pipeline, model: nn.Module) -> Mapping[str, Any]:
    """A batch of one or two samples: the user's own first ones, or random tokens."""
    if pipeline.samples is not None:
        samples = pipeline.samples()
        return (pipeline.collate or collate)([samples[index] for index in range(min(2, len(samples)))])
    length = min(TOKENS, config.data.sequence_length)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocabulary_of(config, model), (length + 1,), generator=generator).numpy()
    return (pipeline.collate or collate)([{"input_ids": tokens[:-1], "labels": tokens[1:]}])


def vocabulary_of(config: JobConfig, model: nn.Module) -> int:
    """The number of tokens a model knows; a byte's where it does not say."""
    if config.model.kind == "moe_lm" and not hasattr(model, "config"):
        return config.moe_lm.vocab_size
    return int(getattr(getattr(model, "config", None), "vocab_size", 256) or 256)
