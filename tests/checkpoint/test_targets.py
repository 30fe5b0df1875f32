"""Checkpoints written for other frameworks: they load them and train on with the same losses; nothing is lost on the way back."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.cases import cases
from tests.checkpoint.conftest import Covers, Made
from tests.checkpoint.frameworks import llama, make
from trainrt.checkpoint.convert import convert
from trainrt.checkpoint.formats import open_any
from trainrt.checkpoint.inspect import verify
from trainrt.checkpoint.mapping.rules import Rule, compile_writing
from trainrt.checkpoint.source import digest
from trainrt.checkpoint.targets import Shape
from trainrt.checkpoint.targets.array import TargetArray
from trainrt.errors import ConfigError
from trainrt.parallel.layout import LogicalTensor

ZERO_1 = {"stage": 1, "world": 2, "groups": True}
ZERO_2 = {"stage": 2, "world": 3, "dtype": "bfloat16", "groups": True}
ZERO_3 = {"stage": 3, "world": 2, "dtype": "bfloat16"}
FSDP_TP = {"world": 4, "tp": 2}
FLOAT16 = {"dtype": "float16", "float16_allowed": True}
FROZEN = {"frozen": ["model.embed_tokens.weight"]}
MIXTRAL = {"architecture": "Mixtral", "num_local_experts": 4}
"""Its experts are one by one in files, and stacked in memory."""
CASES: dict[str, tuple[str, dict[str, Any], str, Shape, dict[str, Any]]] = {
    "zero 1": ("deepspeed", ZERO_1, "deepspeed", Shape(world=2), {}),
    "zero 2, 3 ranks": ("deepspeed", ZERO_2, "deepspeed", Shape(world=3, zero_stage=2), {}),
    "zero 3": ("deepspeed", ZERO_3, "deepspeed", Shape(world=2, zero_stage=3), {}),
    "deepspeed universal, zero 1": ("deepspeed", ZERO_1, "deepspeed-universal", Shape(), {"universal": True}),
    "deepspeed universal, zero 3": (
        "deepspeed", ZERO_3, "deepspeed-universal", Shape(world=2, zero_stage=3), {"universal": True},
    ),
    "zero 1, packed experts": (
        "deepspeed", {"stage": 1, "world": 2, "model": MIXTRAL}, "deepspeed", Shape(world=2), {},
    ),
    "zero 1, frozen": ("deepspeed", {"stage": 1, "world": 2, **FROZEN}, "deepspeed", Shape(world=2), {}),
    "zero 3, frozen": ("deepspeed", {**ZERO_3, **FROZEN}, "deepspeed", Shape(world=2, zero_stage=3), {}),
    "zero 1, float16": ("deepspeed", {"stage": 1, "world": 2, **FLOAT16}, "deepspeed", Shape(world=2), {}),
    "zero 3, float16": (
        "deepspeed", {"stage": 3, "world": 2, **FLOAT16}, "deepspeed", Shape(world=2, zero_stage=3), {},
    ),
    "zero 2, lion": (
        "deepspeed", {"stage": 2, "world": 2, "optimizer": "lion"}, "deepspeed", Shape(world=2, zero_stage=2), {},
    ),
    "zero 3, sgd": ("deepspeed", {**ZERO_3, "optimizer": "sgd"}, "deepspeed", Shape(world=2, zero_stage=3), {}),
    "dcp": ("dcp", FSDP_TP, "dcp", Shape(), {}),
    "dcp, tied": ("dcp", {"world": 2, "model": {"tie_word_embeddings": True}}, "dcp", Shape(), {}),
}  # fmt: skip
SHORT = ("zero 1",)


@pytest.mark.parametrize("case", cases(CASES, SHORT))
def test_the_framework_goes_on_as_if_it_had_never_stopped(
    case: str, made: Made, tmp_path: Path, covers: Covers
) -> None:
    framework, options, to, shape, loading = CASES[case]
    covers(to, "written, loaded by the framework, same losses", case)
    checkpoint, _ = made(framework, **options)
    llama(**options.get("model", {})).config.save_pretrained(tmp_path / "config")
    convert(checkpoint, tmp_path / "universal", to="universal", model_config=tmp_path / "config")
    document = convert(tmp_path / "universal", tmp_path / "there", to=to, shape=shape)
    assert document["lost"] == [] and verify(tmp_path / "there")["ok"]
    config = json.loads((tmp_path / "config" / "config.json").read_text())
    assert digest(open_any(tmp_path / "there", model_config=config).source) == digest(
        open_any(tmp_path / "universal").source
    )
    (tmp_path / "after").mkdir()
    make(framework, tmp_path / "after", **{**options, **loading, "load": str(tmp_path / "there")})
    undisturbed = np.load(checkpoint.parent / "losses.npy")
    assert np.array_equal(np.load(tmp_path / "after" / "losses.npy"), undisturbed)
    assert len({*undisturbed.tolist()}) == 3


def test_a_chain_of_formats_ends_where_it_began(made: Made, tmp_path: Path) -> None:
    checkpoint, _ = made("deepspeed", **ZERO_1)
    llama().config.save_pretrained(tmp_path / "config")
    convert(checkpoint, tmp_path / "a", to="dcp", model_config=tmp_path / "config")
    convert(tmp_path / "a", tmp_path / "b", to="deepspeed", shape=Shape(world=3, zero_stage=3))
    convert(tmp_path / "b", tmp_path / "c", to="deepspeed-universal", model_config=tmp_path / "config")
    convert(tmp_path / "c", tmp_path / "d", to="universal", model_config=tmp_path / "config")
    assert digest(open_any(tmp_path / "d").source) == digest(open_any(checkpoint).source)
    for file in (tmp_path / "b").rglob("*.pt"):
        assert zipfile.ZipFile(file).testzip() is None
        torch.load(file, weights_only=False)


def test_an_interrupted_conversion_and_an_altered_target_are_noticed(made: Made, tmp_path: Path) -> None:
    checkpoint, _ = made("deepspeed", **ZERO_1)
    first = convert(checkpoint, tmp_path / "there", to="deepspeed", shape=Shape(world=2))
    assert first["bytes_written"] > 0
    assert convert(checkpoint, tmp_path / "there", to="deepspeed", shape=Shape(world=2))["bytes_written"] == 0
    (tmp_path / "there" / "latest").write_text("elsewhere")
    with pytest.raises(ConfigError, match="latest: is not what this conversion writes"):
        convert(checkpoint, tmp_path / "there", to="deepspeed", shape=Shape(world=2))


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"mesh": "tp=2,dp=2"}, "'dp': allowed: tp, pp"),
        ({"mesh": "tp=0"}, "a size of at least 1"),
        ({"world": 0}, "--world 0: at least 1"),
        ({"zero_stage": 4}, "--zero-stage 4: allowed: 1, 2, 3"),
        ({"adam": "apex"}, "--adam apex: allowed: fused, torch"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(said: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Shape.parse(**{"mesh": None, "world": None, "zero_stage": None, **said})


def test_what_a_format_is_not_cut_by_is_refused(made: Made, tmp_path: Path) -> None:
    checkpoint, _ = made("deepspeed", **ZERO_1)
    with pytest.raises(ConfigError, match="--world: --to dcp is not cut by it; it goes with deepspeed"):
        convert(checkpoint, tmp_path / "there", to="dcp", shape=Shape(world=2))
    with pytest.raises(ConfigError, match="--to deepspeed wants --world N"):
        convert(checkpoint, tmp_path / "there", to="deepspeed")
    assert not (tmp_path / "there").exists()


@given(st.data())
def test_a_flat_array_in_units_is_the_array(data: st.DataObject) -> None:
    """Tensors of several shapes, some transposed, flattened over ranks: what lies in a window is what lies there in the whole."""
    shapes = data.draw(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=3))
    names = [f"t{number}" for number in range(len(shapes))]
    turned = [data.draw(st.booleans()) for _ in names]
    held = [f'transpose("{name}")' if turn else f'"{name}"' for name, turn in zip(names, turned, strict=True)]
    world = data.draw(st.integers(1, 3))
    tensors = {(n, "r"): LogicalTensor(n, "r", "int32", tuple(s)) for n, s in zip(names, shapes, strict=True)}
    values = {
        name: np.arange(1, 1 + np.prod(shape), dtype=np.int32).reshape(shape) + 1000 * number
        for number, (name, shape) in enumerate(zip(names, shapes, strict=True))
    }
    flat = np.concatenate([(values[n].T if t else values[n]).ravel() for n, t in zip(names, turned, strict=True)])
    rule = Rule("flat", f'partition({", ".join(held)}, axis="dp", multiple=2)')
    arrays, _ = compile_writing([rule], tensors, role="r", axes={"dp": world}, variables={})
    length = arrays[0][0].shape[0]
    whole = np.zeros(length * world, np.int32)
    whole[: flat.size] = flat
    for array, lies in arrays:
        target = TargetArray("flat", "r", "int32", array.shape, tuple(lies))
        first = data.draw(st.integers(0, length - 1))
        last = data.draw(st.integers(first + 1, length))
        wanted = target.layout(first, last)
        found = np.zeros((last - first) * 4, np.uint8)
        for tensor, fragments in wanted:
            for fragment in fragments:
                box = tuple(slice(o, o + n) for o, n in zip(fragment.box.offset, fragment.box.length, strict=True))
                fragment.view(found, 4)[...] = values[tensor.name][box].view(np.uint32)
        begin = array.at["dp"] * length
        assert np.array_equal(found.view(np.int32), whole[begin + first : begin + last])
