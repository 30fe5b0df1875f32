"""The top-k router: which experts a token goes to, and what balance costs. In fp32, as is the field's rule.

Legend: T tokens, D width, E experts, K choices a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(slots=True)
class Routing:
    """The choice of one logical shard's tokens. `balance` and `z` are means over its tokens."""

    weight_TK: Tensor
    expert_TK: Tensor
    balance: Tensor
    z: Tensor


class Router(nn.Module):
    """Softmax over all experts, top k, weights renormalised to sum to one."""

    def __init__(self, *, hidden_size: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, hidden_size))
        self.top_k = top_k

    def forward(self, x_TD: Tensor) -> Routing:
        precise = torch.promote_types(x_TD.dtype, torch.float32)
        logits_TE = F.linear(x_TD.to(precise), self.weight.to(precise))
        probability_TE = logits_TE.softmax(-1)
        weight_TK, expert_TK = probability_TE.topk(self.top_k, dim=-1)
        weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        experts = probability_TE.shape[-1]
        # Switch Transformer (arXiv 2101.03961, equations 4-6), over all k choices.
        share_E = F.one_hot(expert_TK, experts).to(precise).mean((0, 1))
        balance = experts * (share_E * probability_TE.mean(0)).sum()
        # ST-MoE (arXiv 2202.08906, equation 5).
        z = logits_TE.logsumexp(-1).square().mean()
        return Routing(weight_TK.to(x_TD.dtype), expert_TK, balance, z)


def capacity(factor: float, *, tokens: int, top_k: int, experts: int) -> int | None:
    """Rows an expert takes from one logical shard, or None for no limit.

    0: the smallest capacity without drops, so no limit; f > 0: the share ceil(f * T * K / E); f < 0:
    the smallest without drops, but at most that share for |f| (Tutel's convention).
    """
    if factor == 0.0:
        return None
    return -int(-abs(factor) * tokens * top_k // experts)
