"""Layouts and reshards: every target element is filled exactly once, with the right bytes."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainrt.checkpoint.source import MemorySource, digest, fill
from trainrt.errors import LayoutError
from trainrt.parallel.layout import Box, Fragment, Layout, LogicalTensor, contiguous_strides, copies, flat_range

shapes = st.lists(st.integers(0, 7), min_size=0, max_size=4).map(tuple)
full_shapes = st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple)
Made = tuple[Layout, dict[tuple[int, str], np.ndarray]]


def whole(shape: tuple[int, ...]) -> tuple[LogicalTensor, np.ndarray]:
    """A tensor whose elements are their own flat index."""
    return LogicalTensor("w", "parameter", "int32", shape), np.arange(math.prod(shape), dtype=np.uint32).reshape(shape)


def cut_axis(length: int, cuts: list[int]) -> list[tuple[int, int]]:
    """[0, length) cut at some places into (offset, length), empty ones included."""
    at = [0, *sorted(cut % (length + 1) for cut in cuts), length]
    return [(a, b - a) for a, b in itertools.pairwise(at)]


def grid(draw: Any, shape: tuple[int, ...]) -> list[Box]:
    """Boxes of an uneven grid over a shape."""
    axes = [cut_axis(n, draw(st.lists(st.integers(0, 100), max_size=2))) for n in shape]
    boxes = [Box((), ())]
    for axis in axes:
        boxes = [Box((*box.offset, a), (*box.length, n)) for box in boxes for a, n in axis]
    return boxes


@st.composite
def placed(draw: Any, shape: tuple[int, ...]) -> Made:
    """The tensor in one of the ways frameworks keep it: a grid with replicas, transposed, or a flat partition."""
    tensor, data = whole(shape)
    layout, storages = Layout(), {}
    layout.add(tensor)
    if draw(st.booleans()):
        ranks = draw(st.integers(1, 5))
        bounds = cut_axis(
            math.prod(shape), draw(st.lists(st.integers(0, 1000), min_size=ranks - 1, max_size=ranks - 1))
        )
        for rank, (start, length) in enumerate(bounds):
            storages[rank, "flat"] = data.reshape(-1)[start : start + length].copy().view(np.uint8)
            for box, at in flat_range(shape, start, start + length):
                layout.add(tensor, Fragment(rank, box, "flat", contiguous_strides(box.length), start=at))
        return layout, storages
    rank = 0
    for box in grid(draw, shape):
        for _ in range(draw(st.integers(1, 2))):
            order = draw(st.permutations(range(len(shape))))
            piece = data[tuple(slice(a, a + n) for a, n in zip(box.offset, box.length, strict=True))]
            pad = draw(st.integers(0, 3))
            stored = np.concatenate(
                [np.zeros(pad, np.uint32), np.ascontiguousarray(piece.transpose(order)).reshape(-1)]
            )
            strides = [0] * len(shape)
            for d, stride in zip(order, contiguous_strides([box.length[d] for d in order]), strict=True):
                strides[d] = stride
            storages[rank, "piece"] = stored.view(np.uint8)
            layout.add(tensor, Fragment(rank, box, "piece", tuple(strides), base=4 * pad))
            rank += 1
    return layout, storages


@given(st.data(), shapes)
@settings(max_examples=300, deadline=None)
def test_any_layout_reshards_into_any_other(data: st.DataObject, shape: tuple[int, ...]) -> None:
    source_layout, source = data.draw(placed(shape))
    target_layout, expected = data.draw(placed(shape))
    target = {key: np.full_like(storage, 0xEE) for key, storage in expected.items()}
    for fragments in target_layout.fragments.values():
        for fragment in fragments:
            target[fragment.rank, fragment.storage][: fragment.base] = 0
    copied = fill(target_layout, target, MemorySource(source_layout, source))
    for key in expected:
        assert np.array_equal(target[key], expected[key])
    assert copied == sum(4 * f.box.elements for fs in target_layout.fragments.values() for f in fs)


@given(st.data(), full_shapes)
@settings(max_examples=200, deadline=None)
def test_every_element_is_written_exactly_once(data: st.DataObject, shape: tuple[int, ...]) -> None:
    source, _ = data.draw(placed(shape))
    target, _ = data.draw(placed(shape))
    written: dict[tuple[int, str], list[int]] = {}
    for copy in copies(source, target):
        assert copy.source.box == copy.target.box == copy.box
        for index in np.ndindex(*copy.box.length):
            at = copy.target.start + sum(i * s for i, s in zip(index, copy.target.strides, strict=True))
            written.setdefault((copy.target.rank, copy.target.storage), []).append(copy.target.base // 4 + at)
    for places in written.values():
        assert len(places) == len(set(places))


@given(st.data(), full_shapes)
@settings(max_examples=100, deadline=None)
def test_the_digest_does_not_depend_on_the_layout(data: st.DataObject, shape: tuple[int, ...]) -> None:
    first, second = data.draw(placed(shape)), data.draw(placed(shape))
    assert digest(MemorySource(*first)) == digest(MemorySource(*second))


@given(st.data(), full_shapes)
@settings(max_examples=50, deadline=None)
def test_a_missing_fragment_is_refused(data: st.DataObject, shape: tuple[int, ...]) -> None:
    layout, _ = data.draw(placed(shape))
    tensor, _ = whole(shape)
    held = [f for f in layout.fragments[tensor.key] if f.box.elements]
    lost = data.draw(st.sampled_from(held)).box
    poorer = layout.only(lambda _, fragment: fragment.box.intersect(lost) is None)
    poorer.tensors.setdefault(tensor.key, tensor)
    poorer.fragments.setdefault(tensor.key, [])
    target = Layout()
    target.add(tensor, Fragment(0, Box.whole(shape), "whole", contiguous_strides(shape)))
    with pytest.raises(LayoutError, match="nobody holds"):
        copies(poorer, target)


def test_another_shape_or_dtype_is_refused() -> None:
    source, target = Layout(), Layout()
    source.add(LogicalTensor("w", "parameter", "float32", (2, 3)))
    target.add(LogicalTensor("w", "parameter", "float32", (3, 2)), Fragment(0, Box.whole((3, 2)), "x", (2, 1)))
    with pytest.raises(LayoutError, match=r"\(2, 3\).*\(3, 2\)"):
        copies(source, target)


def test_a_view_outside_of_its_storage_is_refused() -> None:
    with pytest.raises(LayoutError, match="outside"):
        Fragment(0, Box((0,), (5,)), "x", (1,)).view(np.zeros(16, np.uint8), 4)


@given(full_shapes, st.data())
@settings(max_examples=200, deadline=None)
def test_a_flat_range_is_few_boxes_that_cover_it(shape: tuple[int, ...], data: st.DataObject) -> None:
    elements = math.prod(shape)
    start = data.draw(st.integers(0, elements))
    stop = data.draw(st.integers(start, elements))
    boxes = flat_range(shape, start, stop)
    assert len(boxes) <= 2 * len(shape) - 1
    index = np.arange(elements).reshape(shape)
    covered = [
        index[tuple(slice(a, a + n) for a, n in zip(box.offset, box.length, strict=True))].reshape(-1)
        for box, _ in boxes
    ]
    for part, (_, at) in zip(covered, boxes, strict=True):
        assert list(part) == list(range(start + at, start + at + len(part)))
    assert sorted(np.concatenate(covered) if covered else []) == list(range(start, stop))


def test_layouts_survive_json() -> None:
    layout = Layout()
    layout.add(
        LogicalTensor("w", "exp_avg", "float32", (4, 2)), Fragment(3, Box((2, 0), (2, 2)), "state", (2, 1), 5, 64)
    )
    again = Layout.from_json(layout.to_json())
    assert again.tensors == layout.tensors
    assert again.fragments == layout.fragments
