"""The squared norm of gradients that are spread over ranks: what a rank says of its part, and the sum of all.

The parts travel as a few float64 numbers in the step's one gather.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LIMB = 32
BIAS = 1126  # the exponent of the lowest bit of the smallest float64, as a positive number
LIMBS = (1024 + BIAS) // LIMB + 2
BLOCK = 1 << 20


class SquaredNorm(Protocol):
    """How the squares are added up."""

    width: int

    def part(self, tensors: Sequence[Tensor]) -> list[float]:
        """`width` numbers for the tensors of this rank."""

    def total(self, parts: NDArray[np.float64]) -> float:
        """The squared norm, from the parts of all ranks: (ranks, width)."""


class PlainNorm:
    """Sums in float64, over the ranks in their order: last bits depend on the mesh."""

    width = 1

    def part(self, tensors: Sequence[Tensor]) -> list[float]:
        norms = torch._foreach_norm(list(tensors), 2, dtype=torch.float64) if tensors else ()
        return [float(sum((norm.cpu().square() for norm in norms), start=torch.zeros((), dtype=torch.float64)))]

    def total(self, parts: NDArray[np.float64]) -> float:
        return sum(parts[:, 0].tolist())


class ExactNorm:
    """Sums whose bits do not depend on how dimension 0 is cut (or dimension 1 of stacked experts).

    A row is added up by halving, element by element, so that no kernel's blocking shows; the rows' sums are
    then added without rounding, as integers (Kulisch's long accumulator, in limbs of 32 bits).
    """

    width = LIMBS

    def part(self, tensors: Sequence[Tensor]) -> list[float]:
        limbs = np.zeros(LIMBS, np.int64)
        for tensor in tensors:
            rows = tensor.detach().reshape(-1, tensor.shape[-1] if tensor.dim() > 1 else 1)
            for block in rows.split(max(1, BLOCK // rows.shape[1])):
                sums = row_squares(block).cpu().numpy()
                if not np.isfinite(sums).all():
                    return [math.nan] * LIMBS
                _accumulate(limbs, sums)
        return [float(limb) for limb in _carried(limbs)]

    def total(self, parts: NDArray[np.float64]) -> float:
        if not np.isfinite(parts).all():
            return math.nan
        value = sum(int(limb) << (LIMB * index) for index, limb in enumerate(parts.astype(np.int64).sum(0)))
        # 64 leading bits are more than a float64 holds; what is cut off is cut off everywhere.
        cut = max(0, value.bit_length() - 64)
        return math.ldexp(float(value >> cut), cut - BIAS)


def row_squares(rows: Tensor) -> Tensor:
    """The sum of squares of each row, (R, C) to (R,) in float64."""
    squares = rows.double().square()
    while (columns := squares.shape[1]) > 1:
        half = (columns + 1) // 2
        folded = squares[:, :half].clone()
        folded[:, : columns - half] += squares[:, half:]
        squares = folded
    return squares[:, 0]


def _accumulate(limbs: NDArray[np.int64], values: NDArray[np.float64]) -> None:
    """Add non-negative numbers to the accumulator, exactly. Room for 2^29 of them between two carries."""
    fraction, exponent = np.frexp(values)
    mantissa = np.ldexp(fraction, 53).astype(np.int64)
    index, shift = np.divmod(exponent.astype(np.int64) - 53 + BIAS, LIMB)
    mask = (1 << LIMB) - 1
    for offset, part in ((0, mantissa & mask), (1, mantissa >> LIMB)):
        shifted = part << shift
        np.add.at(limbs, index + offset, shifted & mask)
        np.add.at(limbs, index + offset + 1, shifted >> LIMB)


def _carried(limbs: NDArray[np.int64]) -> list[int]:
    """The same number with every limb below 2^32, so that float64 carries it exactly."""
    carry, result = 0, []
    for limb in limbs.tolist():
        carry += limb
        result.append(carry & ((1 << LIMB) - 1))
        carry >>= LIMB
    return result
