"""What Megatron-LM keeps beside tensors, as a manifest has it; the config of a Hugging Face model is made of its arguments.

That is one of Llama, Qwen2, Qwen3, Mixtral or Qwen3-MoE.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainrt.checkpoint.formats.megatron_model import Facts
from trainrt.checkpoint.formats.megatron_optimizer import Groups, groups_of, optimizers_of, step_of
from trainrt.checkpoint.formats.opened import plain
from trainrt.parallel.layout import Layout

PLAIN: dict[str, tuple[Any, ...]] = {
    "normalization": ("RMSNorm",), "apply_layernorm_1p": (False,), "swiglu": (True,), "position_embedding_type": ("rope",),
    "rotary_percent": (1.0,), "rotary_interleaved": (False,), "rotary_seq_len_interpolation_factor": (None, 1),
    "no_rope_freq": (None,), "window_size": (None,), "multi_latent_attention": (False,), "attention_output_gate": (False,),
    "softmax_type": ("vanilla",), "mtp_num_layers": (None, 0), "heterogeneous_layers_config_path": (None,),
    "experimental_attention_variant": (None,), "linear_attention_freq": (None,),
}  # fmt: skip
"""Settings, and what they are in the models whose config is known here. One that is not there is as it should be."""
PLAIN_MOE: dict[str, tuple[Any, ...]] = {
    "moe_shared_expert_intermediate_size": (None, 0), "moe_layer_freq": (1,), "moe_router_score_function": ("softmax",),
    "moe_router_enable_expert_bias": (False,), "moe_router_group_topk": (None,), "moe_router_topk_scaling_factor": (None,),
    "moe_apply_probs_on_input": (False,), "moe_expert_capacity_factor": (None,), "moe_latent_size": (None,),
    "add_qkv_bias": (False,), "add_bias_linear": (False,),
}  # fmt: skip
WANTED = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "max_position_embeddings")


NOT_CARRIED = ("rng_state", "rerun_state_machine")


def metadata_of(
    facts: Facts, state: Mapping[str, Any], layout: Layout, groups: Groups, file: Path
) -> tuple[dict[str, Any], list[str]]:
    """The metadata of a checkpoint with this state (of any rank, in `file`), and what it has no place for."""
    parameters = {name: tensor for (name, role), tensor in layout.tensors.items() if role == "parameter"}
    against = [key for key in NOT_CARRIED if key in state]
    config = dict(facts.model_config)
    words = parameters.get("model.embed_tokens.weight")
    if not config and facts.arguments and words is not None:
        config, missing = _config_of(facts, words.dtype, words.shape[0])
        against += missing
    moved = [name for name, role in layout.tensors if role not in ("parameter", "master", "buffer")]
    optimizers = optimizers_of(state)
    step = step_of(optimizers, file) if moved else None
    optimizer = {
        "name": "sgd" if facts.arguments.get("optimizer") == "sgd" else "adamw",
        "groups": groups.document(parameters.values(), groups_of(optimizers)),
        "steps": dict.fromkeys(moved, step) if step is not None else {},
    }  # fmt: skip
    return {
        "step": int(state.get("iteration") or 0), "model_config": config, "optimizer": optimizer if moved else {},
        "aliases": {"lm_head.weight": "model.embed_tokens.weight"} if facts.tied else {},
        "scheduler": {key: value for key, value in (state.get("opt_param_scheduler") or {}).items() if plain(value)},
    }, against  # fmt: skip


def _config_of(facts: Facts, dtype: str, vocabulary: int) -> tuple[dict[str, Any], list[str]]:
    """The config, and the settings that stand against one: with any, it is empty."""
    arguments = facts.arguments
    against = [f"args.{key}" for key in WANTED if not isinstance(arguments.get(key), int)]
    plain = PLAIN | (PLAIN_MOE if arguments.get("num_experts") else {})
    against += [f"args.{key}" for key, allowed in plain.items() if arguments.get(key, allowed[0]) not in allowed]
    if arguments.get("qk_layernorm"):
        against += [f"args.{key}" for key in ("add_bias_linear", "add_qkv_bias") if arguments.get(key)]
    if arguments.get("num_experts") and arguments.get("moe_router_pre_softmax") and not facts.qwen:
        against.append("args.moe_router_pre_softmax")
    return ({} if against else _config(facts, dtype, vocabulary)), against


def _config(facts: Facts, dtype: str, vocabulary: int) -> dict[str, Any]:
    arguments = facts.arguments
    size = arguments.get("kv_channels") or arguments["hidden_size"] // facts.heads
    base = arguments.get("rotary_base", 10000)
    # Without tokens of its own choice, a model would get those of its class's defaults.
    return {
        "vocab_size": vocabulary, "hidden_size": arguments["hidden_size"], "num_hidden_layers": arguments["num_layers"],
        "intermediate_size": arguments["ffn_hidden_size"], "num_attention_heads": facts.heads,
        "num_key_value_heads": facts.groups, "head_dim": size, "hidden_act": "silu",
        "max_position_embeddings": arguments["max_position_embeddings"], "rms_norm_eps": _epsilon(arguments),
        "rope_theta": float(base), "rope_scaling": _scaling(arguments), "tie_word_embeddings": facts.tied,
        "attention_dropout": arguments.get("attention_dropout", 0.0), "dtype": dtype, "torch_dtype": dtype,
        "bos_token_id": None, "eos_token_id": None,
    } | _kind(facts)  # fmt: skip


def _kind(facts: Facts) -> dict[str, Any]:
    arguments = facts.arguments
    if arguments.get("num_experts"):
        experts = {"num_experts_per_tok": arguments["moe_router_topk"]}
        width = arguments.get("moe_ffn_hidden_size") or arguments["ffn_hidden_size"]
        if not facts.qwen:
            experts |= {"num_local_experts": arguments["num_experts"], "intermediate_size": width}
            return _named("Mixtral", "mixtral") | experts
        return _named("Qwen3Moe", "qwen3_moe") | experts | {
            "num_experts": arguments["num_experts"], "moe_intermediate_size": width, "mlp_only_layers": [],
            "decoder_sparse_step": 1, "norm_topk_prob": not arguments.get("moe_router_pre_softmax", False),
        }  # fmt: skip
    if arguments.get("qk_layernorm"):
        return _named("Qwen3", "qwen3")
    biased = bool(arguments.get("add_bias_linear", False))
    if arguments.get("add_qkv_bias") and not biased:
        return _named("Qwen2", "qwen2")
    return _named("Llama", "llama") | {"attention_bias": biased, "mlp_bias": biased}


def _named(name: str, kind: str) -> dict[str, Any]:
    return {"architectures": [f"{name}ForCausalLM"], "model_type": kind}


def _epsilon(arguments: Mapping[str, Any]) -> float:
    """Of the norms; the argument's name changed."""
    return float(arguments.get("norm_epsilon", arguments.get("layernorm_epsilon", 1e-5)))


def _scaling(arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    """Llama 3's, as megatron-core computes it."""
    if not arguments.get("use_rope_scaling"):
        return None
    return {
        "rope_type": "llama3", "factor": float(arguments.get("rope_scaling_factor", 8.0)), "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
