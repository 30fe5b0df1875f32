"""Before anything starts: plans, weights and vocabulary are held against the job."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import LLAMA, job
from tests.reference import validate
from trainrt.config import JobConfig, MeshSize, parse
from trainrt.errors import ConfigError, DataError, ModelError, PlanError
from trainrt.training.planning import load_for_plan, make_plan, parse_mesh, plan_command, preflight, shrink


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A tiny Llama as transformers saves it."""
    import transformers

    folder = tmp_path / "model"
    sizes = {key: value for key, value in LLAMA.items() if key != "model_type"}
    transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(**sizes | {"vocab_size": 320})
    ).save_pretrained(folder)
    return folder


def of_directory(folder: Path, tmp_path: Path) -> JobConfig:
    (tmp_path / "text.txt").write_text("some text " * 50)
    return parse({
        "model": {"kind": "huggingface", "config": str(folder)},
        "data": {"source": str(tmp_path / "text.txt"), "sequence_length": 16, "validation_fraction": 0},
        "cluster": {"nodes": 1, "workers_per_node": 2, "device": "cpu"},
        "parallel": {"mode": "explicit", "fsdp": 2},
    })  # fmt: skip


def test_a_directory_with_weights_is_planned_and_its_values_are_loaded(directory: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    from trainrt.training.models.build import build

    config = of_directory(directory, tmp_path)
    assert preflight(config, world_size=2).plan.mesh.fsdp == 2
    saved = load_file(directory / "model.safetensors")
    made = build(config, fresh=True).state_dict()
    assert all(torch.equal(made[name], saved[name]) for name in saved)


def test_truncated_weights_are_named(directory: Path, tmp_path: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors: truncated"):
        preflight(of_directory(directory, tmp_path), world_size=2)
    file.write_bytes(b"\xff" * 64)
    with pytest.raises(ModelError, match=r"model\.safetensors: no safetensors file"):
        preflight(of_directory(directory, tmp_path), world_size=2)


def test_a_shape_that_disagrees_is_named(directory: Path, tmp_path: Path) -> None:
    document = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**document, "intermediate_size": 48}))
    with pytest.raises(ModelError, match=r"proj\.weight is \(.*\) in the weights, \(.*\) by config\.json"):
        preflight(of_directory(directory, tmp_path), world_size=2)


def test_a_missing_tensor_is_named(directory: Path, tmp_path: Path) -> None:
    file = directory / "model.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + length].replace(b"model.norm.weight", b"model.nrom.weight")
    file.write_bytes(data[:8] + header + data[8 + length :])
    with pytest.raises(ModelError, match=r"have no model\.norm\.weight"):
        preflight(of_directory(directory, tmp_path), world_size=2)


def test_pickled_weights_and_a_missing_shard_are_refused(directory: Path, tmp_path: Path) -> None:
    (directory / "model.safetensors").rename(directory / "elsewhere")
    (directory / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match="pickled weights"):
        preflight(of_directory(directory, tmp_path), world_size=2)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(ModelError, match=r"model-1\.safetensors is named .* missing"):
        preflight(of_directory(directory, tmp_path), world_size=2)


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    config = job("huggingface", model={"config": {"architectures": ["NoSuchForCausalLM"]}})
    with pytest.raises(ModelError, match="NoSuchForCausalLM"):
        make_plan(config, world_size=1)


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("text " * 100)
    with pytest.raises(
        ConfigError, match=r"model\.config\.vocab_size = 64 is smaller than the 257 tokens of data\.tokenizer"
    ):
        preflight(job(data={"source": str(tmp_path / "t.txt")}), world_size=1)
    (tmp_path / "t.txt").write_text("tiny")
    with pytest.raises(DataError, match="sequence_length"):
        preflight(job(data={"source": str(tmp_path / "t.txt")}), world_size=1)


def test_every_parameter_says_which_rule_placed_it() -> None:
    sizes = {**LLAMA, "model_type": "qwen3", "head_dim": 8}
    plan = make_plan(job("huggingface", mesh={"tp": 2}, model={"config": sizes}), world_size=2)
    rules = {parameter.name.split(".", 3)[-1]: parameter.rule.split(":")[0] for parameter in plan.parameters}
    assert rules["self_attn.q_proj.weight"] == "column-parallel"
    assert rules["self_attn.o_proj.weight"] == "row-parallel"
    assert rules["self_attn.q_norm.weight"] == "replicated"


def test_auto_finds_a_mesh_and_says_what_it_passed_over() -> None:
    config = job(cluster={"nodes": 2, "workers_per_node": 2, "device": "cpu"}, parallel={"mode": "auto"})
    plan = make_plan(config, world_size=4)
    assert plan.mesh.world_size == 4
    document = json.loads(json.dumps(plan.to_json()))
    validate("plan", document)
    assert {alternative["rejected"] is None for alternative in document["alternatives"]} == {True}
    seconds = [alternative["predicted_step_seconds"] for alternative in document["alternatives"]]
    assert document["predicted_step_seconds"] <= min(seconds)


def test_every_element_of_every_parameter_lies_on_some_rank() -> None:
    for mesh in ({"fsdp": 3}, {"tp": 2, "fsdp": 2}, {"fsdp": 4, "ep": 2}, {"dp": 2, "fsdp": 2}):
        plan = make_plan(job(mesh=mesh), world_size=job(mesh=mesh).world_size)
        for parameter in plan.parameters:
            primary = [
                parameter.held(plan.mesh, r) for r in range(plan.mesh.world_size) if parameter.primary(plan.mesh, r)
            ]
            held = sum(held.elements for held in primary)
            assert held == math.prod(parameter.shape), (mesh, parameter.name)


@pytest.mark.parametrize(("world_size", "expected"), [(6, (2, 3)), (4, (2, 2)), (3, (1, 3)), (2, (2, 1)), (1, (1, 1))])
def test_a_mesh_shrinks_in_fsdp_first_then_dp(world_size: int, expected: tuple[int, int]) -> None:
    size = shrink(MeshSize(dp=2, fsdp=4), world_size)
    assert (size.dp, size.fsdp) == expected


def test_a_mesh_that_cannot_shrink_so_far_says_so() -> None:
    with pytest.raises(PlanError, match="tp = 2"):
        shrink(MeshSize(tp=2, fsdp=2), 3)


@pytest.mark.parametrize(("text", "word"), [("tp=x", "'x'"), ("tq=2", 'did you mean "tp"'), ("tp", "''")])
def test_a_wrong_mesh_is_explained(text: str, word: str) -> None:
    with pytest.raises(ConfigError, match="--mesh") as caught:
        parse_mesh(text)
    assert word in str(caught.value)


def test_a_model_directory_can_be_planned_as_it_is(directory: Path) -> None:
    config: Any = load_for_plan(directory, nodes=1, devices_per_node=2)
    plan = plan_command(config, mesh="tp=2", device="h100")
    assert plan["model.layers.0.self_attn.q_proj.weight"].placements(plan.mesh)["tp"] == "shard(0)"
    assert plan["model.layers.0.self_attn.o_proj.weight"].placements(plan.mesh)["tp"] == "shard(1)"
    assert plan["model.norm.weight"].placements(plan.mesh)["tp"] == "replicate"
