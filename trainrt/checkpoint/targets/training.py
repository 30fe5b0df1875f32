"""What a source knows of the training: parameter groups in their order, masters, moments, steps, frozen parameters, buffers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from trainrt.checkpoint.formats.opened import Cast, Opened
from trainrt.checkpoint.live import LiveModel
from trainrt.errors import CheckpointError
from trainrt.parallel.layout import Key, LogicalTensor

LOW = ("bfloat16", "float16")
OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD, "muon": torch.optim.Muon}


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters that are trained alike, in their order; `steps`: updates so far of those that the source counts."""

    names: tuple[str, ...]
    settings: dict[str, Any]
    steps: Mapping[str, int]

    @property
    def step(self) -> int | None:
        """Of all of them, for formats that have one for a group. Raises CheckpointError where they differ."""
        found = sorted(set(self.steps.values()))
        if len(found) > 1:
            raise CheckpointError(f"parameters of one group have taken {found} steps, and the format has one for all")
        return found[0] if found else None


class Training:
    """See the module. `opened` is the source with masters for every trained parameter, where the model's dtype is low."""

    def __init__(self, opened: Opened, model: LiveModel | None) -> None:
        tensors = opened.source.layout.tensors
        self.parameters = [t for t in tensors.values() if t.role == "parameter"]
        self.buffers = [t for t in tensors.values() if t.role == "buffer"]
        self.aliases: dict[str, str] = dict(opened.metadata.get("aliases", {}))
        self.step = opened.step
        self.loss_scale: dict[str, Any] = (opened.metadata.get("optimizer") or {}).get("loss_scale", {})
        held = {tensor.name for tensor in self.parameters}
        self.moments = sorted({role for name, role in tensors if role not in ("parameter", "master", "buffer")})
        self.groups = self._groups(opened, held, model)
        trained = {name for group in self.groups for name in group.names}
        self.frozen = [tensor for tensor in self.parameters if tensor.name not in trained]
        dtypes = {t.dtype for t in self.parameters if t.name in trained} & set(LOW)
        self.low = min(dtypes) if dtypes else None
        self.opened = self._with_masters(opened, trained) if self.low else opened
        self.tensors: dict[Key, LogicalTensor] = self.opened.source.layout.tensors

    @property
    def master(self) -> str:
        """The role that has a trained parameter in full precision."""
        return "master" if self.low else "parameter"

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name, "parameter"].shape

    def _groups(self, opened: Opened, held: set[str], model: LiveModel | None) -> list[Group]:
        optimizer = opened.metadata.get("optimizer") or {}
        steps: dict[str, int] = optimizer.get("steps", {})
        moved = {name for name, role in opened.source.layout.tensors if role in self.moments}
        document = [g for g in optimizer.get("groups", []) if held & set(g["tensors"])]
        if not document:
            trained = [t.name for t in self.parameters if not moved or t.name in moved]
            order = {name: number for number, name in enumerate(model.order if model is not None else ())}
            trained.sort(key=lambda name: order.get(name, len(order)))
            document = [{"tensors": trained, "hyperparameters": {}}]
        mastered = {name for name, role in opened.source.layout.tensors if role == "master"}
        # Where others have masters, what has neither that nor moments is frozen, whatever a format's groups say.
        frozen = held - mastered - moved if mastered else set()
        settings = _defaults(optimizer.get("name", "adamw"))
        groups = []
        for entry in document:
            names = tuple(n for n in entry["tensors"] if n in held and n not in self.aliases and n not in frozen)
            found = {name: steps[name] for name in names if name in steps and name in moved}
            groups.append(Group(names, {**settings, **_tuples(entry["hyperparameters"])}, found))
        return groups

    def _with_masters(self, opened: Opened, trained: set[str]) -> Opened:
        tensors = opened.source.layout.tensors
        lacking = [t for t in self.parameters if t.name in trained and (t.name, "master") not in tensors]
        shown = {replace(tensor, role="master", dtype="float32"): tensor for tensor in lacking}
        return replace(opened, source=Cast(opened.source, shown)) if shown else opened


def _defaults(name: str) -> dict[str, Any]:
    """What torch's optimizer of that name has in a group, where a source does not say it."""
    if name not in OPTIMIZERS:
        return {}
    (group,) = OPTIMIZERS[name]([torch.nn.Parameter(torch.empty(1, 1))]).param_groups
    return {key: value for key, value in group.items() if key != "params"}


def _tuples(settings: dict[str, Any]) -> dict[str, Any]:
    """Plain data turns tuples (betas) into lists; torch compares and unpacks either, and saves tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
