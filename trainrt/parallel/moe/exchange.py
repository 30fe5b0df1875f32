"""The exchange: rows to the ranks that hold their experts, and back.

Uneven all-to-all without padding. Legend: N rows here, M rows received, E experts, L = E / P local
experts, P ranks of the group; experts p * L to (p + 1) * L live on rank p.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from trainrt.parallel.collectives import ExchangeRows, exchange_rows


@dataclass(frozen=True, slots=True)
class Exchange:
    """One plan serves both directions: `there` sorts what arrives by expert, `back` undoes it."""

    group: dist.ProcessGroup
    send: list[int]
    receive: list[int]
    local_counts: list[int]
    order_M: Tensor
    inverse_M: Tensor

    @classmethod
    def plan(cls, count_E: Tensor, group: dist.ProcessGroup) -> Exchange:
        """Agree on the counts; `count_E` rows of this rank go to each expert."""
        ranks = group.size()
        local = count_E.numel() // ranks
        arriving_PL = exchange_rows(count_E, [local] * ranks, [local] * ranks, group).view(ranks, local)
        expert_M = torch.arange(local, device=count_E.device).repeat(ranks).repeat_interleave(arriving_PL.flatten())
        order_M = expert_M.argsort(stable=True)
        inverse_M = torch.empty_like(order_M)
        inverse_M[order_M] = torch.arange(order_M.numel(), device=order_M.device)
        return cls(
            group=group,
            send=count_E.view(ranks, local).sum(1).tolist(),
            receive=arriving_PL.sum(1).tolist(),
            local_counts=arriving_PL.sum(0).tolist(),
            order_M=order_M,
            inverse_M=inverse_M,
        )

    def there(self, x_ND: Tensor) -> Tensor:
        """Rows sorted by (global) expert to rows of the local experts, sorted by expert: (M, D)."""
        return ExchangeRows.apply(x_ND, self.send, self.receive, self.group)[self.order_M]

    def back(self, y_MD: Tensor) -> Tensor:
        """The results of the local experts to the ranks and the order their rows came from: (N, D)."""
        return ExchangeRows.apply(y_MD[self.inverse_M], self.receive, self.send, self.group)
