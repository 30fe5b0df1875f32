"""A checkpoint of any format, opened: where its logical tensors lie, and what else is known of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainrt.checkpoint.mapping.expression import Coordinate
from trainrt.checkpoint.source import Source
from trainrt.parallel.layout import Fragment, Key, Layout, LogicalTensor


@dataclass(slots=True)
class Opened:
    """`why` it was taken for this format; `metadata` as in a manifest; `unknown`: what is in the files and was not understood."""

    format: str
    why: str
    path: Path
    source: Source
    metadata: dict[str, Any] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    coordinates: Mapping[int, Coordinate] = field(default_factory=dict)

    @property
    def step(self) -> int:
        return int(self.metadata.get("step", 0))


class Cast:
    """A source that shows some tensors in another role or dtype as well.

    Parameters where only their masters are stored, masters of a model that has none.
    """

    def __init__(self, source: Source, shown: Mapping[LogicalTensor, LogicalTensor]) -> None:
        """`shown`: a tensor to the one it is made of."""
        self._source, self._origin = source, {tensor.key: origin for tensor, origin in shown.items()}
        self.layout = Layout()
        self.layout.merge(source.layout)
        for tensor, origin in shown.items():
            self.layout.add(tensor, *source.layout.fragments[origin.key])

    def read(self, tensor: LogicalTensor, fragment: Fragment) -> np.ndarray:
        origin = self._origin.get(tensor.key)
        if origin is None:
            return self._source.read(tensor, fragment)
        held = self._source.read(origin, fragment).copy()
        values = torch.from_numpy(held.view(np.uint8).reshape(-1)).view(getattr(torch, origin.dtype))
        cast = values.to(getattr(torch, tensor.dtype)).view(torch.uint8).numpy()
        return cast.view(f"u{tensor.item_bytes}").reshape(fragment.box.length)

    def release(self) -> None:
        release(self._source)


class Without:
    """A source that does not show some tensors."""

    def __init__(self, source: Source, hidden: Collection[Key]) -> None:
        self._source = source
        self.layout = source.layout.only(lambda tensor, _: tensor.key not in hidden)

    def read(self, tensor: LogicalTensor, fragment: Fragment) -> np.ndarray:
        return self._source.read(tensor, fragment)

    def release(self) -> None:
        release(self._source)


def release(source: Source) -> None:
    """Give back the memory of what was read, where a source keeps some."""
    give_back = getattr(source, "release", None)
    if give_back is not None:
        give_back()


def by_settings(settings: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Parameters with equal hyperparameters, as the groups of a manifest."""
    groups: list[dict[str, Any]] = []
    for name, held in settings.items():
        same = next((group for group in groups if group["hyperparameters"] == held), None)
        if same is None:
            groups.append({"tensors": [name], "hyperparameters": held})
        else:
            same["tensors"].append(name)
    return groups


def optimizer_of(roles: Collection[str]) -> str:
    """The optimizer that has these moments, where that is clear; where there are none, what models are mostly trained with."""
    moments = set(roles) - {"parameter", "master", "buffer", "step"}
    return "adamw" if moments in (set(), {"exp_avg", "exp_avg_sq"}) else ""


def plain(value: Any) -> bool:
    """Whether a value may stand in a manifest."""
    if isinstance(value, (list, tuple)):
        return all(map(plain, value))
    return value is None or isinstance(value, (bool, int, float, str))
