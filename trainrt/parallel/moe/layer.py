"""The mixture-of-experts layer: route, sort by expert, compute where the experts are, combine.

Legend: T tokens of one logical shard, D width, N rows that experts compute, E experts of all kinds.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainrt.config import MoeConfig
from trainrt.parallel.moe.expert_choice import ExpertChoiceRouter
from trainrt.parallel.moe.experts import Experts
from trainrt.parallel.moe.feed_forward import FeedForward, swiglu
from trainrt.parallel.moe.flex import Beside
from trainrt.parallel.moe.router import Router, RouterNumbers, Rows
from trainrt.parallel.moe.zero_computation import Kinds, ZeroComputation


class MoeLayer(nn.Module):
    """A mixture of experts: tokens choose them, or they choose tokens.

    Beside it stand shared experts, which every token goes through (DeepSeekMoE, arXiv 2401.06066, equation 9): one network
    as wide as all of them, which is the same sum.

    Statistics and capacity are of one call, which is one logical shard: they do not depend on how
    many ranks there are (DESIGN: determinism of the global batch).
    """

    def __init__(self, moe: MoeConfig, *, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.kinds = Kinds(moe.experts, moe.zero_experts, moe.copy_experts, moe.constant_experts)
        router = ExpertChoiceRouter if moe.routing == "expert_choice" else Router
        self.router = router(moe, kinds=self.kinds, hidden_size=hidden_size)
        self.experts = Experts(experts=moe.experts, hidden_size=hidden_size, intermediate_size=intermediate_size)
        self.free = ZeroComputation(self.kinds, hidden_size) if self.kinds.free else None
        width = moe.shared_experts * intermediate_size
        self.shared = FeedForward(hidden_size=hidden_size, intermediate_size=width) if width else None
        self.number_of_experts = self.kinds.all
        self.top_k = self.router.choices

    def forward(self, x_BSD: Tensor, before: Tensor | None = None) -> tuple[Tensor, RouterNumbers, Tensor]:
        """The output, what the router says of itself, and its scores.

        `before`: the scores of the layer before, for the gating residual of zero-computation experts.
        """
        x_TD = x_BSD.flatten(0, -2)
        routing = self.router(x_TD, before)
        if self.shared is None:
            y_BSD = self._mix(x_TD, routing.rows).view_as(x_BSD)
        elif self.experts.fills_gaps:
            shared = Beside(swiglu, x_BSD, *self.shared.weights)
            y_BSD = self._mix(x_TD, routing.rows, shared).view_as(x_BSD)
            assert shared.result is not None
            y_BSD = y_BSD + shared.result
        else:
            y_BSD = self._mix(x_TD, routing.rows).view_as(x_BSD) + self.shared(x_BSD)
        return y_BSD, routing.numbers, routing.logits_TE

    def _mix(self, x_TD: Tensor, rows: Rows, *besides: Beside) -> Tensor:
        token_N, expert_N, weight_N, count_E = rows
        if self.free is None:
            y_ND = self.experts(x_TD[token_N], count_E, *besides) * weight_N.unsqueeze(-1)
            return torch.zeros_like(x_TD).index_add(0, token_N, y_ND)
        # Only rows of FFN experts, which come first, may travel.
        travels = expert_N < self.kinds.ffn
        token, stays = token_N[travels], token_N[~travels]
        y_ND = self.experts(x_TD[token], count_E[: self.kinds.ffn], *besides) * weight_N[travels].unsqueeze(-1)
        own_ND = self.free(x_TD[stays], expert_N[~travels] - self.kinds.ffn) * weight_N[~travels].unsqueeze(-1)
        return torch.zeros_like(x_TD).index_add(0, token, y_ND).index_add(0, stays, own_ND)
