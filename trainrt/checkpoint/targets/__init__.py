"""Formats that are written: which one is meant, and what it takes."""

from __future__ import annotations

from trainrt.checkpoint.formats.opened import Opened
from trainrt.checkpoint.live import LiveModel, packed
from trainrt.checkpoint.targets import deepspeed, megatron, universal
from trainrt.checkpoint.targets.shape import Shape
from trainrt.checkpoint.targets.target import Target
from trainrt.checkpoint.writer import MODEL_ROLES
from trainrt.parallel.layout import Layout

__all__ = ["TARGETS", "Shape", "make_target"]
TARGETS = ("universal", "hf", "deepspeed", "deepspeed-universal", "dcp", "megatron", "megatron-dist")


def make_target(opened: Opened, to: str, shape: Shape) -> tuple[Opened, Target, list[str]]:
    """The target of a format, what it has no place for, and the source as the target reads it.

    Raises ConfigError for a mesh that the format does not have, and CheckpointError where something is missing for it.
    """
    shape.check(to)
    metadata = {"step": 0, "run_id": "", **opened.metadata}
    layout = opened.source.layout
    match to:
        case "universal":
            return opened, universal.UniversalTarget(layout, metadata), []
        case "hf":
            return opened, universal.HuggingFaceTarget(_model(layout), metadata), _lost_of_hf(opened)
        case "deepspeed":
            return deepspeed.make(*_live(opened), shape)
        case "deepspeed-universal":
            return deepspeed.make_universal(*_live(opened), shape)
        case "megatron":
            return megatron.make(opened, shape)
        case "megatron-dist":
            return megatron.make_dist(opened, shape)
    # Half a second of torch's, which the other formats do not need.
    from trainrt.checkpoint.targets import dcp

    return dcp.make(*_live(opened))


def _live(opened: Opened) -> tuple[Opened, LiveModel | None]:
    """The source under the names that its model has in memory, and that model where it is known."""
    model = LiveModel.of(opened.metadata["model_config"])
    return (opened, None) if model is None else (packed(opened, model), model)


def _model(layout: Layout) -> Layout:
    return layout.only(lambda tensor, _: tensor.role in MODEL_ROLES)


def _lost_of_hf(opened: Opened) -> list[str]:
    roles = sorted({role for _, role in opened.source.layout.tensors} - set(MODEL_ROLES))
    lost = [f"{role}: a Hugging Face model has no place for it" for role in roles]
    if not opened.metadata["model_config"]:
        lost.append("config.json: not known (--model-config gives it)")
    return lost
