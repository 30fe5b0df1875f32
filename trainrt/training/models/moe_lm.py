"""`moe_lm`: a decoder-only mixture-of-experts language model, written to be read.

Pre-norm blocks: RMSNorm, attention with rotary positions and grouped key-value heads, RMSNorm, then
a SwiGLU network or, in every n-th layer, a mixture of them.

Legend: B samples, S positions, D width, H heads, G key-value heads, C head width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainrt.config import MoeConfig, MoeLmConfig
from trainrt.parallel.moe.feed_forward import FeedForward
from trainrt.parallel.moe.layer import MoeLayer
from trainrt.parallel.moe.router import RouterNumbers


class LmOutput(NamedTuple):
    """Logits (B, S, V) and the routers' numbers: losses summed over layers, statistics averaged over them."""

    logits: Tensor
    router: RouterNumbers


class RmsNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467), computed in fp32 at least."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = precise * torch.rsqrt(precise.square().mean(-1, keepdim=True) + self.epsilon)
        return normed.to(x.dtype) * self.weight


def rotary(x_BHSC: Tensor, theta: float) -> Tensor:
    """Rotate halves of each head by position (RoPE, arXiv 2104.09864); angles in fp32 at least."""
    precise = torch.promote_types(x_BHSC.dtype, torch.float32)
    half = x_BHSC.shape[-1] // 2
    position_S1 = torch.arange(x_BHSC.shape[-2], device=x_BHSC.device, dtype=precise).unsqueeze(-1)
    frequency_C = theta ** (-torch.arange(half, device=x_BHSC.device, dtype=precise) / half)
    angle_SC = position_S1 * frequency_C
    cos, sin = angle_SC.cos().to(x_BHSC.dtype), angle_SC.sin().to(x_BHSC.dtype)
    first, second = x_BHSC.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class Attention(nn.Module):
    """Causal attention with G <= H key-value heads. Head counts are read off the projections' widths,
    so that a rank that holds some of the heads runs the same code."""

    def __init__(self, config: MoeLmConfig) -> None:
        super().__init__()
        self.head_width = config.hidden_size // config.heads
        self.theta = config.rope_theta
        self.q_proj = nn.Linear(config.hidden_size, config.heads * self.head_width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.kv_heads * self.head_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.kv_heads * self.head_width, bias=False)
        self.o_proj = nn.Linear(config.heads * self.head_width, config.hidden_size, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        q_BHSC, k_BGSC, v_BGSC = (
            projection(x_BSD).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q_BHSC, k_BGSC = rotary(q_BHSC, self.theta), rotary(k_BGSC, self.theta)
        y_BHSC = F.scaled_dot_product_attention(q_BHSC, k_BGSC, v_BGSC, is_causal=True, enable_gqa=True)
        return self.o_proj(y_BHSC.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """One layer. Returns its output, its router's numbers (None where it has none) and scores (those from before)."""

    def __init__(self, config: MoeLmConfig, moe: MoeConfig | None) -> None:
        super().__init__()
        self.attention_norm = RmsNorm(config.hidden_size, config.norm_epsilon)
        self.self_attn = Attention(config)
        self.mlp_norm = RmsNorm(config.hidden_size, config.norm_epsilon)
        self.mlp: nn.Module
        if moe is None:
            self.mlp = FeedForward(hidden_size=config.hidden_size, intermediate_size=config.intermediate_size)
        else:
            self.mlp = MoeLayer(moe, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size)

    def forward(self, x_BSD: Tensor, before: Tensor | None) -> tuple[Tensor, RouterNumbers | None, Tensor | None]:
        x_BSD = x_BSD + self.self_attn(self.attention_norm(x_BSD))
        normed_BSD = self.mlp_norm(x_BSD)
        if not isinstance(self.mlp, MoeLayer):
            return x_BSD + self.mlp(normed_BSD), None, before
        y_BSD, numbers, scores = self.mlp(normed_BSD, before)
        return x_BSD + y_BSD, numbers, scores


class MoeLm(nn.Module):
    """The whole model: token embedding, blocks, norm, output projection (tied if the config says so)."""

    def __init__(self, config: MoeLmConfig, moe: MoeConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, moe if (index + 1) % moe.every == 0 else None) for index in range(config.layers)
        )
        self.residual = moe.zero_experts + moe.copy_experts + moe.constant_experts > 0
        self.norm = RmsNorm(config.hidden_size, config.norm_epsilon)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, input_ids: Tensor) -> LmOutput:
        x_BSD = self.embed_tokens(input_ids)
        routers: list[RouterNumbers] = []
        scores: Tensor | None = None
        for block in self.layers:
            x_BSD, numbers, scores = block(x_BSD, scores if self.residual else None)
            if numbers is not None:
                routers.append(numbers)
        return LmOutput(self.lm_head(self.norm(x_BSD)), RouterNumbers.over(routers, x_BSD.device))

    @torch.no_grad()
    def initialize(self) -> None:
        """Normal(0, 0.02), with projections into the residual stream scaled by 1/sqrt(2 layers) (GPT-2); norms one."""
        residual = 0.02 / (2 * self.config.layers) ** 0.5
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, residual if "o_proj" in name or "down_proj" in name else 0.02)
