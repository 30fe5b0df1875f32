"""Expert feed-forward networks: stacked SwiGLU weights, applied to rows sorted by expert.

Under expert parallelism each rank holds a run of experts and the rows travel to them and back
inside `forward`, so that FSDP gathers these weights around the whole exchange.

Legend: N rows, D width, F inner width, E experts of the layer, L experts here.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from trainrt.parallel.collectives import CopyToGroup, ReduceFromGroup
from trainrt.parallel.moe.exchange import Exchange


class Experts(nn.Module):
    """E SwiGLU networks. `forward(rows, counts)` takes rows sorted by expert, counts of length E."""

    def __init__(self, *, experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Parameter(torch.empty(experts, intermediate_size, hidden_size))
        self.up_proj = nn.Parameter(torch.empty(experts, intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden_size, intermediate_size))
        self.ep_group: dist.ProcessGroup | None = None
        self.tp_group: dist.ProcessGroup | None = None

    def forward(self, x_ND: Tensor, count_E: Tensor) -> Tensor:
        if self.ep_group is None:
            return self._compute(x_ND, count_E.tolist())
        if self.tp_group is None:
            return self._exchanged(x_ND, count_E, self.ep_group)
        # Tensor-parallel ranks hold the same rows: each sends its share of them.
        rank, ranks = self.tp_group.rank(), self.tp_group.size()
        expert_N = torch.arange(len(count_E), device=count_E.device).repeat_interleave(count_E)
        mine_N = torch.arange(rank, len(expert_N), ranks, device=count_E.device)
        count_E = torch.bincount(expert_N[mine_N], minlength=len(count_E))
        x_ND = CopyToGroup.apply(x_ND, self.tp_group)
        y_ND = torch.zeros_like(x_ND).index_copy(0, mine_N, self._exchanged(x_ND[mine_N], count_E, self.ep_group))
        return ReduceFromGroup.apply(y_ND, self.tp_group)

    def _exchanged(self, x_ND: Tensor, count_E: Tensor, group: dist.ProcessGroup) -> Tensor:
        exchange = Exchange.plan(count_E, group)
        return exchange.back(self._compute(exchange.there(x_ND), exchange.local_counts))

    def _compute(self, x_ND: Tensor, counts: list[int]) -> Tensor:
        gate_LFD, up_LFD, down_LDF = (local(p) for p in (self.gate_proj, self.up_proj, self.down_proj))
        outputs = []
        for expert, rows_ND in enumerate(x_ND.split(counts)):
            inner = F.silu(F.linear(rows_ND, gate_LFD[expert])) * F.linear(rows_ND, up_LFD[expert])
            outputs.append(F.linear(inner, down_LDF[expert]))
        return torch.cat(outputs)


def local(parameter: Tensor) -> Tensor:
    """The part of a parameter that this rank computes with."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
