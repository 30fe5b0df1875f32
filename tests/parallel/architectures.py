"""Small models of 25 families in Hugging Face's own classes, with random weights: nothing is downloaded.

Between them they have what makes tensor parallelism hard: grouped and single key heads, fused and interleaved q, k and v,
a residual width that is not the embedding's, tied embeddings, position biases, latent attention, experts in one tensor,
state-space layers. `model(family)` makes one, `batch(family)` what it is called with.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor

TOKENS = 128
SAMPLES, LENGTH = 2, 16
PIXELS = 32
SPREAD = 0.1
"""The standard deviation of all weights, biases and norms too: nothing is left at zero or one, where errors hide."""

IGNORED = -100

HEADS: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8}
GATED = {**HEADS, "intermediate_size": 128, "num_key_value_heads": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
LATENT = {
    **GATED, "num_key_value_heads": 8, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
OF_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 8, "n_positions": 64}


@dataclass(frozen=True, slots=True)
class Family:
    """How people call it, the configuration's class, its values, and the class of the model."""

    label: str
    config: str
    values: dict[str, Any] = field(default_factory=dict)
    model: str = "AutoModelForCausalLM"


FAMILIES = {
    "llama": Family("Llama", "LlamaConfig", {**GATED, "max_position_embeddings": 64}),
    "mistral": Family(
        "Mistral", "MistralConfig", {**GATED, "max_position_embeddings": 64, "sliding_window": 8}
    ),
    "mixtral": Family("Mixtral", "MixtralConfig", {**GATED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": Family("Qwen2", "Qwen2Config", {**GATED, "num_key_value_heads": 2}),
    "qwen3": Family("Qwen3", "Qwen3Config", {**GATED, "head_dim": 16}),
    "qwen3_moe": Family(
        "Qwen3-MoE", "Qwen3MoeConfig", {**GATED, **EXPERTS, "head_dim": 16, "moe_intermediate_size": 32}
    ),
    "gpt2": Family("GPT-2", "GPT2Config", {**OF_GPT2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "gpt_neox": Family("GPT-NeoX", "GPTNeoXConfig", {**HEADS, "intermediate_size": 128}),
    "gptj": Family("GPT-J", "GPTJConfig", {**OF_GPT2, "rotary_dim": 4}),
    "opt": Family("OPT", "OPTConfig", {**HEADS, "ffn_dim": 128, "word_embed_proj_dim": 32, "dropout": 0.0}),
    "t5": Family(
        "T5", "T5Config",
        {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 8, "dropout_rate": 0.0,
         "decoder_start_token_id": 0},
        "AutoModelForSeq2SeqLM",
    ),
    "bloom": Family(
        "BLOOM", "BloomConfig",
        {"hidden_size": 64, "n_layer": 2, "n_head": 8, "hidden_dropout": 0.0, "attention_dropout": 0.0},
    ),
    "falcon": Family(
        "Falcon, new decoder", "FalconConfig", {**HEADS, "num_kv_heads": 4, "new_decoder_architecture": True}
    ),
    "falcon_mqa": Family(
        "Falcon, multi-query", "FalconConfig",
        {**HEADS, "multi_query": True, "new_decoder_architecture": False, "parallel_attn": True},
    ),
    "gemma2": Family("Gemma-2", "Gemma2Config", {**GATED, "head_dim": 16}),
    "deepseek_v2": Family("DeepSeek-V2", "DeepseekV2Config", LATENT),
    "deepseek_v3": Family("DeepSeek-V3", "DeepseekV3Config", LATENT),
    "olmoe": Family("OLMoE", "OlmoeConfig", {**HEADS, **EXPERTS, "intermediate_size": 32, "num_key_value_heads": 8}),
    "phi": Family("Phi", "PhiConfig", {**HEADS, "intermediate_size": 128}),
    "phi3": Family("Phi-3", "Phi3Config", GATED),
    "gpt_oss": Family(
        "gpt-oss", "GptOssConfig",
        {**GATED, "intermediate_size": 32, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "dbrx": Family(
        "DBRX", "DbrxConfig",
        {"d_model": 64, "n_heads": 8, "n_layers": 2, "max_seq_len": 64,
         "attn_config": {"kv_n_heads": 4, "clip_qkv": 8.0, "rope_theta": 10000.0, "attn_pdrop": 0.0},
         "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2,
                        "ffn_act_fn": {"name": "silu"}}},
    ),
    "mamba": Family("Mamba", "MambaConfig", {"hidden_size": 64, "state_size": 8, "num_hidden_layers": 2}),
    "vit": Family(
        "ViT", "ViTConfig", {**HEADS, "intermediate_size": 128, "image_size": PIXELS, "patch_size": 8, "num_labels": 10},
        "AutoModelForImageClassification",
    ),
    "bert": Family(
        "BERT", "BertConfig",
        {**HEADS, "intermediate_size": 128, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        "AutoModelForMaskedLM",
    ),
}  # fmt: skip


EXPERTS_SAID = {
    "mixtral": "num_local_experts", "qwen3_moe": "num_experts", "olmoe": "num_experts", "deepseek_v2": "n_routed_experts",
    "deepseek_v3": "n_routed_experts", "gpt_oss": "num_local_experts", "dbrx": "ffn_config.moe_num_experts",
}  # fmt: skip
"""Where the configuration of a mixture has its number of experts."""


def with_experts(family: str, experts: int) -> dict[str, Any]:
    """The values of a mixture's configuration, with another number of experts."""
    values = dict(FAMILIES[family].values)
    section, _, key = EXPERTS_SAID[family].rpartition(".")
    return values | ({section: values[section] | {key: experts}} if section else {key: experts})


def config(family: str, *, attention: str = "eager", experts: int | None = None) -> Any:
    """The configuration of a family; the same special tokens for all that have any."""
    spec = FAMILIES[family]
    values = spec.values if experts is None else with_experts(family, experts)
    words = {} if family == "vit" else {"vocab_size": TOKENS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    made = getattr(transformers, spec.config)(**{**words, **values})
    made._attn_implementation = attention
    return made


@torch.no_grad()
def model(family: str, *, attention: str = "eager", seed: int = 0, experts: int | None = None) -> Any:
    """A model of the family in torch's default dtype, in evaluation mode, every parameter drawn anew (in float32)."""
    made = getattr(transformers, FAMILIES[family].model).from_config(
        config(family, attention=attention, experts=experts)
    )
    made = made.to(torch.get_default_dtype()).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * SPREAD)
    return made


def batch(family: str) -> dict[str, Any]:
    """Two samples with labels, of which some count and some do not; the second one is padded at its end."""
    if family == "vit":
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn((SAMPLES, 3, PIXELS, PIXELS), generator=generator, dtype=torch.float32)
        return {"pixel_values": pixels.to(torch.get_default_dtype()), "labels": torch.tensor([3, 7])}
    ids = torch.arange(SAMPLES * LENGTH).reshape(SAMPLES, LENGTH) % (TOKENS - 8) + 3
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[0, :3] = IGNORED
    if family == "mamba":  # It takes no mask.
        return {"input_ids": ids, "labels": labels}
    mask[1, -4:] = 0
    labels[1, -4:] = IGNORED
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def loss(family: str, made: Any, inputs: dict[str, Any]) -> Tensor:
    """Cross entropy over the labels that count, in the model's dtype."""
    dtype = next(made.parameters()).dtype
    given: dict[str, Any] = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()
    }
    labels = given["labels"]
    if not made.config.is_encoder_decoder:
        given.pop("labels")
    if family not in ("vit", "bert"):
        given["use_cache"] = False
    logits = made(**given).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)
