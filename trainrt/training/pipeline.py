"""The user's pipeline: up to five functions that stand in for the built-in model, data and objective."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from trainrt.config import JobConfig
from trainrt.errors import ConfigError, nearest
from trainrt.training.objectives import LossFunction, causal


class SampleSource(Sized, Protocol):
    """A sized, indexable source of samples."""

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Redco's three functions (arXiv 2310.16355, section 3) and two sources.

    model: () -> nn.Module (called under a meta device for planning), or None: [model] says it.
    samples: () -> SampleSource, or None: [data] says it.
    collate: (samples) -> dict of tensors. loss: (model, batch) -> (sum of losses, weight).
    predict: (model, batch) -> outputs. What is None is the built-in causal language model's.
    """

    model: Callable[[], nn.Module] | None = None
    samples: Callable[[], SampleSource] | None = None
    collate: Callable[[Sequence[Any]], dict[str, torch.Tensor]] | None = None
    loss: LossFunction | None = None
    predict: Callable[[nn.Module, Mapping[str, Any]], Any] | None = None


def load_pipeline(config: JobConfig) -> Pipeline:
    """The pipeline that run.pipeline names ("module:attribute"), or the built-in one. Raises ConfigError."""
    name = config.run.pipeline
    if not name:
        return Pipeline()
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f'run.pipeline = "{name}": {error}; allowed: "module:attribute" on the Python path'
        ) from error
    if not hasattr(module, attribute):
        raise ConfigError(
            f'run.pipeline = "{name}": no {attribute!r} in {module_name}{nearest(attribute, vars(module))}'
        )
    found = getattr(module, attribute)
    pipeline = found() if callable(found) and not isinstance(found, Pipeline) else found
    if not isinstance(pipeline, Pipeline):
        raise ConfigError(f'run.pipeline = "{name}" is a {type(pipeline).__name__}; allowed: a trainrt.Pipeline')
    return pipeline


def default_predict(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """Logits of the built-in language models."""
    output = model(batch["input_ids"])
    return output.logits


def loss_function(config: JobConfig, pipeline: Pipeline) -> LossFunction:
    return pipeline.loss or causal(config)
