"""torch.distributed.checkpoint, as `torch.distributed.checkpoint.state_dict` names things. What is in it: see formats.dcp.

A model in low precision is written by its masters: whoever trains with FSDP2 in mixed precision keeps float32 parameters, and a
model in low precision rounds what it loads. What DCP has no place for (that dtype, ties, the step) stands in an entry of ours,
which torch passes over.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch

from trainrt.checkpoint.formats.dcp import OURS
from trainrt.checkpoint.formats.dcp_items import METADATA
from trainrt.checkpoint.formats.opened import Opened
from trainrt.checkpoint.live import LiveModel
from trainrt.checkpoint.targets.array import TargetArray
from trainrt.checkpoint.targets.dcp_items import Item, cut, directory
from trainrt.checkpoint.targets.files import FilesTarget
from trainrt.checkpoint.targets.target import Target
from trainrt.checkpoint.targets.training import Training
from trainrt.parallel.layout import Box


def make(opened: Opened, model: LiveModel | None) -> tuple[Opened, Target, list[str]]:
    training = Training(opened, model)
    files, metadata = directory(_items(training))
    return training.opened, FilesTarget(files, {METADATA: metadata}), []


def _items(training: Training) -> Iterator[Item]:
    tensors = training.tensors
    ties: dict[str, list[str]] = {}
    for tied, owner in training.aliases.items():
        ties.setdefault(owner, []).append(tied)
    for parameter in [*training.parameters, *training.buffers]:
        shown = tensors.get((parameter.name, "master"), parameter)
        yield from cut(
            TargetArray.whole(shown), [f"model.{name}" for name in (parameter.name, *ties.get(parameter.name, ()))]
        )
    for name, role in tensors:
        if role in training.moments:
            yield from cut(TargetArray.whole(tensors[name, role]), [f"optim.state.{name}.{role}"])
    for group in training.groups:
        for step in sorted(set(group.steps.values())):
            steps = tuple(f"optim.state.{name}.step" for name, taken in group.steps.items() if taken == step)
            yield Item(torch.tensor(float(step)), steps, Box((), ()), ((), "float32"))
        for key, value in group.settings.items():
            yield Item(value, tuple(f"optim.param_groups.{name}.{key}" for name in group.names))
    yield Item(json.dumps(_ours(training)), (OURS,))


def _ours(training: Training) -> dict[str, Any]:
    """What the reader wants to know, and DCP has no place for."""
    kept = ("step", "scheduler", "data", "rng", "config", "model_config")
    metadata = {key: training.opened.metadata[key] for key in kept if key in training.opened.metadata}
    lowered = {t.name: t.dtype for t in training.parameters if (t.name, "master") in training.tensors}
    buffers = [tensor.name for tensor in training.buffers]
    scale = {"loss_scale": training.loss_scale} if training.loss_scale else {}
    return {
        "metadata": metadata,
        "aliases": training.aliases,
        "lowered": lowered,
        "buffers": buffers,
        "optimizer": scale,
    }
