"""Checkpoints of Megatron-LM, classic and torch_dist, written by megatron-core: what is read is what was put in, bit for bit."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.cases import cases
from tests.checkpoint.conftest import Covers, Made
from tests.checkpoint.megatron import PROMPT, STEPS
from trainrt.checkpoint.convert import convert
from trainrt.checkpoint.formats import open_any
from trainrt.checkpoint.formats.opened import Opened
from trainrt.checkpoint.inspect import verify
from trainrt.checkpoint.source import digest, read_whole
from trainrt.errors import CheckpointError, ConfigError

Options = dict[str, Any]
CLASSIC, DIST = "torch", "torch_dist"
UNEVEN: Options = {"world": 4, "tp": 2, "pp": 2, "first_stage": 1, "optimizer": "plain", "dtype": "bfloat16"}
WHOLE: Options = {"world": 1, "optimizer": "plain", "logits": True, "model": {"tied": True}}
STATES: dict[str, tuple[str, Options]] = {
    "classic, tp 2, pp 1 + 3, bfloat16": (CLASSIC, UNEVEN),
    "dist, tp 2, pp 1 + 3, bfloat16": (DIST, UNEVEN),
    "classic, one rank, tied": (CLASSIC, WHOLE),
}
LONG: dict[str, tuple[str, Options]] = {
    "dist, one rank, tied": (DIST, WHOLE),
    "classic, virtual stages, Qwen2": (
        CLASSIC, {"world": 2, "pp": 2, "vp": 2, "optimizer": "plain", "model": {"qkv_bias": True}},
    ),
    "dist, virtual stages, Qwen2": (DIST, {"world": 2, "pp": 2, "vp": 2, "optimizer": "plain", "model": {"qkv_bias": True}}),
    "classic, fewer groups than ranks, Qwen3": (CLASSIC, {"world": 4, "tp": 4, "optimizer": "plain", "model": {"qk_norm": True}}),
    "dist, fewer groups than ranks, Qwen3": (DIST, {"world": 4, "tp": 4, "optimizer": "plain", "model": {"qk_norm": True}}),
    "classic, distributed optimizer, tied over stages": (
        CLASSIC, {"world": 4, "pp": 2, "optimizer": "distributed", "dtype": "bfloat16", "model": {"tied": True}},
    ),
    "classic, distributed optimizer, float32": (CLASSIC, {"world": 2, "optimizer": "distributed"}),
    "dist, distributed optimizer, tied over stages": (
        DIST, {"world": 4, "pp": 2, "optimizer": "distributed", "dtype": "bfloat16", "model": {"tied": True}},
    ),
    "dist, distributed optimizer, float32": (DIST, {"world": 2, "optimizer": "distributed"}),
    "classic, Mixtral, tp 2, ep 2": (
        CLASSIC, {"world": 4, "tp": 2, "ep": 2, "optimizer": "plain", "dtype": "bfloat16", "model": {"experts": 4}},
    ),
    "classic, Qwen3-MoE, tp 2, ep 2, experts whole": (
        CLASSIC, {"world": 2, "tp": 2, "ep": 2, "etp": 1, "optimizer": "plain", "model": {"experts": 4, "qk_norm": True}},
    ),
    "classic, Mixtral, ep 2, distributed optimizer": (
        CLASSIC, {"world": 4, "ep": 2, "optimizer": "distributed", "dtype": "bfloat16", "model": {"experts": 4}},
    ),
    "dist, Mixtral, tp 2, ep 2": (DIST, {"world": 4, "tp": 2, "ep": 2, "optimizer": "plain", "model": {"experts": 4}}),
    "dist, Mixtral, a key for each layer and expert": (
        DIST, {"world": 2, "tp": 2, "singleton": True, "optimizer": "plain", "model": {"experts": 4}},
    ),
    "dist, a key for each layer": (DIST, {"world": 2, "tp": 2, "singleton": True, "optimizer": "plain"}),
}  # fmt: skip


def make(made: Made, form: str, options: Options) -> tuple[Path, dict[str, np.ndarray]]:
    return made("megatron", format=form, **options)


@pytest.mark.parametrize("case", cases([*STATES, *LONG], [case for case in STATES if case.startswith("classic")]))
def test_weights_masters_and_moments_are_those_that_were_put_in(case: str, made: Made, covers: Covers) -> None:
    form, options = {**STATES, **LONG}[case]
    covers("megatron" if form == CLASSIC else "megatron-dist", "read, bit for bit", case)
    path, expected = make(made, form, options)
    opened = open_any(path)
    assert opened.format == ("megatron" if form == CLASSIC else "megatron-dist")
    assert (opened.step, opened.unknown) == (STEPS, ["rng_state"])
    low = options.get("dtype") == "bfloat16"
    wanted = {key: value for key, value in expected.items() if key != "logits"}
    for key, value in wanted.items():
        role, _, name = key.partition("/")
        found = values(opened, name, role if low or role != "master" else "parameter")
        assert np.array_equal(found, value), key
        if low and role == "master":
            assert np.array_equal(values(opened, name, "parameter"), torch.from_numpy(value).bfloat16().float().numpy())
    names = {key.partition("/")[2] for key in wanted}
    assert len(opened.source.layout.tensors) == len(names) * (4 if low else 3)
    tied = options.get("model", {}).get("tied", False)
    assert opened.metadata["aliases"] == ({"lm_head.weight": "model.embed_tokens.weight"} if tied else {})
    optimizer = opened.metadata["optimizer"]
    assert optimizer["steps"] == dict.fromkeys(names, STEPS)
    decayed = {name: group["hyperparameters"]["wd_mult"] for group in optimizer["groups"] for name in group["tensors"]}
    assert decayed == {name: float(wanted[f"master/{name}"].ndim > 1) for name in names}
    assert opened.metadata["scheduler"]["lr_decay_style"] == "cosine"
    assert verify(path)["ok"]


def values(opened: Opened, name: str, role: str) -> np.ndarray:
    tensor = opened.source.layout.tensors[name, role]
    held = torch.from_numpy(read_whole(opened.source, tensor)).view(getattr(torch, tensor.dtype))
    return held.float().numpy().reshape(tensor.shape)


def test_digests_are_equal_over_meshes_and_both_formats(made: Made, request: pytest.FixtureRequest) -> None:
    meshes: list[Options] = [UNEVEN]
    if request.config.getoption("--campaign"):
        common = {"optimizer": "plain", "dtype": "bfloat16"}
        meshes += [{"world": 1, **common}, {"world": 2, "tp": 2, **common}, {"world": 4, "tp": 2, "pp": 2, **common}]
    found = []
    for options in meshes:
        for form in (CLASSIC, DIST):
            path, _ = make(made, form, options)
            found.append(digest(open_any(path).source))
            shutil.rmtree(path)
    assert all(one == found[0] for one in found) and len(found) == 2 * len(meshes)


MODELS: dict[str, Options] = {
    "tied": {"tied": True}, "untied": {}, "Qwen2": {"qkv_bias": True}, "Qwen3": {"qk_norm": True},
    "Mixtral": {"experts": 4}, "Qwen3-MoE": {"experts": 4, "qk_norm": True},
}  # fmt: skip


@pytest.mark.parametrize("case", cases(product(MODELS, [CLASSIC, DIST]), [("tied", CLASSIC)]), ids="-".join)
def test_the_model_that_hugging_face_loads_says_what_megatrons_does(
    case: tuple[str, str], made: Made, tmp_path: Path
) -> None:
    model, form = case
    path, expected = make(made, form, {**WHOLE, "model": MODELS[model]})
    document = convert(path, tmp_path / "hf", to="hf")
    assert [text.partition(":")[0] for text in document["lost"]] == ["rng_state", "exp_avg", "exp_avg_sq"]
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        found = loaded(torch.tensor(PROMPT)).logits.numpy()
    assert np.linalg.norm(found - expected["logits"]) <= 1e-5 * np.linalg.norm(expected["logits"])


def edit(path: Path, change: Callable[[dict[str, Any]], None], *, name: str = "model_optim_rng.pt") -> None:
    """Change what is in each of the classic files."""
    for file in path.rglob(name):
        state = torch.load(file, weights_only=False)
        change(state)
        torch.save(state, file)


def test_layers_of_transformer_engine_hold_the_same(made: Made) -> None:
    path, _ = make(made, CLASSIC, UNEVEN)
    local = digest(open_any(path).source)

    def rename(state: dict[str, Any]) -> None:
        names = {
            ".input_layernorm.": ".self_attention.linear_qkv.layer_norm_",
            ".pre_mlp_layernorm.": ".mlp.linear_fc1.layer_norm_",
        }
        for old, new in names.items():
            state["model"] = {name.replace(old, new): value for name, value in state["model"].items()}
        state["model"]["decoder.layers.0.mlp.linear_fc1._extra_state"] = torch.zeros(4, dtype=torch.uint8)

    edit(path, rename)
    assert digest(open_any(path).source) == local


def test_the_iteration_itself_will_do_and_a_release_has_none(made: Made) -> None:
    path, _ = make(made, CLASSIC, WHOLE)
    assert open_any(path / "iter_0000003").step == STEPS
    (path / "iter_0000003").rename(path / "release")
    (path / "latest_checkpointed_iteration.txt").write_text("release")
    edit(path, lambda state: state.pop("iteration"))
    assert open_any(path).step == 0


def test_a_file_that_is_missing_is_named(made: Made) -> None:
    path, _ = make(made, CLASSIC, UNEVEN)
    shutil.rmtree(path / "iter_0000003" / "mp_rank_01_001")
    with pytest.raises(CheckpointError, match="the file of tp 1, pp 1 is missing"):
        open_any(path)


def test_a_tied_copy_that_drifted_is_named_by_its_place_in_the_mesh(made: Made, tmp_path: Path) -> None:
    path, _ = make(made, CLASSIC, UNEVEN)

    def drift(state: dict[str, Any]) -> None:
        state["model"]["decoder.layers.0.input_layernorm.weight"][0] += state["model"].get("drift", 1)

    file = path / "iter_0000003" / "mp_rank_01_000" / "model_optim_rng.pt"
    edit(file.parent, drift)
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.input_layernorm\.weight .* differs: .*pp 0 tp 1"):
        convert(path, tmp_path / "hf", to="hf")


def test_numbers_come_from_the_config_where_there_are_no_arguments(made: Made) -> None:
    path, _ = make(made, CLASSIC, WHOLE)
    held = digest(open_any(path).source)
    config = {
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 61, "tie_word_embeddings": True,
    }  # fmt: skip
    with pytest.raises(CheckpointError, match=r"arguments say num_query_groups = 2, .* num_key_value_heads = 4"):
        open_any(path, model_config={**config, "num_key_value_heads": 4})
    edit(path, lambda state: state.pop("args"))
    with pytest.raises(ConfigError, match=r"args\.num_attention_heads is not in it: --model-config"):
        open_any(path)
    opened = open_any(path, model_config=config)
    assert digest(opened.source) == held and opened.metadata["model_config"] == config


def test_settings_that_no_model_of_hugging_face_has_are_named(made: Made, tmp_path: Path) -> None:
    path, _ = make(made, CLASSIC, WHOLE)
    edit(path, lambda state: vars(state["args"]).update(apply_layernorm_1p=True, window_size=(128, 0)))
    lost = convert(path, tmp_path / "hf", to="hf")["lost"]
    assert "args.apply_layernorm_1p: not understood" in lost and "args.window_size: not understood" in lost
    assert "config.json: not known (--model-config gives it)" in lost
    assert not (tmp_path / "hf" / "config.json").exists()


def test_an_optimizer_that_is_not_understood_is_left_out_and_named(made: Made) -> None:
    path, _ = make(made, CLASSIC, WHOLE)
    edit(path, lambda state: state["optimizer"]["param_groups"][0]["params"].pop())
    opened = open_any(path)
    assert {role for _, role in opened.source.layout.tensors} == {"parameter"}
    assert any("optimizer (a group has 16 parameters, 17 in the model belong to it)" in text for text in opened.unknown)
    assert opened.metadata["optimizer"] == {}


@pytest.mark.campaign
def test_buffers_by_rank_are_named_and_the_model_is_read(made: Made) -> None:
    path, _ = make(made, DIST, {"world": 2, "optimizer": "distributed", "sharding": "dp_reshardable"})
    opened = open_any(path)
    assert {role for _, role in opened.source.layout.tensors} == {"parameter"}
    assert opened.unknown == ["optimizer.distributed.*", "rng_state"]


def test_a_model_from_before_megatron_core_is_refused_by_name(made: Made) -> None:
    path, _ = make(made, CLASSIC, WHOLE)
    edit(path, lambda state: state.update(model={"language_model": {"encoder": {}}}))
    with pytest.raises(CheckpointError, match=r"from before megatron-core \(model\.language_model\)"):
        open_any(path)


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("/tmp/trainrt-was-here"),))


@pytest.mark.parametrize("file", ["model_optim_rng.pt", "distrib_optim.pt", "common.pt", ".metadata"])
@pytest.mark.parametrize("where", ["args", "rng_state", "beside"])
def test_a_pickle_that_would_do_something_is_refused_and_does_nothing(file: str, where: str, made: Made) -> None:
    form, options = (CLASSIC, WHOLE) if file.endswith("m_rng.pt") or file.startswith("d") else (DIST, UNEVEN)
    path, _ = make(made, form, options)
    if file == "distrib_optim.pt":
        torch.save({0: {}}, path / "iter_0000003" / "mp_rank_00" / file)
    if file == ".metadata":
        (path / "iter_0000003" / file).write_bytes(pickle.dumps({"state_dict_metadata": {where: Evil()}}))
    else:
        edit(path, lambda state: state.update({where: [{"np_rng_state": Evil()}]}), name=file)
    with pytest.raises(CheckpointError, match="refused"):
        open_any(path)
    assert not Path("/tmp/trainrt-was-here").exists()


def test_a_flipped_bit_is_found(made: Made, tmp_path: Path) -> None:
    path, _ = make(made, DIST, UNEVEN)
    opened = open_any(path)
    fragment = opened.source.layout.fragments["model.layers.2.mlp.up_proj.weight", "exp_avg"][0]
    file = Path(fragment.storage)
    data = bytearray(file.read_bytes())
    data[fragment.base + fragment.start * 4 + 5] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        convert(path, tmp_path / "universal", to="universal")
