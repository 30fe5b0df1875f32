"""Checkpoints of Megatron-LM, classic and torch_dist, written by megatron-core: what is read is what was put in, bit for bit."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.checkpoint import frameworks
from tests.checkpoint.conftest import Covers, Made
from tests.checkpoint.frameworks import llama
from tests.checkpoint.megatron import PROMPT, STEPS
from trainrt.checkpoint.convert import convert
from trainrt.checkpoint.formats import open_any
from trainrt.checkpoint.formats.files import FileSource
from trainrt.checkpoint.formats.opened import Opened
from trainrt.checkpoint.inspect import verify
from trainrt.checkpoint.source import digest, read_whole
from trainrt.checkpoint.targets import Shape, make_target
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


@pytest.mark.parametrize("case", [*STATES, *LONG])
def test_weights_masters_and_moments_are_those_that_were_put_in(
    case: str, made: Made, request: pytest.FixtureRequest, covers: Covers
) -> None:
    if case in LONG and not request.config.getoption("--campaign"):
        pytest.skip("the long form runs with --campaign")
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


@pytest.mark.parametrize("form", [CLASSIC, DIST])
@pytest.mark.parametrize("model", MODELS)
def test_the_model_that_hugging_face_loads_says_what_megatrons_does(
    model: str, form: str, made: Made, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if (model, form) != ("tied", CLASSIC) and not request.config.getoption("--campaign"):
        pytest.skip("the long form runs with --campaign")
    path, expected = make(made, form, {**WHOLE, "model": MODELS[model]})
    document = convert(path, tmp_path / "hf", to="hf")
    assert [text.partition(":")[0] for text in document["lost"]] == ["rng_state", "exp_avg", "exp_avg_sq"]
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        found = loaded(torch.tensor(PROMPT)).logits.numpy()
    assert np.linalg.norm(found - expected["logits"]) <= 1e-5 * np.linalg.norm(expected["logits"])


ON_TWO: Options = {"world": 2, "tp": 2}
ON_FOUR: Options = {"world": 4, "tp": 2, "pp": 2}
LOADED: dict[str, tuple[str, Shape, Options]] = {
    "dist, tp 2, pp 2": (DIST, Shape(), {**ON_FOUR, "divisible": 64}),
    "classic, tp 2, pp 2": (CLASSIC, Shape(tp=2, pp=2), {**ON_FOUR, "divisible": 128}),
    "dist, tp 2": (DIST, Shape(), {**ON_TWO, "divisible": 64}),
    "classic, one rank": (CLASSIC, Shape(), {"world": 1, "divisible": 128}),
    "classic, one rank, float32": (CLASSIC, Shape(), {"world": 1, "divisible": 128, "dtype": "float32"}),
    "dist, tp 2, float32": (DIST, Shape(), {**ON_TWO, "divisible": 64, "dtype": "float32"}),
    "classic, tp 2, pp 2, tied": (CLASSIC, Shape(tp=2, pp=2), {**ON_FOUR, "divisible": 128, "model": {"tied": True}}),
    "classic, tp 2, Qwen2": (CLASSIC, Shape(tp=2), {**ON_TWO, "divisible": 128, "model": {"qkv_bias": True}}),
    "classic, tp 2, pp 2, Qwen3": (CLASSIC, Shape(tp=2, pp=2), {**ON_FOUR, "divisible": 128, "model": {"qk_norm": True}}),
    "classic, tp 2, Mixtral of 12": (CLASSIC, Shape(tp=2), {**ON_TWO, "divisible": 128, "model": {"experts": 12}}),
    "dist, tp 2, Mixtral of 12": (DIST, Shape(), {**ON_TWO, "divisible": 64, "model": {"experts": 12}}),
}  # fmt: skip


@pytest.mark.parametrize("case", LOADED)
def test_megatron_loads_what_was_written_on_another_mesh(
    case: str, made: Made, tmp_path: Path, request: pytest.FixtureRequest, covers: Covers
) -> None:
    if case not in ("dist, tp 2", "classic, one rank") and not request.config.getoption("--campaign"):
        pytest.skip("the long form runs with --campaign")
    form, shape, mesh = LOADED[case]
    path, _ = make(made, DIST, {**UNEVEN, **{key: mesh[key] for key in ("dtype", "model") if key in mesh}})
    convert(path, tmp_path / "universal", to="universal")
    to = "megatron" if form == CLASSIC else "megatron-dist"
    covers(to, "written, loaded by megatron-core, equal bit for bit", case)
    document = convert(tmp_path / "universal", tmp_path / "there", to=to, shape=shape)
    assert digest(open_any(tmp_path / "there").source) == digest(open_any(path).source)
    assert [text.partition(":")[0] for text in document["lost"]] == ["rng"]
    # Megatron itself compares, with tensors that are known without us.
    options = {"optimizer": "plain", "dtype": "bfloat16", "format": form, "load": str(tmp_path / "there"), **mesh}
    (tmp_path / "after").mkdir()
    frameworks.make("megatron", tmp_path / "after", **options)


FULL: Options = {"optimizer": "plain", "divisible": 128, "model": {"vocab": 256}}
"""A vocabulary without padding, whose values are not kept."""
BF16: Options = {**FULL, "dtype": "bfloat16"}
TIED: Options = {**FULL, "model": {"vocab": 256, "tied": True}}
CONTINUED: dict[str, tuple[str, Options, str, Shape]] = {
    "classic, tp 2, bfloat16": (CLASSIC, {**BF16, **ON_TWO}, CLASSIC, Shape(tp=2)),
    "classic, tp 2, pp 2, float32": (CLASSIC, {**FULL, **ON_FOUR}, CLASSIC, Shape(tp=2, pp=2)),
    "classic, tp 2, pp 2, bfloat16, Qwen2": (
        CLASSIC, {**BF16, **ON_FOUR, "model": {"vocab": 256, "qkv_bias": True}}, CLASSIC, Shape(tp=2, pp=2),
    ),
    "classic, pp 2, tied over stages": (CLASSIC, {**TIED, "world": 2, "pp": 2}, CLASSIC, Shape(pp=2)),
    "classic, pp 2, Mixtral": (
        CLASSIC, {**FULL, "world": 2, "pp": 2, "model": {"vocab": 256, "experts": 4}}, CLASSIC, Shape(pp=2),
    ),
    "dist, tp 2, pp 2, float32": (DIST, {**FULL, **ON_FOUR}, DIST, Shape()),
    "dist, tp 2, pp 2, bfloat16, tied": (DIST, {**TIED, **ON_FOUR, "dtype": "bfloat16"}, DIST, Shape()),
    "dist to classic, tp 2, bfloat16": (DIST, {**BF16, **ON_TWO}, CLASSIC, Shape(tp=2)),
    "classic to dist, tp 2, bfloat16": (CLASSIC, {**BF16, **ON_TWO}, DIST, Shape()),
    "classic, FusedAdam, bfloat16": (CLASSIC, {**BF16, "world": 1, "adam": "fused"}, CLASSIC, Shape()),
    "dist, FusedAdam, float32": (DIST, {**FULL, "world": 1, "adam": "fused"}, DIST, Shape()),
    "classic, for FusedAdam, float32": (CLASSIC, {**FULL, "world": 1}, CLASSIC, Shape(adam="fused")),
    "dist, for torch's Adam, bfloat16": (DIST, {**BF16, "world": 1, "adam": "fused"}, DIST, Shape(adam="torch")),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTINUED)
def test_megatron_goes_on_as_if_it_had_never_stopped(
    case: str, made: Made, tmp_path: Path, request: pytest.FixtureRequest, covers: Covers
) -> None:
    if case != "classic, tp 2, bfloat16" and not request.config.getoption("--campaign"):
        pytest.skip("the long form runs with --campaign")
    form, options, target, shape = CONTINUED[case]
    to = "megatron" if target == CLASSIC else "megatron-dist"
    covers(to, "written, loaded by megatron-core, same losses", case)
    losses, there = go_on(made, tmp_path, form, options, to, shape)
    assert np.array_equal(there, losses) and len({*losses.tolist()}) == STEPS


def go_on(
    made: Made, tmp_path: Path, form: str, options: Options, to: str, shape: Shape, *,
    mesh: Options | None = None, change: Callable[[Path], None] = lambda _: None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """A run of Megatron's, and one that goes on from what was converted: the losses of the same steps, in both.

    `mesh`: of the second one, where it is another.
    """
    path, _ = made("megatron-training", format=form, **options)
    convert(path, tmp_path / "universal", to="universal")
    document = convert(tmp_path / "universal", tmp_path / "there", to=to, shape=shape)
    assert [text.partition(":")[0] for text in document["lost"]] == ["rng"]
    assert verify(tmp_path / "there")["ok"]
    whole = digest(open_any(path).source)
    assert digest(open_any(tmp_path / "universal").source) == digest(open_any(tmp_path / "there").source) == whole
    assert {role for _, role in whole} - {"master"} == {"parameter", "exp_avg", "exp_avg_sq"}
    change(tmp_path / "there")
    (tmp_path / "after").mkdir()
    loading = {"format": CLASSIC if to == "megatron" else DIST, "load": str(tmp_path / "there")}
    adam = {"adam": shape.adam} if shape.adam is not None else {}
    frameworks.make("megatron-training", tmp_path / "after", **{**options, **(mesh or {}), **adam, **loading})
    return np.load(path.parent / "losses.npy"), np.load(tmp_path / "after" / "losses.npy")


@pytest.mark.parametrize(
    ("to", "shape"), [("megatron", Shape()), ("megatron", Shape(pp=2)), ("megatron-dist", Shape())]
)
def test_megatron_goes_on_on_another_mesh(
    to: str, shape: Shape, made: Made, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if not request.config.getoption("--campaign"):
        pytest.skip("the long form runs with --campaign")
    pp = shape.pp or 1
    mesh = {"world": pp, "tp": 1, "pp": pp}
    losses, there = go_on(made, tmp_path, CLASSIC, {**FULL, **ON_FOUR}, to, shape, mesh=mesh)
    assert np.allclose(there, losses, rtol=1e-5)


def perturb(states: dict[int, Any]) -> None:
    states[1]["exp_avg"][0] += 0.01


def exchange(states: dict[int, Any]) -> None:
    """The output projections of two layers, of one shape."""
    states[1], states[5] = states[5], states[1]


def forget(states: dict[int, Any]) -> None:
    """The number of steps, of one parameter."""
    states[1]["step"].zero_()


@pytest.mark.parametrize("change", [perturb, exchange, forget])
def test_losses_show_an_optimizer_that_is_not_the_same(
    change: Callable[[dict[int, Any]], None], made: Made, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if change is not perturb and not request.config.getoption("--campaign"):
        pytest.skip("the long form runs with --campaign")
    losses, there = go_on(
        made, tmp_path, CLASSIC, {**BF16, **ON_TWO}, "megatron", Shape(tp=2),
        change=lambda path: edit(path, lambda state: change(state["optimizer"]["optimizer"]["state"])),
    )  # fmt: skip
    assert there[0] == losses[0] and not np.isclose(there[1:], losses[1:], rtol=1e-6).any()


def test_the_optimizer_of_another_framework_goes_to_megatron_and_back(made: Made, tmp_path: Path) -> None:
    path, _ = made("dcp", world=2)
    llama().config.save_pretrained(tmp_path / "config")
    convert(path, tmp_path / "universal", to="universal", model_config=tmp_path / "config")
    for to, shape in (("megatron", Shape(tp=2, pp=2)), ("megatron-dist", Shape(adam="fused"))):
        lost = convert(tmp_path / "universal", tmp_path / to, to=to, shape=shape)["lost"]
        assert [text.partition(":")[0] for text in lost] == ["rng", "weight_decay of norms and biases", "scheduler"]
        opened = open_any(tmp_path / to)
        assert digest(opened.source) == digest(open_any(tmp_path / "universal").source)
        steps = opened.metadata["optimizer"]["steps"]
        assert steps == open_any(tmp_path / "universal").metadata["optimizer"]["steps"] and {*steps.values()} == {3}
        assert opened.metadata["scheduler"]["lr_decay_style"] == "constant"


def drop_a_moment(opened: Opened) -> None:
    layout = opened.source.layout.only(lambda tensor, _: tensor.key != ("model.norm.weight", "exp_avg"))
    opened.source = FileSource(layout)


def split_a_group(opened: Opened) -> None:
    groups = opened.metadata["optimizer"]["groups"]
    groups[0]["tensors"].remove("model.embed_tokens.weight")
    groups.append(
        {"tensors": ["model.embed_tokens.weight"], "hyperparameters": {**groups[0]["hyperparameters"], "lr": 1.0}}
    )


def count_apart(opened: Opened) -> None:
    optimizer = opened.metadata["optimizer"]
    optimizer["steps"] |= dict.fromkeys(optimizer["groups"][1]["tensors"], 7)


@pytest.mark.parametrize("to", ["megatron", "megatron-dist"])
@pytest.mark.parametrize(
    ("change", "lost"),
    [
        (drop_a_moment, ["exp_avg", "exp_avg_sq"]),
        (split_a_group, ["settings of matrices"]),
        (count_apart, ["steps"]),
        (lambda opened: opened.metadata["optimizer"].pop("steps"), ["steps"]),
        (lambda opened: opened.metadata.pop("scheduler"), ["scheduler"]),
    ],
)
def test_what_megatrons_optimizer_has_no_place_for_is_named(
    change: Callable[[Opened], None], lost: list[str], to: str, made: Made
) -> None:
    path, _ = make(made, CLASSIC, WHOLE)
    opened = open_any(path)
    change(opened)
    assert [text.partition(":")[0] for text in make_target(opened, to, Shape())[2]] == ["rng", *lost]


@pytest.mark.parametrize(
    ("config", "shape", "message"),
    [
        ({"model_type": "gpt2"}, Shape(), "model_type 'gpt2'; allowed: llama, mistral"),
        ({}, Shape(pp=3), "--mesh pp=3: Megatron cuts layers evenly"),
        ({}, Shape(tp=4), "--mesh tp=4: 2 KV heads do not divide"),
        ({}, Shape(world=2), "--world: --to megatron is not cut by it"),
    ],
)
def test_a_model_or_a_mesh_that_megatron_does_not_have_is_refused(
    config: Options, shape: Shape, message: str, tmp_path: Path
) -> None:
    llama().save_pretrained(tmp_path / "hf")
    held = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**held, **config}))
    with pytest.raises(ConfigError, match=re.escape(message)):
        convert(tmp_path / "hf", tmp_path / "there", to="megatron", shape=shape)
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"architecture": "Mixtral", "num_local_experts": 4},
                                     {"architecture": "Qwen3", "head_dim": 8}, {"dtype": "bfloat16"}], ids=str)  # fmt: skip
def test_hugging_face_goes_to_megatron_and_back(changes: Options, tmp_path: Path) -> None:
    llama(**changes).save_pretrained(tmp_path / "hf")
    for to, shape in (("megatron", Shape(tp=2, pp=2)), ("megatron", Shape()), ("megatron-dist", Shape())):
        there = tmp_path / f"{to}-{shape.tp}"
        convert(tmp_path / "hf", there, to=to, shape=shape)
        opened = open_any(there)
        assert opened.unknown == [] and digest(opened.source) == digest(open_any(tmp_path / "hf").source)
        wanted = json.loads((tmp_path / "hf" / "config.json").read_text())["architectures"]
        assert opened.metadata["model_config"]["architectures"] == wanted


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


def test_buffers_by_rank_are_named_and_the_model_is_read(made: Made, request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--campaign"):
        pytest.skip("the long form runs with --campaign")
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
