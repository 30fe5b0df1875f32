"""torch.distributed.checkpoint: `.metadata` says which box of which tensor lies where in `__R_N.distcp`.

Entries are taken as `torch.distributed.checkpoint.state_dict` names them: `{any}.state.{parameter}.{role}` is the optimizer's,
and `{any}.param_groups...` its settings; the rest is the model's, without a first word that all have in common.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trainrt.checkpoint.formats.dcp_items import METADATA, Items
from trainrt.checkpoint.formats.files import FileSource
from trainrt.checkpoint.formats.opened import Cast, Opened, by_settings, optimizer_of
from trainrt.checkpoint.manifest import strict_json
from trainrt.checkpoint.mapping.rules import Rule, compile_reading
from trainrt.checkpoint.source import read_whole
from trainrt.parallel.layout import Layout, LogicalTensor

NAME = "dcp"
OURS = "trainrt"
"""An entry of checkpoints that we wrote (targets.dcp): JSON of what the format has no place for."""
STATE = re.compile(r"(?:\w+\.)?state\.(?P<name>.+)\.(?P<role>\w+)")
SETTINGS = re.compile(r"(?:\w+\.)?param_groups(?:\.(?P<name>.+)\.(?P<key>\w+))?")


def recognise(path: Path) -> str | None:
    """Why this is a distributed checkpoint of torch, or None."""
    return METADATA if (path / METADATA).is_file() else None


def open_checkpoint(path: Path, *, model_config: Mapping[str, Any] | None = None) -> Opened:
    """Raises CheckpointError for what is missing, refused or damaged."""
    items = Items(path)
    ours = _ours(items)
    names = {
        key: held for key, held in _names(items.tensors, ours["buffers"]).items() if held[0] not in ours["aliases"]
    }
    arrays = [items.array(key, name, role) for key, (name, role) in names.items()]
    rules = [Rule(name, json.dumps(name)) for name in {name: None for name, _ in names.values()}]
    layout, _, _ = compile_reading(rules, arrays, variables={})
    source = items.source(layout)
    counts = {name: int(_scalar(source, layout.tensors[name, role])) for name, role in names.values() if role == "step"}
    for name in counts:
        del layout.tensors[name, "step"], layout.fragments[name, "step"]
    groups, more, unknown = _groups(items)
    counts |= more
    optimizer = {
        "name": optimizer_of({role for _, role in layout.tensors}), "groups": groups, "steps": counts,
        **ours["optimizer"],
    } if counts or groups else {}  # fmt: skip
    metadata = {
        "step": max(counts.values(), default=0), "model_config": {}, **ours["metadata"], "aliases": ours["aliases"],
        "optimizer": optimizer,
    }  # fmt: skip
    metadata["model_config"] = metadata["model_config"] or dict(model_config or {})
    lowered = _lowered(layout, ours["lowered"])
    return Opened(
        NAME, f"{METADATA}: {len(items.tensors)} tensors", path, Cast(source, lowered) if lowered else source, metadata, unknown
    )  # fmt: skip


def _ours(items: Items) -> dict[str, Any]:
    """What a checkpoint says that we wrote, and nothing for any other."""
    held: dict[str, Any] = {"aliases": {}, "lowered": {}, "buffers": [], "metadata": {}, "optimizer": {}}
    if OURS not in items.objects:
        return held
    items.objects.remove(OURS)
    return {**held, **strict_json(str(items.value(OURS)).encode(), f"{METADATA}: {OURS}")}


def _lowered(layout: Layout, dtypes: Mapping[str, str]) -> dict[LogicalTensor, LogicalTensor]:
    """Where a model in low precision was written by its masters: they are that, and the parameters their rounding."""
    shown = {}
    for name, dtype in dtypes.items():
        stored = layout.tensors.pop((name, "parameter"))
        master = replace(stored, role="master")
        layout.add(master, *layout.fragments.pop(stored.key))
        shown[replace(stored, dtype=dtype)] = master
    return shown


def _names(keys: Collection[str], buffers: Collection[str]) -> dict[str, tuple[str, str]]:
    """Entry to (logical name, role)."""
    found: dict[str, tuple[str, str]] = {}
    rest = []
    for key in keys:
        state = STATE.fullmatch(key)
        if state is not None:
            found[key] = state["name"], state["role"]
        else:
            rest.append(key)
    trained = {name for name, _ in found.values()}
    first = {key.partition(".")[0] for key in rest}
    common = f"{next(iter(first))}." if len(first) == 1 and all("." in key for key in rest) else ""
    if common and trained and all(name in set(rest) for name in trained):
        common = ""
    short = {key: key.removeprefix(common) for key in rest}
    return found | {key: (name, "buffer" if name in buffers else "parameter") for key, name in short.items()}


def _groups(items: Items) -> tuple[list[dict[str, Any]], dict[str, int], list[str]]:
    """Groups of parameters with equal settings, steps that are numbers, and the objects that are neither."""
    settings: dict[str, dict[str, Any]] = defaultdict(dict)
    steps: dict[str, int] = {}
    unknown = []
    for key in items.objects:
        setting, state = SETTINGS.fullmatch(key), STATE.fullmatch(key)
        if setting is not None and setting["name"] is not None:
            settings[setting["name"]][setting["key"]] = items.value(key)
        elif state is not None and state["role"] == "step":
            steps[state["name"]] = int(items.value(key))
        else:
            unknown.append(key)
    return by_settings(settings), steps, unknown


def _scalar(source: FileSource, tensor: LogicalTensor) -> float:
    return float(torch.from_numpy(read_whole(source, tensor)).view(getattr(torch, tensor.dtype))[0])
