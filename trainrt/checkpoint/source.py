"""Where the bytes of a layout come from, and the execution of a reshard.

A `Source` is a layout whose fragments can be read: plain memory, a generation in the stores, a
checkpoint on disk. `fill` runs `copies(source, target)`; everything that moves state uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Protocol

import numpy as np
import xxhash

from trainrt.parallel.layout import Box, Copy, Fragment, Key, Layout, LogicalTensor, contiguous_strides, copies


class Source(Protocol):
    """A layout with bytes behind it."""

    layout: Layout

    def read(self, tensor: LogicalTensor, fragment: Fragment) -> np.ndarray:
        """The elements of a (narrowed) fragment, as unsigned integers, of shape `fragment.box.length`.

        Always checked against their checksum first, where the source keeps one.
        """
        ...


class MemorySource:
    """Plain arrays: (rank, storage) to flat uint8 bytes."""

    def __init__(self, layout: Layout, storages: Mapping[tuple[int, str], np.ndarray]) -> None:
        self.layout, self._storages = layout, storages

    def read(self, tensor: LogicalTensor, fragment: Fragment) -> np.ndarray:
        return fragment.view(self._storages[fragment.rank, fragment.storage], tensor.item_bytes)


def fill(
    target: Layout,
    storages: Mapping[tuple[int, str], np.ndarray],
    source: Source,
    *,
    cost: Callable[[Fragment, Fragment], float] | None = None,
) -> int:
    """Fill the target's storages from the source; every element is written once. Returns the bytes copied.

    Raises LayoutError where the source does not hold what the target wants.
    """
    return _carry_out(copies(source.layout, target, cost=cost), storages, source)


def _carry_out(orders: list[Copy], storages: Mapping[tuple[int, str], np.ndarray], source: Source) -> int:
    copied = 0
    for copy in orders:
        view = copy.target.view(storages[copy.target.rank, copy.target.storage], copy.tensor.item_bytes)
        view[...] = source.read(copy.tensor, copy.source)
        copied += copy.bytes
    return copied


def gathered(wanted: Layout, length: int, source: Source) -> np.ndarray:
    """The bytes of the one storage that a layout speaks of, zeros where nothing lies: flat uint8, not to be written to.

    Where the source holds all of it in one piece, just so, it is a view of that.
    """
    orders = copies(source.layout, wanted)
    if len(orders) == 1 and orders[0].bytes == length:
        held = source.read(orders[0].tensor, orders[0].source)
        if held.flags.c_contiguous:
            return held.reshape(-1).view(np.uint8)
    storage = np.zeros(length, np.uint8)
    _carry_out(orders, {(copy.target.rank, copy.target.storage): storage for copy in orders}, source)
    return storage


def whole_fragment(tensor: LogicalTensor) -> Fragment:
    """The tensor in one piece, C-ordered, in a storage of its own."""
    return Fragment(0, Box.whole(tensor.shape), "whole", contiguous_strides(tensor.shape))


def read_whole(source: Source, tensor: LogicalTensor) -> np.ndarray:
    """A logical tensor in one piece: flat uint8, C order, whatever the layout it lies in."""
    target = Layout()
    target.add(tensor, whole_fragment(tensor))
    storage = np.empty(tensor.bytes, np.uint8)
    fill(target, {(0, "whole"): storage}, source)
    return storage


def digest(source: Source, *, roles: Collection[str] | None = None) -> dict[Key, str]:
    """xxh3-128 of each logical tensor's bytes (C order, little-endian): equal over formats and topologies."""
    return {
        key: xxhash.xxh3_128_hexdigest(read_whole(source, tensor))
        for key, tensor in source.layout.tensors.items()
        if roles is None or tensor.role in roles
    }
