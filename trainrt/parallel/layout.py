"""Layout: which box of which logical tensor lies where. The one notion of "which rank holds what".

A *logical tensor* has a name, a role, a shape and a dtype. A *fragment* says that one box of it is
held by one rank, as a strided view of a flat storage: element `i` of the box lies at
`start + sum(i * strides)` of the storage, counted in elements. That one form is enough for a plain
shard (the local tensor's strides), a transposed one (strides swapped), an expert of a stacked
tensor (a start), a piece of a fused QKV, a slice of a flattened partition, or a range of a file.

`copies(source, target)` is the reshard: which box goes from which fragment to which. It is executed
on files, on shared memory, or over the network by whoever owns those; this module knows only
numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from trainrt.errors import LayoutError

ITEM_BYTES = {
    "float64": 8, "float32": 4, "bfloat16": 2, "float16": 2,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip

Key = tuple[str, str]
"""(name, role) of a logical tensor."""


@dataclass(frozen=True, slots=True)
class Box:
    """An n-dimensional range: `offset[d] <= index[d] < offset[d] + length[d]`."""

    offset: tuple[int, ...]
    length: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Iterable[int]) -> Box:
        shape = tuple(shape)
        return cls((0,) * len(shape), shape)

    @property
    def elements(self) -> int:
        return math.prod(self.length)

    def intersect(self, other: Box) -> Box | None:
        """The common part, or None where it is empty."""
        offset, length = [], []
        for a, n, b, m in zip(self.offset, self.length, other.offset, other.length, strict=True):
            low, high = max(a, b), min(a + n, b + m)
            if low >= high:
                return None
            offset.append(low)
            length.append(high - low)
        return Box(tuple(offset), tuple(length))

    def minus(self, hole: Box) -> list[Box]:
        """This box without `hole` (which lies inside it), as at most 2 * ndim disjoint boxes."""
        rest, offset, length = [], list(self.offset), list(self.length)
        for d in range(len(offset)):
            before = hole.offset[d] - offset[d]
            after = offset[d] + length[d] - hole.offset[d] - hole.length[d]
            if before:
                rest.append(Box(tuple(offset), (*length[:d], before, *length[d + 1 :])))
            if after:
                start = hole.offset[d] + hole.length[d]
                rest.append(Box((*offset[:d], start, *offset[d + 1 :]), (*length[:d], after, *length[d + 1 :])))
            offset[d], length[d] = hole.offset[d], hole.length[d]
        return rest


@dataclass(frozen=True, slots=True)
class LogicalTensor:
    """A tensor as the user knows it, whole. Role: parameter, master, buffer, or an optimizer's name."""

    name: str
    role: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def key(self) -> Key:
        return self.name, self.role

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.item_bytes


@dataclass(frozen=True, slots=True)
class Fragment:
    """A box of a logical tensor, held by `rank` as a strided view (in elements) of `storage`.

    `start` counts elements of the tensor's dtype from byte `base` of the storage.
    """

    rank: int
    box: Box
    storage: str
    strides: tuple[int, ...]
    start: int = 0
    base: int = 0

    def narrow(self, box: Box) -> Fragment:
        """The view of a box inside this one."""
        moved = sum((a - b) * s for a, b, s in zip(box.offset, self.box.offset, self.strides, strict=True))
        return replace(self, box=box, start=self.start + moved)

    def view(self, storage: np.ndarray, item_bytes: int) -> np.ndarray:
        """The elements of the box in a flat uint8 `storage`, as unsigned integers of their width."""
        unsigned = np.dtype(f"u{item_bytes}")
        first = self.base + self.start * item_bytes
        last = first + sum((n - 1) * s for n, s in zip(self.box.length, self.strides, strict=True)) * item_bytes
        if self.box.elements and (first < 0 or last + item_bytes > storage.nbytes):
            raise LayoutError(f"{self} reaches outside of its storage of {storage.nbytes} bytes")
        strides = tuple(s * item_bytes for s in self.strides)
        return np.ndarray(self.box.length, unsigned, storage, offset=first, strides=strides)


@dataclass(frozen=True, slots=True)
class Copy:
    """One box of one tensor, from a fragment of the source to a fragment of the target."""

    tensor: LogicalTensor
    box: Box
    source: Fragment
    target: Fragment

    @property
    def bytes(self) -> int:
        return self.box.elements * self.tensor.item_bytes


class Layout:
    """The tensors and, for each, its fragments over all ranks."""

    def __init__(self) -> None:
        self.tensors: dict[Key, LogicalTensor] = {}
        self.fragments: dict[Key, list[Fragment]] = {}

    def add(self, tensor: LogicalTensor, *fragments: Fragment) -> None:
        """Add fragments of a tensor. Raises LayoutError where it is already known in another form."""
        known = self.tensors.setdefault(tensor.key, tensor)
        if known != tensor:
            raise LayoutError(
                f"{tensor.name} ({tensor.role}): {known.dtype} {known.shape} and {tensor.dtype} {tensor.shape}"
            )
        self.fragments.setdefault(tensor.key, []).extend(fragments)

    def merge(self, other: Layout) -> None:
        """Take over the fragments of another layout of the same tensors (another rank's part)."""
        for key, tensor in other.tensors.items():
            self.add(tensor, *other.fragments[key])

    def __iter__(self) -> Iterator[tuple[LogicalTensor, list[Fragment]]]:
        return ((tensor, self.fragments[key]) for key, tensor in self.tensors.items())

    def only(self, keep: Callable[[LogicalTensor, Fragment], bool]) -> Layout:
        """The part whose fragments pass `keep`; tensors without fragments are left out."""
        part = Layout()
        for tensor, fragments in self:
            kept = [fragment for fragment in fragments if keep(tensor, fragment)]
            if kept:
                part.add(tensor, *kept)
        return part

    def of_rank(self, rank: int) -> Layout:
        return self.only(lambda _, fragment: fragment.rank == rank)

    def to_json(self) -> list[dict[str, Any]]:
        """Plain data for a message or a file."""
        return [
            {
                "name": tensor.name, "role": tensor.role, "dtype": tensor.dtype, "shape": list(tensor.shape),
                "fragments": [
                    [f.rank, list(f.box.offset), list(f.box.length), f.storage, list(f.strides), f.start, f.base]
                    for f in fragments
                ],
            }
            for tensor, fragments in self
        ]  # fmt: skip

    @classmethod
    def from_json(cls, document: list[dict[str, Any]]) -> Layout:
        layout = cls()
        for entry in document:
            tensor = LogicalTensor(entry["name"], entry["role"], entry["dtype"], tuple(entry["shape"]))
            layout.add(
                tensor,
                *(
                    Fragment(rank, Box(tuple(offset), tuple(length)), storage, tuple(strides), start, base)
                    for rank, offset, length, storage, strides, start, base in entry["fragments"]
                ),
            )
        return layout


def contiguous_strides(shape: Iterable[int]) -> tuple[int, ...]:
    """Strides in elements of a C-ordered array of this shape."""
    strides, step = [], 1
    for n in reversed(tuple(shape)):
        strides.append(step)
        step *= max(n, 1)
    return tuple(reversed(strides))


def flat_range(shape: tuple[int, ...], start: int, stop: int) -> list[tuple[Box, int]]:
    """The elements [start, stop) of a C-ordered tensor as at most 2 * ndim - 1 boxes.

    Each comes with its offset from `start`: a slice of a flattened partition (ZeRO) in boxes.
    """
    if not shape:
        return [(Box((), ()), 0)] if start < stop else []
    inner = math.prod(shape[1:])
    boxes: list[tuple[Box, int]] = []
    position = start
    while position < stop:
        row, within = divmod(position, inner)
        rows = (stop - position) // inner
        if within == 0 and rows:
            boxes.append((Box((row,) + (0,) * (len(shape) - 1), (rows, *shape[1:])), position - start))
            position += rows * inner
            continue
        end = min(stop, (row + 1) * inner)
        for box, at in flat_range(shape[1:], within, within + end - position):
            boxes.append((Box((row, *box.offset), (1, *box.length)), position - start + at))
        position = end
    return boxes


def copies(source: Layout, target: Layout, *, cost: Callable[[Fragment, Fragment], float] | None = None) -> list[Copy]:
    """The reshard: copies that fill every fragment of `target` from `source`, each element once.

    Of several source fragments that hold an element (replicas) the cheapest by `cost` is read; by
    default one's own rank first, then spread over the replicas. Raises LayoutError where a tensor
    differs in shape or dtype, or an element is held nowhere.
    """
    plan: list[Copy] = []
    for tensor, wanted in target:
        held = source.tensors.get(tensor.key)
        if held is None:
            raise LayoutError(f"{tensor.name} ({tensor.role}) is not in the source")
        if held != tensor:
            raise LayoutError(
                f"{tensor.name} ({tensor.role}): the source has {held.dtype} {held.shape}, "
                f"the target wants {tensor.dtype} {tensor.shape}"
            )
        for fragment in wanted:
            plan.extend(_fill(tensor, fragment, source.fragments[tensor.key], cost or _own_rank_first))
    return plan


def _own_rank_first(source: Fragment, target: Fragment) -> float:
    return 0 if source.rank == target.rank else 1 + (source.rank - target.rank) % 65536


def _fill(
    tensor: LogicalTensor, target: Fragment, held: list[Fragment], cost: Callable[[Fragment, Fragment], float]
) -> Iterator[Copy]:
    missing = [target.box] if target.box.elements else []
    touching = [fragment for fragment in held if missing and fragment.box.intersect(target.box)]
    for fragment in sorted(touching, key=lambda fragment: cost(fragment, target)):
        left: list[Box] = []
        for box in missing:
            common = box.intersect(fragment.box)
            if common is None:
                left.append(box)
                continue
            yield Copy(tensor, common, fragment.narrow(common), target.narrow(common))
            left.extend(box.minus(common))
        missing = left
        if not missing:
            return
    if missing:
        box = missing[0]
        raise LayoutError(f"{tensor.name} ({tensor.role}): nobody holds the box at {box.offset} of length {box.length}")
