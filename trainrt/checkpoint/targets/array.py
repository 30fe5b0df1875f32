"""An array of a file that is to be written: of which boxes of which logical tensors it is made."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from trainrt.checkpoint.mapping.expression import Patch, Shape
from trainrt.parallel.layout import ITEM_BYTES, Fragment, Layout, LogicalTensor, contiguous_strides, flat_range

UNIT = "unit"
"""The storage of a unit's bytes, while it is gathered."""


@dataclass(frozen=True, slots=True, eq=False)
class TargetArray:
    """C-ordered, of `shape` and `dtype`; what no piece covers is zeros (padding)."""

    name: str
    role: str
    dtype: str
    shape: Shape
    pieces: tuple[tuple[Patch, LogicalTensor], ...]

    @classmethod
    def whole(cls, tensor: LogicalTensor) -> TargetArray:
        """A logical tensor as it is."""
        return cls(
            tensor.name, tensor.role, tensor.dtype, tensor.shape, ((Patch.whole(tensor.name, tensor.shape), tensor),)
        )

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * ITEM_BYTES[self.dtype]

    def shortened(self, elements: int) -> TargetArray:
        """A flat array without what lies behind its first elements, which is padding."""
        return TargetArray(self.name, self.role, self.dtype, (elements,), self.pieces)

    def layout(self, start: int, stop: int) -> Layout:
        """What lies in the elements [start, stop) of its C order, as they stand in a storage of their own."""
        layout = Layout()
        for tensor, fragment in self._fragments(start, stop):
            layout.add(tensor, fragment)
        return layout

    def _fragments(self, start: int, stop: int) -> Iterator[tuple[LogicalTensor, Fragment]]:
        for box, at in flat_range(self.shape, start, stop):
            strides = contiguous_strides(box.length)
            for patch, tensor in self.pieces:
                for piece in patch.inside(box):
                    first = at + sum(o * s for o, s in zip(piece.offset, strides, strict=True))
                    steps = piece.steps if piece.steps is not None else (1,) * len(piece.axes)
                    along = tuple(strides[axis] * step for axis, step in zip(piece.axes, steps, strict=True))
                    yield tensor, Fragment(-1, piece.box, UNIT, along, first)
