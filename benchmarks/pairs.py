"""Arms that take turns: medians of pairwise ratios, how sure they are, and tables of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

RESAMPLES = 2000

Times = dict[str, list[float]]
"""Of each arm, seconds turn by turn."""


class Estimate(NamedTuple):
    """A median and the interval that holds it with 95 %."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} - {self.high:.3f})"


def estimate(values: Sequence[float]) -> Estimate:
    """The interval is the percentile bootstrap's over the pairs."""
    given = np.asarray(values)
    draws = np.random.default_rng(0).integers(len(given), size=(RESAMPLES, len(given)))
    medians = np.median(given[draws], axis=1)
    return Estimate(float(np.median(given)), *map(float, np.percentile(medians, (2.5, 97.5))))


def ratios(above: Sequence[float], below: Sequence[float]) -> Estimate:
    return estimate([a / b for a, b in zip(above, below, strict=True)])


def slowest(of_ranks: Sequence[Times]) -> Times:
    """A turn has ended when it has on every rank."""
    return {name: [max(turn) for turn in zip(*(t[name] for t in of_ranks), strict=True)] for name in of_ranks[0]}


def print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    cells = [list(rows[0]), *(list(map(shown, row.values())) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print(title)
    for line in cells:
        print("  " + "  ".join(_padded(line, widths)).rstrip(), flush=True)


def shown(value: Any) -> str:
    return f"{value:.4g}" if type(value) is float else str(value)


def _padded(line: Iterable[str], widths: Iterable[int]) -> list[str]:
    return [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
