"""The top-k router: which experts a token goes to, and what balance costs. In fp32, as is the field's rule.

Legend: T tokens of one logical shard, D width, E experts, K choices a token, N rows: T * K less the dropped ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainrt.config import MoeConfig
from trainrt.parallel.moe.zero_computation import Kinds, balance_loss, capacities


class Rows(NamedTuple):
    """Tokens as experts take them, sorted by expert: a token stands here once for each expert that computes it."""

    token_N: Tensor
    expert_N: Tensor
    weight_N: Tensor
    count_E: Tensor


class RouterNumbers(NamedTuple):
    """What one logical shard's routing costs and how it went. Losses are means over tokens.

    dropped: the share of rows that capacity left out; of expert choice, of tokens that no expert took. load: rows that chose
    the busiest expert, over the mean of all experts, before any is dropped. Neither has a gradient.
    """

    balance: Tensor
    z: Tensor
    dropped: Tensor
    load: Tensor

    @classmethod
    def over(cls, layers: Sequence[RouterNumbers], device: torch.device) -> RouterNumbers:
        """Losses summed over layers, statistics averaged over them; zeros where there is none."""
        zero = torch.zeros((), device=device)
        balance, z, dropped, load = (
            (sum(column, start=zero) for column in zip(*layers, strict=True)) if layers else [zero] * 4
        )
        return cls(balance, z, dropped / max(len(layers), 1), load / max(len(layers), 1))


class Routing(NamedTuple):
    """The choice of one logical shard's tokens. `logits_TE`: the scores."""

    rows: Rows
    numbers: RouterNumbers
    logits_TE: Tensor


class Router(nn.Module):
    """Softmax over all experts, top k.

    With FFN experts only, the weights of the chosen are renormalised to sum to one. With zero-computation experts (MoE++,
    arXiv 2410.07348) they are the probabilities as they are (equation 2), and scores of the layer before add to this one's
    through a matrix of their own: the gating residual (equation 6).

    bias: adds to the probabilities for the choice alone, where balance is kept by it (balance.py).
    choices: experts that a token meets, on average.
    chosen_E: rows that chose each expert in the last forward pass, before any is dropped.
    """

    def __init__(self, moe: MoeConfig, *, kinds: Kinds, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(kinds.all, hidden_size))
        self.residual = nn.Parameter(torch.empty(kinds.all, kinds.all)) if kinds.free else None
        self.bias: Tensor | None
        self.register_buffer("bias", torch.zeros(kinds.all) if moe.balance == "bias" else None)
        self.chosen_E: Tensor | None = None
        self.choices: float = moe.top_k
        self.kinds, self.top_k, self.tau = kinds, moe.top_k, moe.tau
        self.capacity_factor, self.prioritised = moe.capacity_factor, moe.prioritised

    def forward(self, x_TD: Tensor, before_TE: Tensor | None = None) -> Routing:
        """`before_TE`: the scores of the layer before; None in the first one."""
        logits_TE = self.scores(x_TD, before_TE)
        probability_TE = logits_TE.softmax(-1)
        expert_TK = (
            (probability_TE if self.bias is None else probability_TE + self.bias).topk(self.top_k, dim=-1).indices
        )
        probability_TK = probability_TE.gather(-1, expert_TK)
        weight_TK = probability_TK
        chosen_TKE = F.one_hot(expert_TK, self.kinds.all).to(logits_TE.dtype)
        if self.kinds.free:
            balance = balance_loss(chosen_TKE.sum(1).mean(0), probability_TE.mean(0), self.kinds, self.tau)
        else:
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
            # Switch Transformer (arXiv 2101.03961, equations 4-6), over all k choices.
            balance = self.kinds.ffn * (chosen_TKE.mean((0, 1)) * probability_TE.mean(0)).sum()
        expert_N, order_N = self._sorted(expert_TK.flatten(), probability_TK.flatten())
        count_E = torch.bincount(expert_N, minlength=self.kinds.all)
        # A forward pass that is computed again says the same again.
        self.chosen_E = count_E
        rows = Rows(order_N // self.top_k, expert_N, weight_TK.to(x_TD.dtype).flatten()[order_N], count_E)
        kept = self._limited(rows, tokens=len(x_TD))
        dropped = 1.0 - kept.count_E.sum() / count_E.sum()
        return Routing(kept, RouterNumbers(balance, z_loss(logits_TE), dropped, load(count_E)), logits_TE)

    def scores(self, x_TD: Tensor, before_TE: Tensor | None) -> Tensor:
        precise = torch.promote_types(x_TD.dtype, torch.float32)
        logits_TE = F.linear(x_TD.to(precise), self.weight.to(precise))
        if self.residual is not None:
            before_TE = torch.zeros_like(logits_TE) if before_TE is None else before_TE.view_as(logits_TE)
            logits_TE = logits_TE + F.linear(before_TE.to(precise), self.residual.to(precise))
        return logits_TE

    def _sorted(self, expert_N: Tensor, probability_N: Tensor) -> tuple[Tensor, Tensor]:
        """The rows' experts in order, and where each row stood.

        Rows of an expert stay in the order of their tokens, so that capacity drops the last, or go by the probability with
        which they chose it, so that it drops the least: batch-prioritised routing (V-MoE, arXiv 2106.05974, section 3.4).
        There a token has one priority, the largest of its probabilities; here a second choice has its own. It is the
        probability and not the weight, which is one for every token that makes one choice.
        """
        if not self.prioritised:
            return expert_N.sort(stable=True)
        first_N = probability_N.argsort(descending=True, stable=True)
        expert_N, order_N = expert_N[first_N].sort(stable=True)
        return expert_N, first_N[order_N]

    def _limited(self, rows: Rows, *, tokens: int) -> Rows:
        """What is left of the rows when each expert takes the first ones, up to its capacity."""
        kinds, factor = self.kinds, self.capacity_factor
        if kinds.free:
            ffn, free = capacities(factor, tokens=tokens, top_k=self.top_k, kinds=kinds, tau=self.tau)
        else:
            ffn = free = capacity(factor, tokens=tokens, top_k=self.top_k, experts=kinds.ffn)
        if ffn is None or free is None:
            return rows
        token_N, expert_N, weight_N, count_E = rows
        limit_E = torch.full((kinds.all,), ffn, device=count_E.device)
        limit_E[kinds.ffn :] = free
        start_E = count_E.cumsum(0) - count_E
        place_N = torch.arange(expert_N.numel(), device=expert_N.device) - start_E[expert_N]
        kept = place_N < limit_E[expert_N]
        return Rows(token_N[kept], expert_N[kept], weight_N[kept], torch.minimum(count_E, limit_E))


def z_loss(logits_TE: Tensor) -> Tensor:
    """ST-MoE (arXiv 2202.08906, equation 5)."""
    return logits_TE.logsumexp(-1).square().mean()


def load(count_E: Tensor) -> Tensor:
    """Rows of the busiest expert over the mean."""
    return count_E.max() * len(count_E) / count_E.sum()


def capacity(factor: float, *, tokens: int, top_k: int, experts: int) -> int | None:
    """Rows an expert takes from one logical shard, or None for no limit.

    0: the smallest capacity without drops, so no limit; f > 0: the share ceil(f * T * K / E); f < 0:
    the smallest without drops, but at most that share for |f| (Tutel's convention).
    """
    if factor == 0.0:
        return None
    return -int(-abs(factor) * tokens * top_k // experts)
