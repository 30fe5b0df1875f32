"""Universal to any format and back: every tensor of every role that the format holds has the same digest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.cases import cases
from tests.checkpoint.conftest import Covers
from tests.checkpoint.frameworks import llama
from trainrt.checkpoint.convert import convert
from trainrt.checkpoint.formats import open_any
from trainrt.checkpoint.formats.opened import Opened
from trainrt.checkpoint.inspect import verify
from trainrt.checkpoint.source import MemorySource, digest, read_whole, whole_fragment
from trainrt.checkpoint.targets import Shape
from trainrt.checkpoint.universal import WritePlan, write
from trainrt.parallel.layout import Fragment, Key, Layout, LogicalTensor

FROZEN = "model.norm.weight"
LOW = ("bfloat16", "float16")
SCALE = {"cur_scale": 4096.0, "scale_window": 500, "min_scale": 1, "delayed_shift": 2, "consecutive_hysteresis": False,
    "dynamic": True, "cur_iter": 9, "last_overflow_iter": 3, "scale_factor": 2.0, "cur_hysteresis": 2}  # fmt: skip


def trained(folder: Path, *, dtype: str, **changes: Any) -> Path:
    """A universal checkpoint with everything in it: masters in float32, moments, two groups, a frozen parameter, ties."""
    model = llama(dtype=dtype, **changes)
    generator = torch.Generator().manual_seed(3)
    layout, storages = Layout(), {}

    def add(name: str, role: str, value: torch.Tensor) -> None:
        tensor = LogicalTensor(name, role, str(value.dtype).removeprefix("torch."), tuple(value.shape))
        layout.add(tensor, Fragment(0, whole_fragment(tensor).box, f"{role} {name}", whole_fragment(tensor).strides))
        storages[0, f"{role} {name}"] = value.contiguous().view(-1).view(torch.uint8).numpy().copy()

    names = [name for name, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        master = torch.randn(parameter.shape, generator=generator)
        add(name, "parameter", master.to(parameter.dtype))
        if name != FROZEN:
            for role in ("exp_avg", "exp_avg_sq"):
                add(name, role, torch.randn(parameter.shape, generator=generator))
            if dtype in LOW:
                add(name, "master", master)
    moved = [name for name in names if name != FROZEN]
    settings = {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8}
    groups = [
        {
            "tensors": [n for n in moved if ("norm" in n) == norms],
            "hyperparameters": {**settings, "weight_decay": decay},
        }
        for norms, decay in ((False, 0.1), (True, 0.0))
    ]
    optimizer: dict[str, Any] = {"name": "adamw", "groups": groups, "steps": dict.fromkeys(moved, 9)}
    metadata = {
        "step": 11, "run_id": "r", "model_config": json.loads(model.config.to_json_string(use_diff=False)),
        "optimizer": optimizer | ({"loss_scale": SCALE} if dtype == "float16" else {}),
        "aliases": {"lm_head.weight": "model.embed_tokens.weight"} if changes.get("tie_word_embeddings") else {},
    }  # fmt: skip
    plan = WritePlan.build(layout, metadata, writers=["x"], writer_of_rank={})
    return write(plan, folder, MemorySource(layout, storages))


def held(opened: Opened) -> dict[Key, str]:
    return digest(opened.source)


ALL = {"parameter", "master", "exp_avg", "exp_avg_sq"}
TARGETS: dict[str, tuple[str, Shape, set[str]]] = {
    "hf": ("hf", Shape(), {"parameter"}),
    "deepspeed 1": ("deepspeed", Shape(world=3), ALL),
    "deepspeed 2": ("deepspeed", Shape(world=2, zero_stage=2), ALL),
    "deepspeed 3": ("deepspeed", Shape(world=3, zero_stage=3), ALL),
    "deepspeed-universal 1": ("deepspeed-universal", Shape(), ALL),
    "deepspeed-universal 3": ("deepspeed-universal", Shape(world=2, zero_stage=3), ALL),
    "dcp": ("dcp", Shape(), ALL),
    "megatron": ("megatron", Shape(tp=2, pp=2), {"parameter"}),
    # One parameter is frozen, and Megatron's optimizer has moments of all or is not there (test_megatron.py has those).
    "megatron-dist": ("megatron-dist", Shape(), {"parameter"}),
}
MODELS: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": "bfloat16"}, "float16, tied": {"dtype": "float16", "tie_word_embeddings": True},
    "float32": {"dtype": "float32"},
}  # fmt: skip


@pytest.mark.parametrize("model", cases(MODELS, ["bfloat16"]))
def test_what_a_format_holds_comes_back(model: str, tmp_path: Path, covers: Covers) -> None:
    source = trained(tmp_path, **MODELS[model])
    first = open_any(source)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(first.metadata["model_config"]))
    for case, (to, shape, roles) in TARGETS.items():
        there, back = tmp_path / case, tmp_path / f"{case} and back"
        lost = convert(source, there, to=to, shape=shape)["lost"]
        assert verify(there)["ok"], case
        convert(there, back, to="universal", model_config=config)
        again = open_any(back)
        wanted = {key: value for key, value in held(first).items() if key[1] in roles}
        assert held(again) == wanted, case
        # In a Hugging Face model its config says what is tied.
        assert again.metadata["aliases"] == (first.metadata["aliases"] if to != "hf" else {}), case
        assert {text.split(":")[0] for text in lost} - {"rng"} == {role for _, role in held(first)} - roles or (
            case == "deepspeed-universal 3" and "settings of the parameter groups" in lost[0]
        ), (case, lost)
        if roles == ALL and "megatron" not in to:
            assert again.step == 11 and again.metadata["optimizer"]["steps"] == first.metadata["optimizer"]["steps"], (
                case
            )
            same_groups(again, first)
            assert again.metadata["optimizer"].get("loss_scale") == first.metadata["optimizer"].get("loss_scale"), case
    covers("all", "universal to it and back, same digests", model)


def same_groups(one: Opened, other: Opened) -> None:
    for a, b in zip(one.metadata["optimizer"]["groups"], other.metadata["optimizer"]["groups"], strict=True):
        assert set(a["tensors"]) == set(b["tensors"])
        assert {**a["hyperparameters"], **b["hyperparameters"]} == a["hyperparameters"]


def test_a_chain_over_all_that_hold_an_optimizer_ends_where_it_began(tmp_path: Path) -> None:
    source = trained(tmp_path, dtype="bfloat16")
    first, at = open_any(source), source
    config = tmp_path / "config.json"
    config.write_text(json.dumps(first.metadata["model_config"]))
    chain = [case for case, (_, _, roles) in TARGETS.items() if roles == ALL]
    for number, case in enumerate(chain):
        to, shape, _ = TARGETS[case]
        convert(at, tmp_path / f"{number}", to=to, shape=shape, model_config=config)
        at = tmp_path / f"{number}"
    convert(at, tmp_path / "end", to="universal", model_config=config)
    assert held(open_any(tmp_path / "end")) == held(first)
    assert open_any(tmp_path / "end").step == 11


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_numbers_of_low_precision_keep_their_bits(dtype: str, tmp_path: Path) -> None:
    """Also infinities and the smallest there are. (torch does not keep what is no number as it was, when it rounds a master.)"""
    bits = np.array([0, 1, 0x8001, 0x7C00, 0xFC00, 0x7F80, 0x3C00, 0x0400], np.uint16)
    value = torch.from_numpy(bits.view(np.int16)).view(getattr(torch, dtype))
    dcp.save({"model": {"w": value}}, checkpoint_id=str(tmp_path / "theirs"), no_dist=True)
    at = tmp_path / "theirs"
    for to in ("universal", "hf", "dcp", "universal"):
        at, source = tmp_path / f"{at.name}-{to}", at
        convert(source, at, to=to)
    opened = open_any(at)
    tensor = opened.source.layout.tensors["w", "parameter"]
    assert tensor.dtype == dtype and np.array_equal(read_whole(opened.source, tensor).view(np.uint16), bits)
