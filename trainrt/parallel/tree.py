"""Sums over the logical shards in one order, whatever the number of data ranks (`run.deterministic`).

Addition of floats is not associative, so the order is fixed: a binary tree over the logical shards
(leaves). A stock reduce-scatter adds in an order of its own that depends on the ranks; here the
leaves' gradients travel unadded to the ranks that hold the shards, and are added there.

The tree of n leaves: equal, aligned spans of powers of two are merged as in a binary counter, and
what is left over is folded from the right. A leaf that does not exist adds nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


class TreeSum:
    """The sum of tensors of one shape, added one after the other in the order of the leaves.

    Keeps a partial sum for each bit of their number, as a binary counter does.
    """

    def __init__(self) -> None:
        self._partials: list[tuple[int, Tensor]] = []

    def add(self, leaf: Tensor) -> None:
        """The next leaf. The tensor is kept, and must not change afterwards."""
        span = 1
        while self._partials and self._partials[-1][0] == span:
            leaf, span = self._partials.pop()[1] + leaf, 2 * span
        self._partials.append((span, leaf))

    def total(self) -> Tensor:
        """The sum; a zero of it is always positive, as if zeros had been added. Starts over."""
        (_, total), *rest = reversed(self._partials)
        for _, partial in rest:
            total = partial + total
        self._partials.clear()
        return total + 0.0


@dataclass(slots=True)
class Turn:
    """Which of a step's rounds of forward and backward runs. The engine sets it, the reductions read it."""

    index: int = 0
    rounds: int = 1
    leaves: int = 1
