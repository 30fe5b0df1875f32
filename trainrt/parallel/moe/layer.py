"""The mixture-of-experts layer: route, sort by expert, compute where the experts are, combine.

Legend: T tokens of one logical shard, D width, K choices, N = T * K rows less the dropped ones, E experts of all kinds.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainrt.config import MoeConfig
from trainrt.parallel.moe.experts import Experts
from trainrt.parallel.moe.router import Router, capacity
from trainrt.parallel.moe.zero_computation import Kinds, ZeroComputation, capacities


class MoeLayer(nn.Module):
    """Top-k mixture of experts.

    Statistics and capacity are of one call, which is one logical shard: they do not depend on how
    many ranks there are (DESIGN: determinism of the global batch).
    """

    def __init__(self, moe: MoeConfig, *, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.kinds = Kinds(moe.experts, moe.zero_experts, moe.copy_experts, moe.constant_experts)
        self.router = Router(hidden_size=hidden_size, kinds=self.kinds, top_k=moe.top_k, tau=moe.tau)
        self.experts = Experts(experts=moe.experts, hidden_size=hidden_size, intermediate_size=intermediate_size)
        self.free = ZeroComputation(self.kinds, hidden_size) if self.kinds.free else None
        self.number_of_experts = self.kinds.all
        self.top_k = moe.top_k
        self.capacity_factor = moe.capacity_factor

    def forward(self, x_BSD: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The output, the balance and z losses (means over tokens), and the router's scores.

        `before`: the scores of the layer before, for the gating residual of zero-computation experts.
        """
        x_TD = x_BSD.flatten(0, -2)
        routing = self.router(x_TD, before)
        expert_N, order_N = routing.expert_TK.flatten().sort(stable=True)
        weight_N = routing.weight_TK.flatten()[order_N]
        token_N = order_N // self.top_k
        count_E = torch.bincount(expert_N, minlength=self.kinds.all)
        limit_E = self._limits(x_TD)
        if limit_E is not None:
            start_E = count_E.cumsum(0) - count_E
            place_N = torch.arange(expert_N.numel(), device=expert_N.device) - start_E[expert_N]
            kept = place_N < limit_E[expert_N]
            expert_N, token_N, weight_N = expert_N[kept], token_N[kept], weight_N[kept]
            count_E = torch.minimum(count_E, limit_E)
        y_TD = self._mix(x_TD, token_N, weight_N, expert_N, count_E)
        return y_TD.view_as(x_BSD), routing.balance, routing.z, routing.logits_TE

    def _limits(self, x_TD: Tensor) -> Tensor | None:
        """Rows that each expert takes of these tokens, or None for no limit."""
        kinds, factor, tokens = self.kinds, self.capacity_factor, x_TD.shape[0]
        if kinds.free:
            ffn, free = capacities(factor, tokens=tokens, top_k=self.top_k, kinds=kinds, tau=self.router.tau)
        else:
            ffn = free = capacity(factor, tokens=tokens, top_k=self.top_k, experts=kinds.ffn)
        if ffn is None or free is None:
            return None
        limit_E = torch.full((kinds.all,), ffn, device=x_TD.device)
        limit_E[kinds.ffn :] = free
        return limit_E

    def _mix(self, x_TD: Tensor, token_N: Tensor, weight_N: Tensor, expert_N: Tensor, count_E: Tensor) -> Tensor:
        if self.free is None:
            y_ND = self.experts(x_TD[token_N], count_E) * weight_N.unsqueeze(-1)
            return torch.zeros_like(x_TD).index_add(0, token_N, y_ND)
        # Only rows of FFN experts, which come first, may travel.
        travels = expert_N < self.kinds.ffn
        token, stays = token_N[travels], token_N[~travels]
        y_ND = self.experts(x_TD[token], count_E[: self.kinds.ffn]) * weight_N[travels].unsqueeze(-1)
        own_ND = self.free(x_TD[stays], expert_N[~travels] - self.kinds.ffn) * weight_N[~travels].unsqueeze(-1)
        return torch.zeros_like(x_TD).index_add(0, token, y_ND).index_add(0, stays, own_ND)
