"""Checkpoints written for other frameworks: they load them and train on with the same losses; nothing is lost on the way back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoint.conftest import Made
from tests.checkpoint.frameworks import llama, make
from trainrt.checkpoint.convert import convert
from trainrt.checkpoint.formats import open_any
from trainrt.checkpoint.inspect import verify
from trainrt.checkpoint.source import digest
from trainrt.checkpoint.targets import Shape

ZERO_1 = {"stage": 1, "world": 2, "groups": True}
ZERO_2 = {"stage": 2, "world": 3, "dtype": "bfloat16", "groups": True}
ZERO_3 = {"stage": 3, "world": 2, "dtype": "bfloat16"}
FSDP_TP = {"world": 4, "tp": 2}
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
    "dcp": ("dcp", FSDP_TP, "dcp", Shape(), {}),
    "dcp, tied": ("dcp", {"world": 2, "model": {"tie_word_embeddings": True}}, "dcp", Shape(), {}),
}  # fmt: skip
SHORT = ("zero 1", "deepspeed universal, zero 3", "dcp")


@pytest.mark.parametrize("case", CASES)
def test_the_framework_goes_on_as_if_it_had_never_stopped(
    case: str, made: Made, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if case not in SHORT and not request.config.getoption("--campaign"):
        pytest.skip("the long form runs with --campaign")
    framework, options, to, shape, loading = CASES[case]
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
