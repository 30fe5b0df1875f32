"""The top-k router: which experts a token goes to, and what balance costs. In fp32, as is the field's rule.

Legend: T tokens, D width, E experts, K choices a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainrt.parallel.moe.zero_computation import Kinds, balance_loss


@dataclass(slots=True)
class Routing:
    """The choice of one logical shard's tokens. `balance` and `z` are means over its tokens; `logits_TE` the scores."""

    weight_TK: Tensor
    expert_TK: Tensor
    balance: Tensor
    z: Tensor
    logits_TE: Tensor


class Router(nn.Module):
    """Softmax over all experts, top k.

    With FFN experts only, the weights of the chosen are renormalised to sum to one. With zero-computation experts (MoE++,
    arXiv 2410.07348) they are the probabilities as they are (equation 2), and scores of the layer before add to this one's
    through a matrix of their own: the gating residual (equation 6).
    """

    def __init__(self, *, hidden_size: int, kinds: Kinds, top_k: int, tau: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(kinds.all, hidden_size))
        self.residual = nn.Parameter(torch.empty(kinds.all, kinds.all)) if kinds.free else None
        self.kinds, self.top_k, self.tau = kinds, top_k, tau

    def forward(self, x_TD: Tensor, before_TE: Tensor | None = None) -> Routing:
        """`before_TE`: the scores of the layer before; None in the first one."""
        precise = torch.promote_types(x_TD.dtype, torch.float32)
        logits_TE = F.linear(x_TD.to(precise), self.weight.to(precise))
        if self.residual is not None:
            before_TE = torch.zeros_like(logits_TE) if before_TE is None else before_TE.view_as(logits_TE)
            logits_TE = logits_TE + F.linear(before_TE, self.residual.to(precise))
        probability_TE = logits_TE.softmax(-1)
        weight_TK, expert_TK = probability_TE.topk(self.top_k, dim=-1)
        chosen_E = F.one_hot(expert_TK, self.kinds.all).to(precise)
        if self.kinds.free:
            balance = balance_loss(chosen_E.sum(1).mean(0), probability_TE.mean(0), self.kinds, self.tau)
        else:
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
            # Switch Transformer (arXiv 2101.03961, equations 4-6), over all k choices.
            balance = self.kinds.ffn * (chosen_E.mean((0, 1)) * probability_TE.mean(0)).sum()
        # ST-MoE (arXiv 2202.08906, equation 5).
        z = logits_TE.logsumexp(-1).square().mean()
        return Routing(weight_TK.to(x_TD.dtype), expert_TK, balance, z, logits_TE)


def capacity(factor: float, *, tokens: int, top_k: int, experts: int) -> int | None:
    """Rows an expert takes from one logical shard, or None for no limit.

    0: the smallest capacity without drops, so no limit; f > 0: the share ceil(f * T * K / E); f < 0:
    the smallest without drops, but at most that share for |f| (Tutel's convention).
    """
    if factor == 0.0:
        return None
    return -int(-abs(factor) * tokens * top_k // experts)
