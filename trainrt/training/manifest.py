"""What a snapshot says of itself: everything of a checkpoint's manifest that only the job knows."""

from __future__ import annotations

from typing import Any

from trainrt.config import JobConfig
from trainrt.parallel.plan import Plan
from trainrt.training.engines.native import NativeEngine
from trainrt.training.models.build import model_document
from trainrt.training.optimizer import group_document, learning_rate
from trainrt.training.pipeline import Pipeline


def constant_metadata(run_id: str, config: JobConfig, *, pipeline: Pipeline, plan: Plan) -> dict[str, Any]:
    """The part that is the same at every step of an incarnation."""
    return {
        "run_id": run_id,
        "model_config": {} if pipeline.model is not None else model_document(config),
        "aliases": plan.aliases,
        "rng": {"rule": "seed, step, logical shard", "seed": config.run.seed},
        "config": config.model_dump(mode="json"),
        "plan_sha256": plan.sha256(),
    }


def step_metadata(engine: NativeEngine, step: int, *, steps: int, corpus_digest: str | None) -> dict[str, Any]:
    """The part that changes: the optimizer's groups and steps, the scheduler, the data cursor, what was learned of
    strategies for mixtures."""
    config, updates = engine.config, engine.updates
    logical = {parameter.name: [part.name for part in parameter.parts] for parameter in engine.plan.parameters}
    return {
        "step": step,
        "updates": updates,
        "optimizer": {
            "name": config.optimizer.name,
            "groups": group_document(engine.optimizer, logical),
            "steps": {name: updates for live in engine.local for name in logical[live]},
        },
        "scheduler": {
            "name": config.optimizer.schedule,
            "step": step,
            "learning_rate": learning_rate(config.optimizer, step=step, steps=steps),
        },
        "data": {
            "seed": config.run.seed,
            "next_sample": step * config.data.global_batch,
            "corpus_digest": corpus_digest,
        },
        "mixtures": [tuner.to_json() for tuner in engine.tuners],
    }
