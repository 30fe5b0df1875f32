"""ZeRO checkpoints that DeepSpeed wrote, read as logical tensors, bit for bit as DeepSpeed itself puts them together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoint.conftest import Covers, Made
from trainrt.checkpoint.formats import deepspeed, open_any
from trainrt.checkpoint.source import digest, read_whole

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
    "zero 1, tied, one rank": {"stage": 1, "world": 1, "model": {"tie_word_embeddings": True}},
}  # fmt: skip


@pytest.mark.parametrize("case", [*SHORT, *LONG])
def test_masters_and_moments_are_those_of_deepspeed(
    case: str, made: Made, request: pytest.FixtureRequest, covers: Covers
) -> None:
    if case in LONG and not request.config.getoption("--campaign"):
        pytest.skip("the long form runs with --campaign")
    options = {**SHORT, **LONG}[case]
    covers("deepspeed", "read, bit for bit", case)
    path, expected = made("deepspeed", **options)
    opened = deepspeed.open_checkpoint(path)
    assert opened.unknown == [] and opened.step == 3
    low = options.get("dtype") == "bfloat16"
    for key, value in expected.items():
        role, _, name = key.partition("/")
        role = role if low or role != "master" else "parameter"
        tensor = opened.source.layout.tensors[name, role]
        found = read_whole(opened.source, tensor).view(np.float32).reshape(tensor.shape)
        assert np.array_equal(found, value), key
        assert opened.metadata["optimizer"]["steps"][name] == 3
    held = {name for name, role in opened.source.layout.tensors if role == "parameter"}
    trained = {key.partition("/")[2] for key in expected}
    assert held == trained | set(options.get("frozen", ()))
    assert opened.metadata["aliases"] == (
        {"lm_head.weight": "model.embed_tokens.weight"} if options.get("model") else {}
    )
    groups = opened.metadata["optimizer"]["groups"]
    assert [group["hyperparameters"]["weight_decay"] for group in groups] == (
        [0.1, 0.0] if options.get("groups") else [0.01]
    )


@pytest.mark.parametrize("case", ["zero 3, bfloat16, groups", "zero 1"])
def test_deepspeeds_universal_checkpoint_holds_the_same(
    case: str, made: Made, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if case == "zero 1" and not request.config.getoption("--campaign"):
        pytest.skip("the long form runs with --campaign")
    path, _ = made("deepspeed", **SHORT[case])
    words = [
        sys.executable,
        "-m",
        "deepspeed.checkpoint.ds_to_universal",
        "--num_extract_workers",
        "1",
        "--num_merge_workers",
        "1",
    ]
    words += ["--input_folder", str(path / "global_step3"), "--output_folder", str(tmp_path / "universal")]
    # Stages 1 and 2 are refused by DeepSpeed's converter without this, where a model did not say how it is cut.
    words += ["--inject_missing_state"] if case == "zero 1" else []
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=120, env={**os.environ, "DS_ACCELERATOR": "cpu"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    theirs, ours = open_any(tmp_path / "universal"), open_any(path)
    assert theirs.format == "deepspeed-universal" and theirs.unknown == []
    assert digest(theirs.source) == digest(ours.source)
