"""Formats of checkpoints: which one a path is, and how it is opened."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainrt.checkpoint.formats import dcp, deepspeed, deepspeed_universal, hf, mapped, megatron, megatron_dist
from trainrt.checkpoint.formats.opened import Opened
from trainrt.checkpoint.live import LiveModel, unpacked
from trainrt.checkpoint.mapping.description import Description
from trainrt.checkpoint.reader import Universal
from trainrt.errors import CheckpointError, LayoutError

UNIVERSAL = "universal"
READ = (
    UNIVERSAL, deepspeed.NAME, deepspeed_universal.NAME, megatron.NAME, megatron_dist.NAME, dcp.NAME, hf.NAME,
)  # fmt: skip


def open_any(
    path: Path, *, model_config: Mapping[str, Any] | None = None, mapping: Description | None = None
) -> Opened:
    """Open a checkpoint of any format that is known, or of the one that a mapping describes.

    Raises CheckpointError where it is none, or damaged.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory")
    try:
        return _open(path, model_config, mapping)
    except LayoutError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _open(path: Path, model_config: Mapping[str, Any] | None, mapping: Description | None) -> Opened:
    if mapping is not None:
        return mapped.open_checkpoint(path, mapping, model_config=model_config)
    if (path / "manifest.json").exists() or (path / "COMMIT").exists():
        return _universal(path, model_config)
    # Megatron's before those of torch, in whose form they are.
    readers: list[Any] = [megatron_dist, deepspeed, deepspeed_universal, dcp, megatron, hf]
    reader = next((reader for reader in readers if reader.recognise(path) is not None), None)
    if reader is None:
        raise CheckpointError(f"{path}: no checkpoint of a format that is known ({', '.join(READ)})")
    try:
        opened: Opened = reader.open_checkpoint(path, model_config=model_config)
    except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
        # What is in a file has not the form that its reader counts on.
        said = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path}: is not as {reader.NAME} writes it: {said}") from error
    model = LiveModel.of(opened.metadata["model_config"]) if reader in (deepspeed, deepspeed_universal, dcp) else None
    return opened if model is None else unpacked(opened, model)


def _universal(path: Path, model_config: Mapping[str, Any] | None) -> Opened:
    held = Universal.open(path)
    metadata = {
        key: value for key, value in held.manifest.items() if key not in ("schema", "writer", "files", "tensors")
    }
    metadata["aliases"] = {e["name"]: e["alias_of"] for e in held.manifest["tensors"] if e["alias_of"] is not None}
    metadata["model_config"] = held.model_config() or dict(model_config or {})
    return Opened(UNIVERSAL, "manifest.json and COMMIT", path, held, metadata)
