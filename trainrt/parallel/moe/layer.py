"""The mixture-of-experts layer: route, sort by expert, compute where the experts are, combine.

Legend: T tokens of one logical shard, D width, K choices, N = T * K rows less the dropped ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainrt.parallel.moe.experts import Experts
from trainrt.parallel.moe.router import Router, capacity


class MoeLayer(nn.Module):
    """Top-k mixture of experts. Returns the output and the balance and z losses (means over tokens).

    Statistics and capacity are of one call, which is one logical shard: they do not depend on how
    many ranks there are (DESIGN: determinism of the global batch).
    """

    def __init__(
        self, *, hidden_size: int, intermediate_size: int, experts: int, top_k: int, capacity_factor: float
    ) -> None:
        super().__init__()
        self.router = Router(hidden_size=hidden_size, experts=experts, top_k=top_k)
        self.experts = Experts(experts=experts, hidden_size=hidden_size, intermediate_size=intermediate_size)
        self.number_of_experts = experts
        self.top_k = top_k
        self.capacity_factor = capacity_factor

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_TD = x_BSD.flatten(0, -2)
        routing = self.router(x_TD)
        expert_N, order_N = routing.expert_TK.flatten().sort(stable=True)
        weight_N = routing.weight_TK.flatten()[order_N]
        token_N = order_N // self.top_k
        count_E = torch.bincount(expert_N, minlength=self.number_of_experts)
        limit = capacity(self.capacity_factor, tokens=x_TD.shape[0], top_k=self.top_k, experts=self.number_of_experts)
        if limit is not None:
            start_E = count_E.cumsum(0) - count_E
            kept = torch.arange(expert_N.numel(), device=expert_N.device) - start_E[expert_N] < limit
            token_N, weight_N = token_N[kept], weight_N[kept]
            count_E = count_E.clamp(max=limit)
        y_TD = self._mix(x_TD, token_N, weight_N, count_E)
        return y_TD.view_as(x_BSD), routing.balance, routing.z

    def _mix(self, x_TD: Tensor, token_N: Tensor, weight_N: Tensor, count_E: Tensor) -> Tensor:
        y_ND = self.experts(x_TD[token_N], count_E) * weight_N.unsqueeze(-1)
        return torch.zeros_like(x_TD).index_add(0, token_N, y_ND)
