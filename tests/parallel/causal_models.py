"""Tiny models of every causal language model type that transformers knows, made from its own configuration.

A configuration is shrunk by the names of its fields: widths, heads, layers, experts, vocabulary. Of the layers one of each
kind is kept. What the names do not tell stands in OVERRIDES.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

HIDDEN, HEADS, KV_HEADS, VOCABULARY, LENGTH = 64, 8, 4, 128, 16

Fields = dict[str, Any]

WIDTHS = re.compile(
    r"(hidden_size|d_model|n_embd|emb_dim|embedding_dim|lru_width|word_embed_proj_dim|embed_proj_dim|attention_hidden_size"
    r"|embedding_size|embed_dim)$"
)
"""Fields that are in proportion to the width of the model."""

SIZES: list[tuple[str, int]] = [
    (r"(vocab_size|vocab_size_per_layer_input|_group_vocab|output_vocab_size)$", VOCABULARY),
    (r"(moe|expert|experts)_.*(intermediate_size|ffn_hidden_size|ffn_dim)$", 32),
    (r"(intermediate_size|intermediate_size_mlp|ffn_dim|ffn_hidden_size|feed_forward_size)$", 128),
    (r"(dff|dim_ff|d_ff|n_inner|d_inner)$", 128),
    (r"^(encoder|decoder|num_encoder|num_decoder)_layers$", 2),
    (r"(num_query_groups|linear_num_key_heads)$", KV_HEADS),
    (r"(mamba_num_heads|mamba_n_heads|linear_num_heads|linear_num_value_heads)$", HEADS),
    (r"index_n_heads$", 2),
    (r"(num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_local_expert|zero_expert_num)$", 4),
    (r"(experts_per_tok|experts_per_token|moe_topk|moe_k|moe_top_k|top_k_experts)$", 2),
    (r"(n_group|num_expert_group)$", 2),
    (r"topk_group$", 1),
    (r"shared_experts$", 1),
    (r"(first_k_dense_replace|num_dense_layers|mlp_only_layers)$", 1),
    (r"q_lora_rank$", 24),
    (r"(lora_rank|_rank|lowrank)$", 16),
    (r"hidden_size_per_layer_input$", 16),
    (r"(index_head_dim|indexer_head_dim)$", 16),
    (r"qk_head_dim$", 16),
    (r"(d_state|state_size|time_step_rank|dt_rank)$", 8),
    (r"(nope_head_dim|rope_head_dim|v_head_dim|linear_head_dim|linear_(key|value)_head_dim|rotary_dim|d_rel)$", 8),
    (r"(mamba_d_head|mamba_head_dim|mamba_headdim)$", 16),
    (r"^(n_groups|mamba_n_groups|mamba_ngroups|o_groups)$", 2),
    (r"(sliding_window|sliding_window_size|window_size|local_attention|window_len)$", 8),
    (r"(chunk_size|block_size)$", 8),
    (r"(chunk_length|index_topk|chunk_size_lm_head)$", 4),
    (r"(position_embeddings|n_positions|max_seq_len|target_positions|n_ctx|context_length|rel_extent)$", 64),
    (r"(max_distance|num_buckets)$", 32),
]  # fmt: skip
"""At most so much. What matches first holds."""

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")
DROPPED = re.compile(r"(dropout|dropout_p|dropout_prob|pdrop|layerdrop|jitter_noise)$")
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

KEYS = re.compile(r"(num_key_value_heads|num_kv_heads|kv_n_heads)$")
QUERIES = re.compile(r"(attention_heads|^n_heads?|^num_heads)$")
UNSAID: Fields = {
    "head_dim": HIDDEN // HEADS, "num_key_value_heads": KV_HEADS, "num_experts_per_tok": 2, "n_routed_experts": 4,
    "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
"""What some types leave None and then need."""

ROPE = {"rope_theta": 10000.0, "rope_type": "default"}

OVERRIDES: dict[str, Fields] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt_local_encoder": {"hidden_size_global": HIDDEN},
    "blt_local_decoder": {"hidden_size_global": HIDDEN},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 4, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}},
    "dots3_note_vision_encoder": {"adapter_in_dim": HIDDEN, "adapter_out_dim": HIDDEN},
    "dots3_note_audio_encoder": {"adapter_input_size": HIDDEN, "adapter_out_dim": HIDDEN},
    "dots3_note_text": {
        "per_layer_config": {
            "02": {"num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 24, "qk_nope_head_dim": 16, "head_dim": 24}
        }
    },
    "dory": {
        "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp", "sliding_attention", "mlp"],
        "num_hidden_layers": 6, "n_input_layers": 2, "n_recurrent_layers": 2, "n_output_layers": 2,
    },
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_assistant": {
        "backbone_hidden_size": HIDDEN,
        "text_config": {
            "model_type": "gemma4_text", "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 128,
            "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": 16, "num_hidden_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 2, "sliding_window": 8,
            "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "per_layer_config": {},
        },
    },
    "gemma4_unified_assistant": {"backbone_hidden_size": HIDDEN},
    "gemma4_text": {"per_layer_config": {"01": {"head_dim": 32}}},
    "gemma4_unified_text": {"per_layer_config": {"01": {"head_dim": 32}}},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"], "full_attn_idxs": [1]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {"moe_layers": [1], "interleave_moe_layer_step": 2},
    "musicgen_decoder": {"num_codebooks": 2},
    "musicgen_melody_decoder": {"num_codebooks": 2},
    "qwen4_exp_text": {
        "indexer_head_dim": 16, "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds": False, "hash_seed": 0, "num_buckets": 4, "attn_layers": ["local", "lsh"]},
    "xlnet": {"d_head": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"], "num_hidden_layers": 4},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"], "num_hidden_layers": 4},
}  # fmt: skip
"""What a type needs beside what the names of its fields tell."""


TRAINED = ("reformer",)
"""Types that have gradients in training mode only."""


def shrunk(fields: Fields) -> Fields:
    """The fields of a configuration that are to be given another value, nested configurations included."""
    small: Fields = {}
    hidden = next(
        (fields[name] for name in ("hidden_size", "d_model", "n_embd", "emb_dim") if fields.get(name)), HIDDEN
    )
    for name, value in fields.items():
        if isinstance(value, dict) and "model_type" in value:
            small[name] = {"model_type": value["model_type"], **shrunk(value), **OVERRIDES.get(value["model_type"], {})}
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            small[name] = TOKENS.get(name, 3 + len(small) % 8)
        elif DROPPED.search(name) and isinstance(value, float):
            small[name] = 0.0
        elif isinstance(value, int) and not isinstance(value, bool):
            changed = _size(name, value, hidden)
            if changed != value:
                small[name] = changed
        elif value is None and name in UNSAID:
            small[name] = UNSAID[name]
    small.update({name: value for name, value in TOKENS.items() if name in fields})
    small.update(_head_dim(fields, hidden))
    small.update(_layers(fields))
    return small


def _size(name: str, value: int, hidden: int) -> int:
    if WIDTHS.search(name):
        return max(8, value * HIDDEN // hidden)
    if KEYS.search(name):
        return min(value, KV_HEADS)
    if QUERIES.search(name):
        return HEADS
    for pattern, most in SIZES:
        if re.search(pattern, name):
            return min(value, most)
    return value


def _head_dim(fields: Fields, hidden: int) -> Fields:
    """Heads as wide as the model divides into, or wider where the type makes them so."""
    found = {}
    for name in ("head_dim", "swa_head_dim", "kv_channels", "attention_head_size", "d_head", "dim_head"):
        if isinstance(fields.get(name), int):
            heads = fields.get("num_attention_heads", 1)
            found[name] = HIDDEN // HEADS if fields[name] * heads == hidden else 2 * HIDDEN // HEADS
    if fields.get("kv_lora_rank"):
        # Latent attention: as many heads of keys as of queries.
        found |= {name: HEADS for name in ("num_key_value_heads",) if name in fields}
        if fields.get("head_dim") == fields.get("qk_rope_head_dim"):
            found["head_dim"] = 8
    return found


def _layers(fields: Fields) -> Fields:
    """Two layers, or the first of each kind where lists say what each one is; the lists are cut with them."""
    count = next(((name, fields[name]) for name in LAYERS if isinstance(fields.get(name), int)), None)
    listed = {
        name: value
        for name, value in fields.items()
        if isinstance(value, list) and len(value) > 2 and (count is None or len(value) == count[1])
    }
    typed = {name: value for name, value in listed.items() if isinstance(value[0], str) or name == "no_rope_layers"}
    kept: list[int] = []
    seen: set[str] = set()
    for layer, kind in enumerate(zip(*typed.values(), strict=False)):
        if repr(kind) not in seen:
            seen.add(repr(kind))
            kept.append(layer)
    for layer in range(2):
        if len(kept) < 2 and layer not in kept:
            kept.append(layer)
    kept.sort()
    small: Fields = {}
    for name, value in listed.items():
        if len(value) > kept[-1]:
            chosen = [value[layer] for layer in kept]
            small[name] = [_size(name, one, HIDDEN) if type(one) is int else one for one in chosen]
    if count is not None:
        small[count[0]] = min(count[1], len(kept))
    return small


def types() -> list[str]:
    """All types, by the names that transformers gives them."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def configuration(kind: str) -> Any:
    """The small configuration of a type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    make: Callable[..., Any] = CONFIG_MAPPING[kind]
    own = OVERRIDES.get(kind, {})
    try:
        fields = make().to_dict()
    except Exception:
        fields = make(**own).to_dict()
    given = {**shrunk(fields), **own}
    if "is_decoder" in fields and not fields.get("is_encoder_decoder"):
        given["is_decoder"] = True
    config = make(**given)
    config._attn_implementation = "eager"
    return config


def build(config: Any) -> nn.Module:
    """The model with random weights, in evaluation mode where it has gradients there."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    cls = AutoModelForCausalLM._model_mapping[type(config)]
    if not isinstance(config, cls.config_class):
        # The class is for a part of the configuration: a decoder's, or that of text.
        config = next((part for part in vars(config).values() if isinstance(part, cls.config_class)), config)
        config._attn_implementation = "eager"
    return cls._from_config(config).float().train(config.model_type in TRAINED)
