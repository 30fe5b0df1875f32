"""Optimizers of all kinds: their state is read, kept in its shape, and loaded again; or it is said what is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.checkpoint import optimizers
from tests.checkpoint.conftest import Covers
from tests.checkpoint.frameworks import llama
from trainrt.checkpoint.convert import convert
from trainrt.checkpoint.formats import open_any
from trainrt.checkpoint.inspect import inspect, verify
from trainrt.checkpoint.source import digest, read_whole
from trainrt.checkpoint.targets import Shape
from trainrt.errors import CheckpointError

MIXTRAL = {"architecture": "Mixtral", "num_local_experts": 4}
ROLES = {
    "adam": {"exp_avg", "exp_avg_sq"}, "sgd": {"momentum_buffer"}, "lion": {"exp_avg"},
    "adafactor": {"row_var", "col_var", "variance"}, "muon": {"momentum_buffer", "exp_avg", "exp_avg_sq"},
}  # fmt: skip
FACTORED = {"row_var", "col_var"}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Of the model that is trained here."""
    llama().config.save_pretrained(tmp_path / "config")
    return tmp_path / "config"


@pytest.mark.parametrize("kind", ROLES)
def test_its_state_keeps_its_shape_and_training_goes_on(
    kind: str, config: Path, tmp_path: Path, covers: Covers
) -> None:
    covers("dcp", "read and written, same losses", f"optimizer: {kind}")
    held, losses = optimizers.save(kind, tmp_path / "theirs")
    opened = open_any(tmp_path / "theirs")
    assert opened.unknown == [] and {role for _, role in opened.source.layout.tensors} == {"parameter", *ROLES[kind]}
    assert opened.source.layout.tensors.keys() == held.keys()
    for key, tensor in opened.source.layout.tensors.items():
        assert tensor.shape == tuple(held[key].shape)
        assert np.array_equal(read_whole(opened.source, tensor).view(np.float32), held[key].numpy().ravel()), key
    assert convert(tmp_path / "theirs", tmp_path / "universal", to="universal", model_config=config)["lost"] == []
    assert verify(tmp_path / "universal")["ok"]
    shown = {(line["name"], line["role"]): tuple(line["shape"]) for line in inspect(tmp_path / "universal")["tensors"]}
    assert shown == {key: tuple(tensor.shape) for key, tensor in held.items()}
    assert convert(tmp_path / "universal", tmp_path / "ours", to="dcp")["lost"] == []
    assert optimizers.load(kind, tmp_path / "ours") == losses
    groups = open_any(tmp_path / "ours").metadata["optimizer"]["groups"]
    assert groups == opened.metadata["optimizer"]["groups"] and len(groups) == (3 if kind == "muon" else 1)


TARGETS = {
    "deepspeed 1": ("deepspeed", Shape(world=3)), "deepspeed 3": ("deepspeed", Shape(world=2, zero_stage=3)),
    "deepspeed-universal": ("deepspeed-universal", Shape()), "megatron-dist": ("megatron-dist", Shape()),
}  # fmt: skip


SETTINGS = {"rng", "weight_decay", "scheduler", "settings", "steps"}
"""What is said of Megatron besides moments."""


@pytest.mark.parametrize("kind", ROLES)
def test_others_carry_it_or_say_what_is_lost(kind: str, config: Path, tmp_path: Path) -> None:
    optimizers.save(kind, tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "universal", to="universal", model_config=config)
    held = digest(open_any(tmp_path / "universal").source)
    for case, (to, shape) in TARGETS.items():
        lost = convert(tmp_path / "universal", tmp_path / case, to=to, shape=shape)["lost"]
        named = {text.split()[0].rstrip(":") for text in lost} - SETTINGS
        if to == "megatron-dist":
            # It has moments of all parameters, in their shapes, or none.
            assert named == (set(ROLES[kind]) if kind in ("adafactor", "muon") else set()), (case, lost)
        else:
            # ZeRO has those of a group, or none.
            assert named == ({*FACTORED, "variance"} if kind == "adafactor" else set()), (case, lost)
        document = json.loads((config / "config.json").read_text())
        again = digest(open_any(tmp_path / case, model_config=document).source)
        assert again == {key: value for key, value in held.items() if key[1] not in named}, case


def test_factored_moments_of_what_is_packed_keep_the_name_of_the_whole(tmp_path: Path) -> None:
    """Mixtral's experts lie in one tensor in memory, one by one in files; what is summed over them belongs to the one."""
    held, losses = optimizers.save("adafactor", tmp_path / "theirs", **MIXTRAL)
    llama(**MIXTRAL).config.save_pretrained(tmp_path / "config")
    convert(tmp_path / "theirs", tmp_path / "universal", to="universal", model_config=tmp_path / "config")
    tensors = open_any(tmp_path / "universal").source.layout.tensors
    packed = "model.layers.0.mlp.experts.gate_up_proj"
    assert tensors[packed, "col_var"].shape == tuple(held[packed, "col_var"].shape)
    assert (packed, "parameter") not in tensors
    assert convert(tmp_path / "universal", tmp_path / "ours", to="dcp")["lost"] == []
    assert optimizers.load("adafactor", tmp_path / "ours", **MIXTRAL) == losses


def test_factored_moments_that_cannot_be_packed_are_said_to_be_lost(tmp_path: Path) -> None:
    llama(**MIXTRAL).save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "universal", to="universal")
    names = [name for name, _ in open_any(tmp_path / "universal").source.layout.tensors if ".experts.0." in name]
    weights = {
        name: torch.from_numpy(read_whole(opened, tensor).view(np.float32)).view(tensor.shape)
        for opened in [open_any(tmp_path / "universal").source] for (name, _), tensor in opened.layout.tensors.items()
    }  # fmt: skip
    state = {f"state.{name}.row_var": weights[name][:, :1].clone() for name in names}
    dcp.save({"model": weights, "optim": state}, checkpoint_id=str(tmp_path / "files"), no_dist=True)
    lost = convert(tmp_path / "files", tmp_path / "ours", to="dcp", model_config=tmp_path / "hf")["lost"]
    assert len(lost) == len(names) and all("cannot be packed" in text for text in lost)
    assert {role for _, role in open_any(tmp_path / "ours").source.layout.tensors} == {"parameter"}


def test_frozen_parameters_have_no_state_and_each_has_its_own_step(config: Path, tmp_path: Path) -> None:
    frozen, late = "model.embed_tokens.weight", "model.norm.weight"
    optimizers.save("adam", tmp_path / "theirs", frozen=[frozen], late=[late])
    convert(tmp_path / "theirs", tmp_path / "universal", to="universal", model_config=config)
    assert convert(tmp_path / "universal", tmp_path / "ours", to="dcp")["lost"] == []
    for path in ("theirs", "universal", "ours"):
        opened = open_any(tmp_path / path)
        assert {role for name, role in opened.source.layout.tensors if name == frozen} == {"parameter"}
        steps: dict[str, Any] = opened.metadata["optimizer"]["steps"]
        assert steps[late] == 2 and set(steps.values()) == {2, 3} and frozen not in steps
        (group,) = opened.metadata["optimizer"]["groups"]
        assert frozen not in group["tensors"]
    with pytest.raises(CheckpointError, match=r"parameters of one group have taken \[2, 3\] steps"):
        convert(tmp_path / "universal", tmp_path / "zero", to="deepspeed", shape=Shape(world=2))
    assert not list(tmp_path.glob("*zero*"))


def test_steps_may_be_plain_numbers(tmp_path: Path) -> None:
    state = {"state.w.exp_avg": torch.ones(2), "state.w.step": 7, "state.w.RMS": 0.5}
    dcp.save({"model": {"w": torch.ones(2)}, "optim": state}, checkpoint_id=str(tmp_path / "theirs"), no_dist=True)
    opened = open_any(tmp_path / "theirs")
    assert opened.metadata["optimizer"]["steps"] == {"w": 7} and opened.step == 7
    assert convert(tmp_path / "theirs", tmp_path / "universal", to="universal")["lost"] == [
        "optim.state.w.RMS: not understood"
    ]
