"""Checkpoints of a framework that nobody here knew: read by a mapping that its user wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainrt.checkpoint.formats import torch_file
from trainrt.checkpoint.formats.files import FileSource
from trainrt.checkpoint.formats.hf import safetensors_arrays
from trainrt.checkpoint.formats.opened import Opened
from trainrt.checkpoint.mapping.description import Description
from trainrt.checkpoint.mapping.rules import StoredArray, compile_reading
from trainrt.errors import CheckpointError


def open_checkpoint(path: Path, description: Description, *, model_config: Mapping[str, Any] | None = None) -> Opened:
    """Raises CheckpointError where no file is there, or the files and the mapping contradict each other."""
    places = description.places(path)
    if not places:
        raise CheckpointError(f"{path}: no file {description.files!r} of the mapping {description.format!r} is here")
    arrays: list[StoredArray] = []
    for file, at in places:
        for array in _arrays(file, description, at):
            role, name = description.role_of(array.name)
            arrays.append(replace(array, name=name, role=role))
    layout, unknown, coordinates = compile_reading(
        description.rules, arrays, variables=description.numbers(model_config or {}),
        local=description.local(arrays),
    )  # fmt: skip
    return Opened(
        description.format, f"--mapping, {len(places)} files", path, FileSource(layout),
        {"step": 0, "aliases": {}, "model_config": dict(model_config or {})},
        sorted({array.name for array in unknown}), coordinates,
    )  # fmt: skip


def _arrays(file: Path, description: Description, at: Mapping[str, int]) -> list[StoredArray]:
    if file.suffix == ".safetensors":
        return safetensors_arrays(file, at=at)
    state = torch_file.load(file)
    for key in filter(None, description.inside.split(".")):
        if not isinstance(state, dict) or key not in state:
            raise CheckpointError(f"{file}: no {description.inside!r} in it, where the mapping looks for tensors")
        state = state[key]
    return [torch_file.array_of(tensor, file, name, "parameter", **at) for name, tensor in torch_file.tensors_of(state)]
