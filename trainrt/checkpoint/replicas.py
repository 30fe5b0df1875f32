"""Replicated state: what several ranks hold must be the same, and who differs is named."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from trainrt.checkpoint.formats.opened import Opened
from trainrt.errors import CheckpointError
from trainrt.parallel.layout import Fragment, Key, LogicalTensor, contiguous_strides, flat_range


class Replicas:
    """Which tensors are held more than once, and the comparison of what is held.

    With `average` the mean of the replicas is taken where they differ (in float32).
    """

    def __init__(self, opened: Opened, *, average: bool) -> None:
        self._opened, self._average = opened, average
        self._several: set[Key] = {
            tensor.key
            for tensor, fragments in opened.source.layout
            if sum(fragment.box.elements for fragment in fragments) > tensor.bytes // tensor.item_bytes
        }

    def checked(self, tensor: LogicalTensor, start: int, stop: int, data: np.ndarray) -> np.ndarray:
        """The elements [start, stop) as gathered, compared with all who hold them. Raises CheckpointError where they differ."""
        if tensor.key not in self._several:
            return data
        source = self._opened.source
        flat = data.view(f"u{tensor.item_bytes}")
        copies: list[tuple[Fragment, np.ndarray, np.ndarray]] = []
        for box, at in flat_range(tensor.shape, start, stop):
            mine = Fragment(-1, box, "gathered", contiguous_strides(box.length), at)
            for fragment in source.layout.fragments[tensor.key]:
                common = box.intersect(fragment.box)
                if common is not None:
                    held = source.read(tensor, fragment.narrow(common))
                    copies.append((fragment, mine.narrow(common).view(flat.view(np.uint8), tensor.item_bytes), held))
        differing = [fragment for fragment, gathered, held in copies if not np.array_equal(gathered, held)]
        if not differing:
            return data
        if not self._average:
            raise CheckpointError(self._message(tensor, differing))
        return self._mean(tensor, data, copies)

    def _message(self, tensor: LogicalTensor, differing: list[Fragment]) -> str:
        ranks = sorted({self._name(fragment.rank) for fragment in differing})
        return (
            f"{self._opened.path}: {tensor.name} ({tensor.role}) is replicated and differs: {', '.join(ranks)} hold other "
            "values; --average takes the mean"
        )

    def _name(self, rank: int) -> str:
        at: Any = self._opened.coordinates.get(rank, {})
        return " ".join(f"{axis} {index}" for axis, index in at.items()) or f"rank {rank}"

    @staticmethod
    def _mean(
        tensor: LogicalTensor, data: np.ndarray, copies: list[tuple[Fragment, np.ndarray, np.ndarray]]
    ) -> np.ndarray:
        dtype = getattr(torch, tensor.dtype)
        sums = torch.zeros(data.size // tensor.item_bytes, dtype=torch.float64)
        counts = torch.zeros_like(sums)
        origin = data.__array_interface__["data"][0]
        for _, gathered, held in copies:
            at = (gathered.__array_interface__["data"][0] - origin) // tensor.item_bytes
            strides = tuple(step // tensor.item_bytes for step in gathered.strides)
            values = torch.from_numpy(np.ascontiguousarray(held).view(np.uint8).reshape(-1)).view(dtype).double()
            sums.as_strided(held.shape, strides, at).add_(values.view(held.shape))
            counts.as_strided(held.shape, strides, at).add_(1)
        return (sums / counts).float().to(dtype).view(torch.uint8).numpy()
