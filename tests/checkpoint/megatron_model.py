"""Models in the tests of Megatron: known tensors by their names in Hugging Face, and what Megatron makes of them."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MODEL: dict[str, Any] = {
    "layers": 4, "hidden": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn": 48, "vocab": 61, "tied": False,
    "qkv_bias": False, "qk_norm": False, "experts": 0,
}  # fmt: skip


def shapes(model: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The model's tensors as Hugging Face names them: Llama, Qwen2, Qwen3, Mixtral or Qwen3-MoE."""
    hidden, ffn, size = model["hidden"], model["ffn"], model["head_dim"]
    wide = {"q": model["heads"] * size, "k": model["kv_heads"] * size, "v": model["kv_heads"] * size}
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (model["vocab"], hidden)}
    for layer in range(model["layers"]):
        here = f"model.layers.{layer}."
        found |= {f"{here}{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
        found |= {f"{here}self_attn.{x}_proj.weight": (rows, hidden) for x, rows in wide.items()}
        if model["qkv_bias"]:
            found |= {f"{here}self_attn.{x}_proj.bias": (rows,) for x, rows in wide.items()}
        if model["qk_norm"]:
            found |= {f"{here}self_attn.{x}_norm.weight": (size,) for x in "qk"}
        found[f"{here}self_attn.o_proj.weight"] = (hidden, wide["q"])
        if model["experts"]:
            found[f"{here}{moe_names(model)[0]}.gate.weight"] = (model["experts"], hidden)
        for gate, up, down in mlp_names(model):
            found |= {f"{here}{gate}": (ffn, hidden), f"{here}{up}": (ffn, hidden), f"{here}{down}": (hidden, ffn)}
    found["model.norm.weight"] = (hidden,)
    return found if model["tied"] else found | {"lm_head.weight": (model["vocab"], hidden)}


def moe_names(model: dict[str, Any]) -> tuple[str, tuple[str, str, str]]:
    if model["qk_norm"]:
        return "mlp", ("gate_proj", "up_proj", "down_proj")
    return "block_sparse_moe", ("w1", "w3", "w2")


def mlp_names(model: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(gate, up, down) of a layer, or of each of its experts."""
    if not model["experts"]:
        return [("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")]
    home, (gate, up, down) = moe_names(model)
    names = [f"{home}.experts.{expert}." for expert in range(model["experts"])]
    return [(f"{name}{gate}.weight", f"{name}{up}.weight", f"{name}{down}.weight") for name in names]


def known(role: str, name: str, shape: tuple[int, ...]) -> Tensor:
    """What is held under a role and a name, in float32: the same in every process and on every mesh."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{role}/{name}".encode()))
    value = torch.randn(shape, generator=generator)
    if role == "exp_avg_sq":
        return value.square()
    return 1 + 0.1 * value if "norm" in name and role == "master" else 0.2 * value


Held = Callable[[str], Tensor]


def stored(name: str, held: Held, model: dict[str, Any], padded: int) -> list[Tensor]:
    """What Megatron keeps under a name (with the number of the layer and of the expert in the whole model), whole.

    Several tensors: each is cut over the ranks by itself, and their pieces are joined.
    """
    if "word_embeddings" in name or "output_layer" in name:
        rows = held("lm_head.weight" if "output_layer" in name and not model["tied"] else "model.embed_tokens.weight")
        return [torch.cat([rows, torch.full((padded - len(rows), model["hidden"]), 7.0)])]
    if name == "decoder.final_layernorm.weight":
        return [held("model.norm.weight")]
    _, _, layer, rest = name.split(".", 3)
    here = f"model.layers.{layer}."
    if rest.startswith("self_attention.linear_qkv."):
        groups = model["kv_heads"]
        q, k, v = (held(f"{here}self_attn.{x}_proj.{rest.rsplit('.')[-1]}") for x in "qkv")
        return [torch.cat([x.unflatten(0, (groups, -1)) for x in (q, k, v)], 1).flatten(0, 1)]
    plain = {
        "input_layernorm.weight": "input_layernorm.weight",
        "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
        "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
        "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
        "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
        "mlp.router.weight": f"{moe_names(model)[0]}.gate.weight",
    }
    if rest in plain:
        return [held(f"{here}{plain[rest]}")]
    expert = int(rest.split(".")[3]) if "local_experts" in rest else 0
    gate, up, down = mlp_names(model)[expert]
    return [held(f"{here}{gate}"), held(f"{here}{up}")] if "linear_fc1" in rest else [held(f"{here}{down}")]


def as_local_layers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model of Transformer Engine's layers under the names of megatron-core's own, which are all that a CPU has."""
    names = {
        ".self_attention.linear_qkv.layer_norm_": ".input_layernorm.",
        ".mlp.linear_fc1.layer_norm_": ".pre_mlp_layernorm.",
    }
    found = state
    for old, new in names.items():
        found = {name.replace(old, new): value for name, value in found.items()}
    return found
