"""Checkpoints of Megatron-LM that were converted: megatron-core loads them, and goes on as if it had never stopped."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cases import cases
from tests.checkpoint import frameworks
from tests.checkpoint.conftest import Covers, Made
from tests.checkpoint.frameworks import llama
from tests.checkpoint.megatron import STEPS
from tests.checkpoint.test_megatron import CLASSIC, DIST, UNEVEN, WHOLE, Options, edit, make
from trainrt.checkpoint.convert import convert
from trainrt.checkpoint.formats import open_any
from trainrt.checkpoint.formats.files import FileSource
from trainrt.checkpoint.formats.opened import Opened
from trainrt.checkpoint.inspect import verify
from trainrt.checkpoint.source import digest
from trainrt.checkpoint.targets import Shape, make_target
from trainrt.errors import ConfigError

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


@pytest.mark.parametrize("case", cases(LOADED, ["dist, tp 2", "classic, one rank"]))
def test_megatron_loads_what_was_written_on_another_mesh(case: str, made: Made, tmp_path: Path, covers: Covers) -> None:
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


@pytest.mark.parametrize("case", cases(CONTINUED, []))
def test_megatron_goes_on_as_if_it_had_never_stopped(case: str, made: Made, tmp_path: Path, covers: Covers) -> None:
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


@pytest.mark.campaign
@pytest.mark.parametrize(
    ("to", "shape"), [("megatron", Shape()), ("megatron", Shape(pp=2)), ("megatron-dist", Shape())]
)
def test_megatron_goes_on_on_another_mesh(to: str, shape: Shape, made: Made, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("change", cases([perturb, exchange, forget], [perturb]))
def test_losses_show_an_optimizer_that_is_not_the_same(
    change: Callable[[dict[int, Any]], None], made: Made, tmp_path: Path
) -> None:
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
