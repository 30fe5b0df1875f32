"""The fixed order of sums: trees over leaves, and the exact squared norm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainrt.parallel.norm import ExactNorm, PlainNorm, row_squares
from trainrt.parallel.tree import TreeSum


def tree_sum(leaves: Sequence[torch.Tensor]) -> torch.Tensor:
    tree = TreeSum()
    for leaf in leaves:
        tree.add(leaf)
    return tree.total()


def text(leaves: int) -> str:
    """The tree as brackets: what a sum of symbols looks like."""

    class Symbol(str):
        def __add__(self, other: object) -> Symbol:
            return self if other == 0.0 else Symbol(f"({self}{other})")

    tree = TreeSum()
    for leaf in range(leaves):
        tree.add(Symbol(leaf))  # type: ignore[arg-type]
    return str(tree.total())


@pytest.mark.parametrize(
    ("leaves", "tree"),
    [(1, "0"), (2, "(01)"), (3, "((01)2)"), (4, "((01)(23))"), (6, "(((01)(23))(45))"), (7, "(((01)(23))((45)6))")],
)
def test_tree(leaves: int, tree: str) -> None:
    assert text(leaves) == tree


@given(leaves=st.integers(1, 40), log_span=st.integers(0, 3), seed=st.integers(0, 99))
def test_spans_summed_elsewhere_give_the_same_bits(leaves: int, log_span: int, seed: int) -> None:
    """Aligned spans of a power of two (an ep group's leaves) may be summed first, the last one cut short."""
    tensors = torch.randn(leaves, 5, generator=torch.Generator().manual_seed(seed)).unbind(0)
    span = 2**log_span
    spans = [tree_sum(tensors[at : at + span]) for at in range(0, leaves, span)]
    assert torch.equal(tree_sum(spans), tree_sum(tensors))


def test_the_sign_of_zero_does_not_tell_how_often_was_added() -> None:
    assert math.copysign(1, tree_sum([torch.tensor(-0.0)]).item()) == 1.0


def test_order_matters() -> None:
    """Negative control: these are floats."""
    tensors = torch.randn(8, 1000, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(tree_sum(tensors.unbind(0)), tree_sum(tensors.roll(1, 0).unbind(0)))


@settings(deadline=None)
@given(
    values=st.lists(st.floats(-1e150, 1e150, allow_subnormal=True), min_size=1, max_size=60),
    cuts=st.lists(st.integers(0, 60), max_size=4),
)
def test_exact_norm_is_exact_and_the_same_however_it_is_cut(values: list[float], cuts: list[int]) -> None:
    norm, tensor = ExactNorm(), torch.tensor(values, dtype=torch.float64)
    whole = norm.total(np.array([norm.part([tensor])]))
    bounds = [0, *sorted(min(cut, len(values)) for cut in cuts), len(values)]
    parts = [norm.part([tensor[a:b]]) for a, b in pairwise(bounds)]
    assert norm.total(np.array(parts)) == whole
    exact = float(sum(Fraction(float(value) ** 2) for value in tensor.numpy()))
    assert whole == pytest.approx(exact, rel=3e-16, abs=0.0)


@given(rows=st.integers(1, 9), columns=st.integers(1, 70), seed=st.integers(0, 99))
def test_a_row_does_not_know_its_neighbours(rows: int, columns: int, seed: int) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(row_squares(matrix), torch.cat([row_squares(row.unsqueeze(0)) for row in matrix]))
    assert torch.allclose(row_squares(matrix), matrix.double().square().sum(1))


def test_exact_norm_says_so_where_there_is_no_number() -> None:
    norm = ExactNorm()
    assert math.isnan(norm.total(np.array([norm.part([torch.tensor([1.0, math.inf])]), norm.part([])])))


def test_the_norms_agree() -> None:
    tensors = [torch.randn(7, 33), torch.randn(5), torch.randn(2, 3, 4)]
    exact, plain = (norm.total(np.array([norm.part(tensors)])) for norm in (ExactNorm(), PlainNorm()))
    assert exact == pytest.approx(plain, rel=1e-12)
