"""ZeRO checkpoints that DeepSpeed wrote, read as logical tensors, bit for bit as DeepSpeed itself puts them together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cases import cases
from tests.checkpoint.conftest import Covers, Made
from trainrt.checkpoint.convert import convert
from trainrt.checkpoint.formats import deepspeed, open_any
from trainrt.checkpoint.source import digest, read_whole
from trainrt.checkpoint.targets import Shape

FLOAT16 = {"dtype": "float16", "float16_allowed": True}
SHORT: dict[str, dict[str, Any]] = {
    "zero 1": {"stage": 1, "world": 2},
    "zero 3, bfloat16, groups": {"stage": 3, "world": 2, "dtype": "bfloat16", "groups": True},
}
LONG: dict[str, dict[str, Any]] = {
    "zero 2, bfloat16, groups, 3 ranks": {"stage": 2, "world": 3, "dtype": "bfloat16", "groups": True},
    "zero 3, sub-groups": {"stage": 3, "world": 2, "sub_group_size": 4000},
    "zero 3, bfloat16, groups, frozen, 3 ranks": {
        "stage": 3, "world": 3, "dtype": "bfloat16", "groups": True, "frozen": ["model.embed_tokens.weight"],
    },
    "zero 2, lion": {"stage": 2, "world": 2, "optimizer": "lion"},
    "zero 3, bfloat16, sgd": {"stage": 3, "world": 2, "dtype": "bfloat16", "optimizer": "sgd"},
    "zero 1, frozen": {"stage": 1, "world": 2, "frozen": ["model.embed_tokens.weight"]},
    "zero 2, float16": {"stage": 2, "world": 2, **FLOAT16},
    "zero 3, float16": {"stage": 3, "world": 2, **FLOAT16},
    "zero 1, tied, one rank": {"stage": 1, "world": 1, "model": {"tie_word_embeddings": True}},
}  # fmt: skip


@pytest.mark.parametrize("case", cases([*SHORT, *LONG], SHORT))
def test_masters_and_moments_are_those_of_deepspeed(case: str, made: Made, covers: Covers) -> None:
    options = {**SHORT, **LONG}[case]
    covers("deepspeed", "read, bit for bit", case)
    path, expected = made("deepspeed", **options)
    opened = deepspeed.open_checkpoint(path)
    assert opened.unknown == [] and opened.step == 3
    low = "dtype" in options
    for key, value in expected.items():
        role, _, name = key.partition("/")
        role = role if low or role != "master" else "parameter"
        tensor = opened.source.layout.tensors[name, role]
        found = read_whole(opened.source, tensor).view(np.float32).reshape(tensor.shape)
        assert np.array_equal(found, value), key
        # Lion and SGD count no steps.
        assert opened.metadata["optimizer"]["steps"].get(name) == (None if "optimizer" in options else 3)
    held = {name for name, role in opened.source.layout.tensors if role == "parameter"}
    trained = {key.partition("/")[2] for key in expected}
    assert held == trained | set(options.get("frozen", ()))
    assert opened.metadata["aliases"] == (
        {"lm_head.weight": "model.embed_tokens.weight"} if options.get("model") else {}
    )
    scale = opened.metadata["optimizer"].get("loss_scale", {})
    assert (scale.get("cur_scale"), scale.get("cur_iter")) == (
        (4096, 3) if options.get("dtype") == "float16" else (None, None)
    )
    groups = opened.metadata["optimizer"]["groups"]
    decays = [0.1, 0.0] if options.get("groups") else [0.0] if "optimizer" in options else [0.01]
    assert [group["hyperparameters"]["weight_decay"] for group in groups] == decays


def ds_to_universal(checkpoint: Path, made: Path, *, inject: bool) -> None:
    """DeepSpeed's own converter. `inject`: it refuses stages 1 and 2 of models that do not say how they are cut, but for this."""
    words = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    words += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    words += ["--input_folder", str(checkpoint), "--output_folder", str(made)]
    words += ["--inject_missing_state"] if inject else []
    environ = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=environ)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    "case", cases(["zero 3, bfloat16, groups", "zero 1", "zero 1, frozen"], ["zero 3, bfloat16, groups"])
)
def test_deepspeeds_universal_checkpoint_holds_the_same(case: str, made: Made, tmp_path: Path) -> None:
    path, _ = made("deepspeed", **{**SHORT, **LONG}[case])
    ds_to_universal(path / "global_step3", tmp_path / "universal", inject="zero 1" in case)
    theirs, ours = open_any(tmp_path / "universal"), open_any(path)
    assert theirs.format == "deepspeed-universal" and theirs.unknown == []
    assert digest(theirs.source) == digest(ours.source)
    groups = theirs.metadata["optimizer"]["groups"]
    assert groups == ours.metadata["optimizer"]["groups"] and groups


WRITTEN = {
    "zero 1, 3 ranks": ("zero 1", Shape(world=3)),
    "zero 2, bfloat16, groups": ("zero 3, bfloat16, groups", Shape(world=2, zero_stage=2)),
    "zero 3, bfloat16, groups, 3 ranks": ("zero 3, bfloat16, groups", Shape(world=3, zero_stage=3)),
    "zero 1, frozen": ("zero 1, frozen", Shape(world=2)),
    "zero 2, float16": ("zero 3, float16", Shape(world=2, zero_stage=2)),
}


@pytest.mark.parametrize("case", cases(WRITTEN, ["zero 1, 3 ranks"]))
def test_deepspeeds_converter_takes_what_we_wrote(case: str, made: Made, tmp_path: Path, covers: Covers) -> None:
    covers("deepspeed", "written, taken by ds_to_universal", case)
    origin, shape = WRITTEN[case]
    checkpoint, _ = made("deepspeed", **{**SHORT, **LONG}[origin])
    convert(checkpoint, tmp_path / "universal", to="universal")
    convert(tmp_path / "universal", tmp_path / "zero", to="deepspeed", shape=shape)
    ds_to_universal(tmp_path / "zero" / "global_step3", tmp_path / "theirs", inject=shape.zero_stage != 3)
    theirs, ours = open_any(tmp_path / "theirs"), open_any(tmp_path / "universal")
    assert digest(theirs.source) == digest(ours.source)
    # What it makes of stage 3 has no step of each parameter.
    assert theirs.metadata["optimizer"]["steps"] == (
        ours.metadata["optimizer"]["steps"] if shape.zero_stage != 3 else {}
    )
    assert len(theirs.metadata["optimizer"]["groups"]) == (2 if "groups" in case else 1)
