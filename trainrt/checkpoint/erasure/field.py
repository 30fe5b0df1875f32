"""GF(2^8) on single elements: enough to turn an erasure pattern into a small matrix of constants.

The field is the one of RAID-6, polynomials over GF(2) modulo x^8 + x^4 + x^3 + x^2 + 1 (0x11d), whose element 2
generates all 255 others (H. P. Anvin, "The mathematics of RAID-6"). Nothing here touches the bytes of a shard;
that is `kernels.py`.
"""

from __future__ import annotations

POLYNOMIAL = 0x11D
ORDER = 255  # of the multiplicative group: 2**255 = 1

Matrix = tuple[tuple[int, ...], ...]


def _powers() -> tuple[int, ...]:
    powers, value = [], 1
    for _ in range(ORDER):
        powers.append(value)
        value <<= 1
        if value & 0x100:
            value ^= POLYNOMIAL
    return tuple(powers)


_POWER = _powers()
_LOGARITHM = {value: exponent for exponent, value in enumerate(_POWER)}


def power(exponent: int) -> int:
    """2 to the `exponent`."""
    return _POWER[exponent % ORDER]


def multiply(a: int, b: int) -> int:
    return power(_LOGARITHM[a] + _LOGARITHM[b]) if a and b else 0


def inverse(a: int) -> int:
    """1 / a. Raises KeyError for 0."""
    return power(-_LOGARITHM[a])


def invert(matrix: Matrix) -> Matrix:
    """The inverse of a regular square matrix, by Gauss-Jordan elimination."""
    size = len(matrix)
    rows = [[*row, *(int(i == j) for j in range(size))] for i, row in enumerate(matrix)]
    for column in range(size):
        pivot = next(i for i in range(column, size) if rows[i][column])
        rows[column], rows[pivot] = rows[pivot], rows[column]
        scale = inverse(rows[column][column])
        rows[column] = [multiply(scale, value) for value in rows[column]]
        for i in range(size):
            factor = rows[i][column]
            if i != column and factor:
                rows[i] = [a ^ multiply(factor, b) for a, b in zip(rows[i], rows[column], strict=True)]
    return tuple(tuple(row[size:]) for row in rows)
