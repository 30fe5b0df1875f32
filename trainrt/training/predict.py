"""A checkpoint's model in this process alone, without mesh, optimizer or launcher: loaded, and run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainrt.checkpoint.universal import Universal
from trainrt.config import JobConfig, MeshSize
from trainrt.parallel.plan import Plan
from trainrt.training.data import collate
from trainrt.training.models.build import whole_model
from trainrt.training.pipeline import Pipeline, default_predict, load_pipeline
from trainrt.training.planning import meta_model, place
from trainrt.training.state import restore


@dataclass(slots=True)
class _Whole:
    """A plain model as the holder of its parameters and buffers."""

    model: nn.Module
    plan: Plan
    rank: int = 0

    def roles(self) -> list[tuple[str, str | None]]:
        return [("parameter", None)]

    def tensor(self, name: str, role: str) -> Tensor:
        return self.model.get_buffer(name) if role == "buffer" else self.model.get_parameter(name)


def load_model(path: Path, pipeline: Pipeline | None = None) -> tuple[nn.Module, JobConfig]:
    """The model of a universal checkpoint, and its job's config. Raises CheckpointError where it is damaged."""
    source = Universal.open(path)
    config = JobConfig.model_validate(source.manifest["config"])
    pipeline = pipeline if pipeline is not None else load_pipeline(config)
    plan = place(config, MeshSize(), model=meta_model(config, pipeline))
    model = whole_model(config, pipeline.model, fresh=False)
    restore(_Whole(model, plan), source)
    return model, config


def predict(checkpoint: str | os.PathLike[str], samples: Sequence[Any], pipeline: Pipeline | None = None) -> Any:
    """Run the pipeline's `predict` on samples with the model of a universal checkpoint, in this process.

    Returns what `predict` returns (for the built-in models: logits, (B, S, V)). Raises CheckpointError.
    """
    model, config = load_model(Path(checkpoint), pipeline)
    pipeline = pipeline or load_pipeline(config)
    batch = (pipeline.collate or collate)(list(samples))
    model.eval()
    with torch.no_grad():
        return (pipeline.predict or default_predict)(model, batch)
