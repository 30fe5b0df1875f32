"""A framework that nobody thought of: its checkpoint is read by a mapping of a few lines."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.frameworks import llama
from trainrt.checkpoint.convert import convert
from trainrt.checkpoint.formats import open_any
from trainrt.checkpoint.source import digest
from trainrt.errors import CheckpointError, ConfigError, UserError

MAPPING = """
format = "mine"
files = "stage{pp}/rank_{tp}.pt"
inside = "weights"

[variables]
vocabulary = "vocab_size"
kv_heads = "num_key_value_heads"
heads = "num_attention_heads"

[[tensor]]
stored = "words"
holds = 'shard(pad("model.embed_tokens.weight", length=vocabulary, multiple=16), axis="tp")'
[[tensor]]
stored = "out"
holds = 'shard(pad("lm_head.weight", length=vocabulary, multiple=16), axis="tp")'
[[tensor]]
stored = "final"
holds = '"model.norm.weight"'
[[tensor]]
stored = "block.{l}.qkv"
holds = '''shard(interleave(
    "model.layers.{l + first}.self_attn.q_proj.weight", "model.layers.{l + first}.self_attn.k_proj.weight",
    "model.layers.{l + first}.self_attn.v_proj.weight", groups=kv_heads, sizes=(heads // kv_heads, 1, 1)), axis="tp")'''
[[tensor]]
stored = "block.{l}.o"
holds = 'transpose(shard("model.layers.{l + first}.self_attn.o_proj.weight", axis="tp", dim=1))'
[[tensor]]
stored = "block.{l}.w1"
holds = '''concat(shard("model.layers.{l + first}.mlp.gate_proj.weight", axis="tp"),
    shard("model.layers.{l + first}.mlp.up_proj.weight", axis="tp"))'''
[[tensor]]
stored = "block.{l}.w2"
holds = 'shard("model.layers.{l + first}.mlp.down_proj.weight", axis="tp", dim=1)'
[[tensor]]
stored = "block.{l}.norm1"
holds = '"model.layers.{l + first}.input_layernorm.weight"'
[[tensor]]
stored = "block.{l}.norm2"
holds = '"model.layers.{l + first}.post_attention_layernorm.weight"'

[roles]
exp_avg = "adam.{name}.m"
"""
TP, STAGES = 2, (2, 1)


def save_mine(model: Any, folder: Path) -> None:
    """How that framework saves: written with plain torch, not with what is tested."""
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    config = model.config
    groups, size = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    first = 0
    for stage, count in enumerate(STAGES):
        for rank in range(TP):
            mine: dict[str, torch.Tensor] = {}
            if stage == 0:
                mine["words"] = (
                    torch.nn.functional.pad(state["model.embed_tokens.weight"], (0, 0, 0, 3)).chunk(TP)[rank].clone()
                )
            if stage == len(STAGES) - 1:
                mine["out"] = torch.nn.functional.pad(state["lm_head.weight"], (0, 0, 0, 3)).chunk(TP)[rank].clone()
                mine["final"] = state["model.norm.weight"]
            for layer in range(count):
                old = f"model.layers.{first + layer}."
                q, k, v = (
                    state[f"{old}self_attn.{x}_proj.weight"].view(groups, -1, size, config.hidden_size) for x in "qkv"
                )
                fused = torch.cat([q, k, v], 1).reshape(-1, config.hidden_size)
                gate, up = (state[f"{old}mlp.{x}_proj.weight"].chunk(TP)[rank] for x in ("gate", "up"))
                new = f"block.{layer}."
                mine[f"{new}qkv"] = fused.chunk(TP)[rank].clone()
                mine[f"{new}o"] = state[f"{old}self_attn.o_proj.weight"].chunk(TP, 1)[rank].t().contiguous()
                mine[f"{new}w1"] = torch.cat([gate, up])
                # A view with strides of its own, as pickles may hold.
                mine[f"{new}w2"] = state[f"{old}mlp.down_proj.weight"].chunk(TP, 1)[rank]
                mine[f"{new}norm1"] = state[f"{old}input_layernorm.weight"]
                mine[f"{new}norm2"] = state[f"{old}post_attention_layernorm.weight"]
            moments = {f"adam.{name}.m": -tensor for name, tensor in mine.items()}
            path = folder / f"stage{stage}" / f"rank_{rank}.pt"
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"weights": {**mine, **moments}, "step": 7}, path)
        first += count


def test_it_is_read_by_a_mapping_and_loaded_by_transformers(tmp_path: Path) -> None:
    model = llama(num_hidden_layers=3)
    save_mine(model, tmp_path / "mine")
    model.save_pretrained(tmp_path / "hf")
    (tmp_path / "mine.toml").write_text(MAPPING)
    document = convert(
        tmp_path / "mine",
        tmp_path / "universal",
        to="universal",
        mapping=tmp_path / "mine.toml",
        model_config=tmp_path / "hf",
    )
    assert (document["source_format"], document["lost"]) == ("mine", [])
    found, wanted = digest(open_any(tmp_path / "universal").source), digest(open_any(tmp_path / "hf").source)
    assert {key: value for key, value in found.items() if key[1] == "parameter"} == wanted
    assert {name for name, role in found if role == "exp_avg"} == {name for name, _ in wanted}
    loaded = type(model).from_pretrained(tmp_path / "universal" / "model")
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )


def test_a_replica_that_drifted_is_named_by_its_place_in_the_mesh(tmp_path: Path) -> None:
    model = llama(num_hidden_layers=3)
    save_mine(model, tmp_path / "mine")
    model.save_pretrained(tmp_path / "hf")
    (tmp_path / "mine.toml").write_text(MAPPING)
    path = tmp_path / "mine" / "stage0" / "rank_1.pt"
    state = torch.load(path)
    state["weights"]["block.1.norm2"] = state["weights"]["block.1.norm2"] + 1
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"layers\.1\.post_attention_layernorm\.weight \(parameter\).*pp 0 tp 1"):
        convert(
            tmp_path / "mine", tmp_path / "out", to="hf", mapping=tmp_path / "mine.toml", model_config=tmp_path / "hf"
        )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('format = "mine"', 'fromat = "mine"', "format: field required"),
        ("rank_{tp}.pt", "part_{tp}.pt", "no file 'stage{pp}/part_{tp}.pt'"),
        ('inside = "weights"', 'inside = "model"', "no 'model' in it"),
        ('"vocab_size"', '"vocabulary_size"', "variable vocabulary = 'vocabulary_size'"),
        ('axis="tp", dim=1))', 'axis="ep", dim=1))', "shard over 'ep': the files have the axes ['pp', 'tp']"),
    ],
)
def test_a_wrong_mapping_is_refused_with_what_is_wrong(old: str, new: str, message: str, tmp_path: Path) -> None:
    model = llama(num_hidden_layers=3)
    save_mine(model, tmp_path / "mine")
    model.config.save_pretrained(tmp_path / "hf")
    (tmp_path / "mine.toml").write_text(MAPPING.replace(old, new))
    with pytest.raises(UserError) as error:
        convert(
            tmp_path / "mine",
            tmp_path / "out",
            to="universal",
            mapping=tmp_path / "mine.toml",
            model_config=tmp_path / "hf",
        )
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("/tmp/trainrt-was-here"),))


@pytest.mark.parametrize("where", ["weights", "beside"])
def test_a_pickle_that_would_do_something_is_refused_and_does_nothing(where: str, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(MAPPING)
    path = tmp_path / "mine" / "stage0" / "rank_0.pt"
    path.parent.mkdir(parents=True)
    torch.save({"weights": Evil() if where == "weights" else {}, "beside": Evil()}, path)
    with pytest.raises(CheckpointError, match="refused"):
        convert(tmp_path / "mine", tmp_path / "out", to="universal", mapping=tmp_path / "mine.toml")
    assert not Path("/tmp/trainrt-was-here").exists()
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match=r"no zip file"):
        convert(tmp_path / "mine", tmp_path / "out", to="universal", mapping=tmp_path / "mine.toml")
    assert not Path("/tmp/trainrt-was-here").exists()


def test_a_mapping_may_be_python(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(6.0).view(2, 3)}, tmp_path / "only.pt")
    (tmp_path / "m.py").write_text(
        'MAPPING = {"format": "x", "files": "only.pt", "tensor": [{"stored": "w", "holds": "\\"w\\""}]}'
    )
    convert(tmp_path, tmp_path.parent / "out", to="universal", mapping=tmp_path / "m.py")
    with pytest.raises(ConfigError, match="no MAPPING in it"):
        (tmp_path / "m.py").write_text("x = 1")
        convert(tmp_path, tmp_path.parent / "out2", to="universal", mapping=tmp_path / "m.py")
