"""Sums over the logical shards in one order, whatever the number of data ranks (`run.deterministic`).

Addition of floats is not associative, so the order is fixed: a binary tree over the logical shards
(leaves). A stock reduce-scatter adds in an order of its own that depends on the ranks; here the
leaves' gradients travel unadded to the ranks that hold the shards, and are added there.

The tree of n leaves: equal, aligned spans of powers of two are merged as in a binary counter, and
what is left over is folded from the right. A leaf that does not exist adds nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter

from trainrt.events import ring
from trainrt.parallel.collectives import all_gather


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


def tree_sum(leaves: Sequence[Tensor]) -> Tensor:
    """The sum of all leaves at once."""
    tree = TreeSum()
    for leaf in leaves:
        tree.add(leaf)
    return tree.total()


@dataclass(slots=True)
class Turn:
    """Which of a step's rounds of forward and backward runs. The engine sets it, the reductions read it."""

    index: int = 0
    rounds: int = 1
    leaves: int = 1


class TreeReduction(ReduceScatter):
    """FSDP2's reduction of one module's gradients, in tree order: every round sends, the last one writes the sum.

    A rank of `axis` (and of `replicas`) brings the sum of `span` leaves: one, or those of an ep group, whose rows meet
    at its experts: always the same neighbouring leaves, whatever the number of data ranks. Before the last round the
    gradients are zero, and FSDP adds what comes later to them.
    """

    def __init__(self, axis: str, turn: Turn, *, replicas: dist.ProcessGroup | None, span: int) -> None:
        self._axis, self._turn, self._replicas, self._span = axis, turn, replicas, span
        self._arrived: Tensor | None = None
        self._sum = TreeSum()

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        """Exchange the shards instead of adding them. FSDP calls it where the axis has more than one rank."""
        arrived = torch.empty_like(input_tensor)
        size = input_tensor.nbytes
        with ring.span("fsdp_exchange_gradients", kind="collective", bytes=size, group=self._axis, waiting=True):
            dist.all_to_all_single(arrived, input_tensor, group=group)
        self._arrived = arrived.view(group.size(), -1)

    def reduce(self, output: Tensor) -> None:
        """FSDP's all-reduce hook, called in every round: take what arrived, and write the sum in the last."""
        shards = output.clone().unsqueeze(0) if self._arrived is None else self._arrived
        self._arrived = None
        if self._replicas is not None:
            shards = all_gather(shards, self._replicas).flatten(0, 1)
        first = self._turn.index * len(shards)
        for position, shard in enumerate(shards):
            if (first + position) * self._span < self._turn.leaves:
                self._sum.add(shard)
        if self._turn.index == self._turn.rounds - 1:
            output.copy_(self._sum.total())
        else:
            output.zero_()
