"""A model from a checkpoint in this process alone, without mesh, optimizer or launcher."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from trainrt.checkpoint.universal import Universal
from trainrt.config import JobConfig, MeshSize
from trainrt.parallel.plan import Plan
from trainrt.training.models.build import whole_model
from trainrt.training.pipeline import Pipeline, load_pipeline
from trainrt.training.planning import make_plan, meta_model
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
    plan = make_plan(config, world_size=1, model=meta_model(config, pipeline), mesh=MeshSize())
    model = whole_model(config, pipeline.model, fresh=False)
    restore(_Whole(model, plan), source)
    return model, config
