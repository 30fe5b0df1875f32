"""What an array of a framework is made of: expressions over logical tensors, and their compilation to boxes.

An expression says of one stored array which logical tensors lie in it, and how:

    "w"                                   the logical tensor itself
    shard("w", dim=0, axis="tp")          one of the pieces along a dimension, one for each index of a mesh axis
    concat("gate", "up", dim=0)           one after the other
    interleave("q", "k", "v", groups=g)   cut into g groups each, group by group (QKV by head, or by group of heads)
    stack("experts.{e}.w", over="e")      one for each value of a placeholder, along a new dimension
    transpose("w")                        dimensions in another order
    pad("w", length=v, multiple=n)        filled up with zeros
    partition("a", "b", axis="dp")        flattened, joined, and cut into equal ranges (ZeRO)

Nothing is added or averaged in it, so an expression is exact in both directions. Read from what is stored, shapes go down
(`resolve`): the stored arrays' shapes give the logical ones. Then boxes come up (`patches`): which box of which logical tensor
lies where in the array of one coordinate.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from trainrt.errors import LayoutError
from trainrt.parallel.layout import Box, contiguous_strides, flat_range

Shape = tuple[int, ...]
Coordinate = Mapping[str, int]
"""Index on each mesh axis."""
Pieces = dict[tuple[tuple[str, int], ...], Shape]
"""Shape of an array at each (frozen) coordinate."""


def frozen(at: Coordinate) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(at.items()))


@dataclass(frozen=True, slots=True)
class Patch:
    """A box of a logical tensor in an array: at which `offset`, and along which of its dimensions (`axes`) its own run."""

    name: str
    box: Box
    offset: Shape
    axes: tuple[int, ...]
    steps: Shape | None = None
    """In a flat array: how far apart, in elements, neighbours along each of the box's dimensions lie."""

    @classmethod
    def whole(cls, name: str, shape: Shape) -> Patch:
        """A logical tensor as an array of its own."""
        return cls(name, Box.whole(shape), (0,) * len(shape), tuple(range(len(shape))))

    def shifted(self, dim: int, by: int) -> Patch:
        moved = list(self.offset)
        moved[dim] += by
        return replace(self, offset=tuple(moved))

    def cut(self, dim: int, start: int, length: int) -> Patch | None:
        """The part inside [start, start + length) of one dimension of the array, seen from `start`; None where there is none."""
        if self.steps is not None:
            raise LayoutError(f"{self.name}: what is flat cannot be cut again")
        at = self.offset[dim]
        if dim not in self.axes:
            return self.shifted(dim, -start) if start <= at < start + length else None
        along = self.axes.index(dim)
        low, high = max(at, start), min(at + self.box.length[along], start + length)
        if low >= high:
            return None
        offset, lengths = list(self.box.offset), list(self.box.length)
        offset[along] += low - at
        lengths[along] = high - low
        return replace(self, box=Box(tuple(offset), tuple(lengths))).shifted(dim, low - start - at)

    def inside(self, box: Box) -> Iterator[Patch]:
        """The parts inside a box of the array, seen from the box's first corner."""
        if self.steps is not None:
            yield from self._between(box.offset[0], box.offset[0] + box.length[0])
            return
        piece: Patch | None = self
        for dim, (start, length) in enumerate(zip(box.offset, box.length, strict=True)):
            piece = piece.cut(dim, start, length) if piece is not None else None
        if piece is not None:
            yield piece

    def _between(self, start: int, stop: int) -> Iterator[Patch]:
        """Of a flat array, the parts inside [start, stop), seen from `start`. By their steps its dimensions are nested."""
        assert self.steps is not None
        at = self.offset[0]
        extent = 1 + sum((n - 1) * step for n, step in zip(self.box.length, self.steps, strict=True))
        if start <= at and at + extent <= stop:
            yield self.shifted(0, -start)
        elif at < stop and start < at + extent:
            # The outermost dimension is cut in what lies wholly inside, and what is cut further.
            along = max((d for d, n in enumerate(self.box.length) if n > 1), key=lambda d: self.steps[d])  # type: ignore[index]
            step, count = self.steps[along], self.box.length[along]
            inner = extent - (count - 1) * step
            first = min(count, max(0, -(-(start - at) // step)))
            last = max(first, min(count, (stop - at - inner) // step + 1))
            for low, high in {(first - 1, first), (first, last), (last, last + 1)}:
                low, high = max(low, 0), min(high, count)
                if low < high:
                    yield from self._slice(along, low, high)._between(start, stop)

    def _slice(self, along: int, low: int, high: int) -> Patch:
        assert self.steps is not None
        offset, lengths = list(self.box.offset), list(self.box.length)
        offset[along] += low
        lengths[along] = high - low
        return replace(self, box=Box(tuple(offset), tuple(lengths))).shifted(0, low * self.steps[along])


class Shapes:
    """Shapes of logical tensors and lengths of shards, as they become known."""

    def __init__(self, tensors: Mapping[str, Shape] | None = None, axes: Mapping[str, int] | None = None) -> None:
        self.tensors: dict[str, Shape] = dict(tensors or {})
        self.axes = dict(axes or {})
        self.lengths: dict[tuple[int, tuple[tuple[str, int], ...]], list[int]] = {}

    def tensor(self, name: str, shape: Shape) -> None:
        """Note a logical tensor's shape. Raises LayoutError where another one was found before."""
        known = self.tensors.setdefault(name, shape)
        if known != shape:
            raise LayoutError(f"{name}: of shape {known} in one place, and {shape} in another")


class Expression(Protocol):
    """What an array is made of."""

    def resolve(self, pieces: Pieces, found: Shapes) -> None:
        """Downwards: learn from the array's shapes, at all coordinates, those of the logical tensors."""
        ...

    def shape(self, known: Shapes, at: Coordinate) -> Shape:
        """Upwards: the array's shape at a coordinate."""
        ...

    def patches(self, known: Shapes, at: Coordinate) -> Iterator[Patch]:
        """What lies where in the array of a coordinate."""
        ...


@dataclass(frozen=True)
class Tensor:
    """A logical tensor as it is."""

    name: str

    def resolve(self, pieces: Pieces, found: Shapes) -> None:
        for shape in pieces.values():
            found.tensor(self.name, shape)

    def shape(self, known: Shapes, at: Coordinate) -> Shape:
        return known.tensors[self.name]

    def patches(self, known: Shapes, at: Coordinate) -> Iterator[Patch]:
        yield Patch.whole(self.name, known.tensors[self.name])


Split = Literal["chunk", "even"]


def split_lengths(length: int, count: int, split: Split) -> list[int]:
    """How a dimension is cut: 10 by 4 is 3, 3, 3, 1 in torch.chunk's way, 3, 3, 2, 2 with the remainder spread evenly."""
    if split == "chunk":
        size = -(-length // count)
        return [max(0, min(size, length - index * size)) for index in range(count)]
    return [length // count + (index < length % count) for index in range(count)]


@dataclass(frozen=True)
class Shard:
    """One piece along `dim` for each index of `axis`; `repeat` neighbours hold the same (fewer KV heads than ranks)."""

    child: Expression
    axis: str
    dim: int = 0
    split: Split = "chunk"
    repeat: int = 1

    def resolve(self, pieces: Pieces, found: Shapes) -> None:
        joined: dict[tuple[tuple[str, int], ...], dict[int, Shape]] = {}
        for place, shape in pieces.items():
            at = dict(place)
            if self.axis not in at:
                raise LayoutError(f"shard over {self.axis!r}: the files have the axes {sorted(at)}")
            index = at.pop(self.axis)
            joined.setdefault(frozen(at), {})[index] = shape
        whole: Pieces = {}
        for place, parts in joined.items():
            missing = set(range(max(parts))) - set(parts)
            if missing:
                raise LayoutError(f"shard over {self.axis!r}: nothing is stored at {self.axis} {min(missing)}")
            lengths = [parts[index][self.dim] for index in sorted(parts)][:: self.repeat]
            found.lengths[id(self), place] = lengths
            first = parts[min(parts)]
            whole[place] = (*first[: self.dim], sum(lengths), *first[self.dim + 1 :])
        self.child.resolve(whole, found)

    def _lengths(self, known: Shapes, at: Coordinate, length: int) -> list[int]:
        rest = frozen({axis: index for axis, index in at.items() if axis != self.axis})
        return known.lengths.get((id(self), rest)) or split_lengths(
            length, known.axes[self.axis] // self.repeat, self.split
        )

    def shape(self, known: Shapes, at: Coordinate) -> Shape:
        whole = self.child.shape(known, at)
        length = self._lengths(known, at, whole[self.dim])[at[self.axis] // self.repeat]
        return (*whole[: self.dim], length, *whole[self.dim + 1 :])

    def patches(self, known: Shapes, at: Coordinate) -> Iterator[Patch]:
        lengths = self._lengths(known, at, self.child.shape(known, at)[self.dim])
        index = at[self.axis] // self.repeat
        for patch in self.child.patches(known, at):
            piece = patch.cut(self.dim, sum(lengths[:index]), lengths[index])
            if piece is not None:
                yield piece


def shares(length: int, sizes: Sequence[int], what: str) -> list[int]:
    """A length cut in proportion to `sizes`. Raises LayoutError where that does not come out even."""
    unit, rest = divmod(length, sum(sizes)) if any(sizes) else (0, length)
    if rest:
        raise LayoutError(f"{what}: {length} cannot be cut in the proportion {':'.join(map(str, sizes))}")
    return [unit * size for size in sizes]


@dataclass(frozen=True)
class Interleave:
    """Arrays along `dim`, each cut into `groups`: the first group of each, then the second of each. One group: a concatenation.

    `sizes`: how long they are in proportion to each other; by default all the same.
    """

    children: tuple[Expression, ...]
    groups: int = 1
    dim: int = 0
    sizes: tuple[int, ...] = ()

    def resolve(self, pieces: Pieces, found: Shapes) -> None:
        parts: list[Pieces] = [{} for _ in self.children]
        for place, shape in pieces.items():
            lengths = shares(shape[self.dim], self.sizes or (1,) * len(self.children), "concat or interleave")
            for part, length in zip(parts, lengths, strict=True):
                part[place] = (*shape[: self.dim], length, *shape[self.dim + 1 :])
        for child, part in zip(self.children, parts, strict=True):
            child.resolve(part, found)

    def shape(self, known: Shapes, at: Coordinate) -> Shape:
        shapes = [child.shape(known, at) for child in self.children]
        length = sum(shape[self.dim] for shape in shapes)
        return (*shapes[0][: self.dim], length, *shapes[0][self.dim + 1 :])

    def patches(self, known: Shapes, at: Coordinate) -> Iterator[Patch]:
        lengths = [child.shape(known, at)[self.dim] // self.groups for child in self.children]
        for number, child in enumerate(self.children):
            for patch in child.patches(known, at):
                for group in range(self.groups):
                    whole = self.groups == 1
                    piece = patch if whole else patch.cut(self.dim, group * lengths[number], lengths[number])
                    if piece is not None:
                        yield piece.shifted(self.dim, group * sum(lengths) + sum(lengths[:number]))


@dataclass(frozen=True)
class Stack:
    """An array for each index along a new dimension: as many as there are tensors of these names.

    `make` gives the same object for the same index: what is learned of an expression is kept by its identity.
    """

    make: Callable[[int], Expression]
    dim: int = 0

    def resolve(self, pieces: Pieces, found: Shapes) -> None:
        for index in range(max(shape[self.dim] for shape in pieces.values())):
            layer = {
                place: (*shape[: self.dim], *shape[self.dim + 1 :])
                for place, shape in pieces.items()
                if index < shape[self.dim]
            }
            self.make(index).resolve(layer, found)

    def _count(self, known: Shapes, at: Coordinate) -> int:
        for index in itertools.count():
            try:
                self.make(index).shape(known, at)
            except KeyError:
                return index
        raise AssertionError

    def shape(self, known: Shapes, at: Coordinate) -> Shape:
        one = self.make(0).shape(known, at)
        return (*one[: self.dim], self._count(known, at), *one[self.dim :])

    def patches(self, known: Shapes, at: Coordinate) -> Iterator[Patch]:
        for index in range(self._count(known, at)):
            for patch in self.make(index).patches(known, at):
                offset = (*patch.offset[: self.dim], index, *patch.offset[self.dim :])
                yield replace(patch, offset=offset, axes=tuple(axis + (axis >= self.dim) for axis in patch.axes))


@dataclass(frozen=True)
class Transpose:
    """Dimensions in another order: dimension d of the array is dimension `order[d]` of the child; by default reversed."""

    child: Expression
    order: tuple[int, ...] = ()

    def _order(self, rank: int) -> tuple[int, ...]:
        order = self.order or tuple(reversed(range(rank)))
        if sorted(order) != list(range(rank)):
            raise LayoutError(f"transpose: order {order} is none of {rank} dimensions")
        return order

    def resolve(self, pieces: Pieces, found: Shapes) -> None:
        turned: Pieces = {}
        for place, shape in pieces.items():
            order = self._order(len(shape))
            turned[place] = tuple(shape[order.index(d)] for d in range(len(shape)))
        self.child.resolve(turned, found)

    def shape(self, known: Shapes, at: Coordinate) -> Shape:
        shape = self.child.shape(known, at)
        return tuple(shape[d] for d in self._order(len(shape)))

    def patches(self, known: Shapes, at: Coordinate) -> Iterator[Patch]:
        for patch in self.child.patches(known, at):
            order = self._order(len(patch.offset))
            yield replace(
                patch, offset=tuple(patch.offset[d] for d in order), axes=tuple(order.index(a) for a in patch.axes)
            )


@dataclass(frozen=True)
class Pad:
    """Filled up with zeros along `dim`, from `length` to a multiple of `multiple` (a vocabulary cut over ranks)."""

    child: Expression
    length: int
    multiple: int = 1
    dim: int = 0

    def resolve(self, pieces: Pieces, found: Shapes) -> None:
        short: Pieces = {}
        for place, shape in pieces.items():
            if shape[self.dim] < self.length:
                raise LayoutError(
                    f"pad: {shape[self.dim]} rows are stored, fewer than the {self.length} that are meant"
                )
            short[place] = (*shape[: self.dim], self.length, *shape[self.dim + 1 :])
            found.lengths[id(self), place] = [shape[self.dim]]
        self.child.resolve(short, found)

    def shape(self, known: Shapes, at: Coordinate) -> Shape:
        shape = self.child.shape(known, at)
        stored = next((held[0] for (which, _), held in known.lengths.items() if which == id(self)), None)
        padded = stored or -(-shape[self.dim] // self.multiple) * self.multiple
        return (*shape[: self.dim], padded, *shape[self.dim + 1 :])

    def patches(self, known: Shapes, at: Coordinate) -> Iterator[Patch]:
        return self.child.patches(known, at)


@dataclass(frozen=True)
class Partition:
    """Arrays flattened and joined; with `axis` the equal range of it that an index holds, each a multiple of `multiple` (ZeRO).

    What lies beyond the last array is filled up with zeros, or missing in the last range.
    """

    children: tuple[Expression, ...]
    axis: str | None = None
    multiple: int = 1

    def resolve(self, pieces: Pieces, found: Shapes) -> None:
        """Shapes do not show in what is flat: they must be known. Learns how long a range is."""
        for place, shape in pieces.items():
            rest = frozen({axis: index for axis, index in place if axis != self.axis})
            held = found.lengths.setdefault((id(self), rest), [0])
            held[0] = max(held[0], shape[0])
        for place, _ in pieces.items():
            count = 1 + max(dict(other)[self.axis] for other in pieces) if self.axis is not None else 1
            total = self._total(found, dict(place))
            if self._range(found, dict(place)) * count < total:
                raise LayoutError(
                    f"{count} ranges of {self._range(found, dict(place))} elements are fewer than {total}"
                )

    def _total(self, known: Shapes, at: Coordinate) -> int:
        return sum(math.prod(child.shape(known, at)) for child in self.children)

    def _range(self, known: Shapes, at: Coordinate) -> int:
        rest = frozen({axis: index for axis, index in at.items() if axis != self.axis})
        if (id(self), rest) in known.lengths:
            return known.lengths[id(self), rest][0]
        count = known.axes[self.axis] if self.axis is not None else 1
        return -(-self._total(known, at) // (count * self.multiple)) * self.multiple

    def shape(self, known: Shapes, at: Coordinate) -> Shape:
        return (self._range(known, at),)

    def patches(self, known: Shapes, at: Coordinate) -> Iterator[Patch]:
        length = self._range(known, at)
        low = at[self.axis] * length if self.axis is not None else 0
        base = 0
        for child in self.children:
            shape = child.shape(known, at)
            first, last = max(low, base), min(low + length, base + math.prod(shape))
            if first < last:
                for box, position in flat_range(shape, first - base, last - base):
                    yield from _flattened(child.patches(known, at), box, first - low + position)
            base += math.prod(shape)


def _flattened(patches: Iterator[Patch], box: Box, at: int) -> Iterator[Patch]:
    """What lies in a box of an array, when the box is laid out flat from `at` on."""
    strides = contiguous_strides(box.length)
    for patch in patches:
        for piece in patch.inside(box):
            offset = at + sum(o * s for o, s in zip(piece.offset, strides, strict=True))
            steps = tuple(strides[axis] for axis in piece.axes)
            yield replace(piece, offset=(offset,), axes=(0,) * len(piece.axes), steps=steps)
