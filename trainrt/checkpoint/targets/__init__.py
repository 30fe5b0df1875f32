"""Formats that are written: which one is meant, and what it takes."""

from __future__ import annotations

from dataclasses import replace

from trainrt.checkpoint.formats.opened import Opened, Without
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
        case "megatron":
            alike, lost = _alike(opened)
            return _having_lost(lost, megatron.make(alike, shape))
        case "megatron-dist":
            alike, lost = _alike(opened)
            return _having_lost(lost, megatron.make_dist(alike, shape))
    model = LiveModel.of(opened.metadata["model_config"])
    live, lost = packed(opened, model) if model is not None else (opened, [])
    if to == "deepspeed":
        return _having_lost(lost, deepspeed.make(live, model, shape))
    if to == "deepspeed-universal":
        return _having_lost(lost, deepspeed.make_universal(live, model, shape))
    # Half a second of torch's, which the other formats do not need.
    from trainrt.checkpoint.targets import dcp

    return _having_lost(lost, dcp.make(live, model))


def _having_lost(lost: list[str], made: tuple[Opened, Target, list[str]]) -> tuple[Opened, Target, list[str]]:
    """What is made of a source that has lost something on the way already."""
    opened, target, more = made
    return opened, target, [*lost, *more]


def _alike(opened: Opened) -> tuple[Opened, list[str]]:
    """Without the moments that have another shape than their parameter, and what those are."""
    layout = opened.source.layout
    shapes = {tensor.name: tensor.shape for tensor in layout.tensors.values() if tensor.role == "parameter"}
    odd = {
        tensor.key for tensor in layout.tensors.values()
        if tensor.role not in MODEL_ROLES and tensor.shape != shapes.get(tensor.name)
    }  # fmt: skip
    if not odd:
        return opened, []
    lost = [f"{role}: has another shape than its parameter" for role in sorted({role for _, role in odd})]
    return replace(opened, source=Without(opened.source, odd)), lost


def _model(layout: Layout) -> Layout:
    return layout.only(lambda tensor, _: tensor.role in MODEL_ROLES)


def _lost_of_hf(opened: Opened) -> list[str]:
    roles = sorted({role for _, role in opened.source.layout.tensors} - set(MODEL_ROLES))
    lost = [f"{role}: a Hugging Face model has no place for it" for role in roles]
    if not opened.metadata["model_config"]:
        lost.append("config.json: not known (--model-config gives it)")
    return lost
