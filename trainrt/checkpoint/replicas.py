"""Replicated state: what several ranks hold must be the same, and who differs is named."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from trainrt.checkpoint.formats.opened import Opened
from trainrt.errors import CheckpointError
from trainrt.parallel.layout import Fragment, Key, Layout, LogicalTensor


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

    def checked(self, wanted: Layout, storage: np.ndarray) -> np.ndarray:
        """Compare what was gathered into the storage of `wanted` with all who hold it. Returns it, or with means in it.

        Raises CheckpointError where they differ.
        """
        if self._average and any(key in self._several for key in wanted.tensors):
            storage = storage.copy()
        for tensor, fragments in wanted:
            if tensor.key in self._several:
                for fragment in fragments:
                    self._check(tensor, fragment, fragment.view(storage, tensor.item_bytes))
        return storage

    def _check(self, tensor: LogicalTensor, wanted: Fragment, gathered: np.ndarray) -> None:
        copies: list[tuple[Fragment, tuple[slice, ...], np.ndarray]] = []
        for fragment in self._opened.source.layout.fragments[tensor.key]:
            common = wanted.box.intersect(fragment.box)
            if common is not None:
                where = tuple(
                    slice(a - b, a - b + n)
                    for a, b, n in zip(common.offset, wanted.box.offset, common.length, strict=True)
                )
                copies.append((fragment, where, self._opened.source.read(tensor, fragment.narrow(common))))
        differing = [fragment for fragment, where, held in copies if not np.array_equal(gathered[where], held)]
        if differing and not self._average:
            raise CheckpointError(self._message(tensor, differing))
        if differing:
            gathered[...] = _mean(tensor, gathered.shape, [(where, held) for _, where, held in copies])

    def _message(self, tensor: LogicalTensor, differing: list[Fragment]) -> str:
        ranks = sorted({self._name(fragment.rank) for fragment in differing})
        return (
            f"{self._opened.path}: {tensor.name} ({tensor.role}) is replicated and differs: {', '.join(ranks)} hold other "
            "values; --average takes the mean"
        )

    def _name(self, rank: int) -> str:
        at: Any = self._opened.coordinates.get(rank, {})
        return " ".join(f"{axis} {index}" for axis, index in at.items()) or f"rank {rank}"


def _mean(
    tensor: LogicalTensor, shape: tuple[int, ...], copies: list[tuple[tuple[slice, ...], np.ndarray]]
) -> np.ndarray:
    dtype = getattr(torch, tensor.dtype)
    sums = torch.zeros(shape, dtype=torch.float64)
    counts = torch.zeros_like(sums)
    for where, held in copies:
        values = torch.from_numpy(np.ascontiguousarray(held).view(np.uint8).reshape(-1)).view(dtype).double()
        sums[where] += values.view(held.shape)
        counts[where] += 1
    mean = (sums / counts).float().to(dtype).contiguous()
    return mean.view(-1).view(torch.uint8).numpy().view(f"u{tensor.item_bytes}").reshape(shape)
