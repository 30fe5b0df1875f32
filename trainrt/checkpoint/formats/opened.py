"""A checkpoint of any format, opened: where its logical tensors lie, and what else is known of it."""

from __future__ import annotations

from collections.abc import Mapping
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


class Rounded:
    """A source that shows some tensors in a lower precision besides: parameters, where only their masters are stored."""

    def __init__(self, source: Source, derived: Mapping[Key, LogicalTensor], dtype: str) -> None:
        self._source, self._derived, self._dtype = source, dict(derived), getattr(torch, dtype)
        self.layout = Layout()
        self.layout.merge(source.layout)
        for (name, role), master in self._derived.items():
            self.layout.add(LogicalTensor(name, role, dtype, master.shape), *source.layout.fragments[master.key])

    def read(self, tensor: LogicalTensor, fragment: Fragment) -> np.ndarray:
        master = self._derived.get(tensor.key)
        if master is None:
            return self._source.read(tensor, fragment)
        exact = self._source.read(master, fragment).view(np.float32)
        rounded = torch.from_numpy(exact.copy()).to(self._dtype)
        return rounded.view(torch.int16).numpy().view(np.uint16).reshape(exact.shape)

    def release(self) -> None:
        release(self._source)


def release(source: Source) -> None:
    """Give back the memory of what was read, where a source keeps some."""
    give_back = getattr(source, "release", None)
    if give_back is not None:
        give_back()
