"""Zero-computation experts (MoE++, arXiv 2410.07348, section 3.1): a token may be discarded, passed on, or replaced.

They have next to no parameters, so every rank has them and their rows are never exchanged.

Legend: T tokens, N rows of zero-computation experts, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class Kinds:
    """How many experts of each kind a router chooses from; they are numbered in this order."""

    ffn: int
    zero: int = 0
    copy: int = 0
    constant: int = 0

    @property
    def free(self) -> int:
        """Zero-computation experts."""
        return self.zero + self.copy + self.constant

    @property
    def all(self) -> int:
        return self.ffn + self.free


class ZeroComputation(nn.Module):
    """zero: E(x) = 0 (equation 3); copy: E(x) = x (4); constant: E(x) = a1 x + a2 v, [a1, a2] = softmax(W x) (5)."""

    def __init__(self, kinds: Kinds, hidden_size: int) -> None:
        super().__init__()
        self.kinds = kinds
        self.vector = nn.Parameter(torch.empty(kinds.constant, hidden_size))
        self.mixing = nn.Parameter(torch.empty(2 * kinds.constant, hidden_size))

    def forward(self, x_ND: Tensor, expert_N: Tensor) -> Tensor:
        """Each row through the zero-computation expert of its number, counted from 0 among these."""
        kinds = self.kinds
        y_ND = x_ND * (expert_N >= kinds.zero).unsqueeze(1)
        if not kinds.constant:
            return y_ND
        # Rows of other experts go through the first constant one and are left out of the result.
        which_N = (expert_N - kinds.zero - kinds.copy).clamp(min=0)
        logits_N2 = F.linear(x_ND, self.mixing).unflatten(1, (kinds.constant, 2))
        share_N2 = logits_N2[torch.arange(len(which_N), device=x_ND.device), which_N].softmax(-1)
        constant_ND = share_N2[:, :1] * x_ND + share_N2[:, 1:] * self.vector[which_N]
        return torch.where((expert_N >= kinds.zero + kinds.copy).unsqueeze(1), constant_ND, y_ND)


def balance_loss(share_E: Tensor, probability_E: Tensor, kinds: Kinds, tau: float) -> Tensor:
    """The heterogeneous balance loss, sum of eta f P with eta = 1 for an FFN expert and tau for the others (equations 7 and 8).

    share_E: of the tokens, how many chose an expert (f); probability_E: the mean probability (P).
    """
    eta_E = torch.ones_like(probability_E)
    eta_E[kinds.ffn :] = tau
    return (eta_E * share_E * probability_E).sum()


def capacities(factor: float, *, tokens: int, top_k: int, kinds: Kinds, tau: float) -> tuple[int | None, int | None]:
    """Rows an FFN expert and a zero-computation expert take from one logical shard; None: no limit (equation 9).

    gamma tau T / (tau N_ffn + N_zc) and gamma T / (tau N_ffn + N_zc), with T K for T since each token makes K choices. The
    factor's sign is as in `router.capacity`.
    """
    if factor == 0.0:
        return None, None
    whole = abs(factor) * tokens * top_k / (tau * kinds.ffn + kinds.free)
    return -int(-tau * whole // 1), -int(-whole // 1)
