"""Expert choice (arXiv 2202.09368, section 3.2): each expert takes the tokens that suit it best, as many as any other.

Load is even by construction, so nothing is spent on balance. A token may be taken by several experts or by none. What is taken
depends on all tokens of the logical shard: a causal model sees later ones through the choice.

Legend: T tokens of one logical shard, D width, E experts, C tokens an expert takes, N = E * C rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainrt.config import MoeConfig
from trainrt.parallel.moe.router import Router, RouterNumbers, Routing, Rows, capacity, load, z_loss
from trainrt.parallel.moe.zero_computation import Kinds


class ExpertChoiceRouter(Router):
    """Softmax over experts, then the top C tokens of each expert; weights are the probabilities (equation 1)."""

    def __init__(self, moe: MoeConfig, *, kinds: Kinds, hidden_size: int) -> None:
        super().__init__(moe, kinds=kinds, hidden_size=hidden_size)
        self.choices = abs(moe.capacity_factor) or float(moe.top_k)

    def forward(self, x_TD: Tensor, before_TE: Tensor | None = None) -> Routing:
        """`before_TE` is for zero-computation experts, which do not choose."""
        logits_TE = self.scores(x_TD, before_TE)
        tokens, experts = logits_TE.shape
        taken = capacity(self.choices, tokens=tokens, top_k=1, experts=experts)
        assert taken is not None
        weight_CE, token_CE = logits_TE.softmax(-1).topk(min(taken, tokens), dim=0)
        count_E = torch.full((experts,), len(token_CE), device=x_TD.device)
        token_N = token_CE.T.flatten()
        expert_N = torch.arange(experts, device=x_TD.device).repeat_interleave(len(token_CE))
        rows = Rows(token_N, expert_N, weight_CE.T.flatten().to(x_TD.dtype), count_E)
        left_out = 1.0 - (torch.bincount(token_N, minlength=tokens) > 0).to(logits_TE.dtype).mean()
        numbers = RouterNumbers(torch.zeros_like(left_out), z_loss(logits_TE), left_out, load(count_E))
        return Routing(rows, numbers, logits_TE)
