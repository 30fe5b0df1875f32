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
from trainrt.parallel.plan import mesh_json
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


def held_by_an_engine(rank: int, config: JobConfig) -> tuple[int, int, int]:
    """Bytes of parameters and buffers, gradients and optimizer state that a rank really holds after a step."""
    import torch
    from torch.distributed.tensor import DTensor

    from tests.jobs import engine, leaves, train

    def size(tensor: torch.Tensor) -> int:
        return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes

    made = engine(config, rank)
    train(made, config, steps=1)
    states = made.optimizer.state.values()
    optimizer = sum(size(value) for state in states for value in state.values() if value.dim())
    batches = leaves(config, 2)
    mine = [batches[made.leaf_of(turn, len(batches)) or 0] for turn in range(made.rounds(len(batches)))]
    for turn in range(len(mine)):
        made._leaf(2, turn, [(batch, 0) for batch in mine], len(batches))
    gradients = sum(size(p.grad) for p in made.model.parameters() if p.grad is not None)
    persistent = set(made.model.state_dict())
    buffers = sum(size(b) for name, b in made.model.named_buffers() if name in persistent)
    return sum(size(p) for p in made.sharded.values()) + buffers, gradients, optimizer


@pytest.mark.parametrize("mesh", [{"fsdp": 2}, {"tp": 2}, {"fsdp": 2, "ep": 2}, {"tp": 2, "fsdp": 2}])
def test_the_state_that_is_predicted_is_the_state_that_is_held(mesh: dict[str, int]) -> None:
    from tests.ranks import run_ranks

    config = job(mesh=mesh)
    plan = make_plan(config, world_size=config.world_size)
    parameters, gradients, optimizer = run_ranks(config.world_size, held_by_an_engine, config)[0]
    assert plan.estimate["parameter_bytes"] == parameters
    assert plan.estimate["gradient_bytes"] == gradients
    assert plan.estimate["optimizer_bytes"] == optimizer
    assert plan.memory_bytes_per_rank > parameters + gradients + optimizer


def test_gradients_that_wait_for_the_last_round_are_counted_whole() -> None:
    several = make_plan(job(mesh={"fsdp": 2}), world_size=2).estimate
    one = make_plan(job(mesh={"fsdp": 2}, data={"global_batch": 4}), world_size=2).estimate
    tree = make_plan(job(mesh={"fsdp": 2}, run={"deterministic": True}), world_size=2).estimate
    assert several["waiting_bytes"] > several["gradient_bytes"] > 0
    assert tree["waiting_bytes"] == one["waiting_bytes"] == 0


def test_a_mesh_that_does_not_fit_in_memory_is_left_out_with_the_reason(tmp_path: Path) -> None:
    profile = {"flops": 1e11, "memory_bytes": 1 << 30, "link_bytes_per_second": 1e9, "latency_seconds": 1e-4}
    file = tmp_path / "small.json"
    config = job(parallel={"mode": "auto"}, cluster={"workers_per_node": 2})
    file.write_text(json.dumps(profile))
    chosen = plan_command(config, device=str(file), verify=False)
    assert chosen.mesh.dp == 2
    largest = chosen.memory_bytes_per_rank
    file.write_text(json.dumps(profile | {"memory_bytes": largest - 1}))
    other = plan_command(config, device=str(file), verify=False)
    assert other.mesh != chosen.mesh and other.memory_bytes_per_rank < largest
    reason = next(a["rejected"] for a in other.alternatives if a["mesh"] == mesh_json(chosen.mesh))
    assert str(largest) in reason and "small" in reason


def test_the_link_of_the_profile_is_what_a_step_waits_for(tmp_path: Path) -> None:
    config = job(parallel={"mode": "auto"}, cluster={"workers_per_node": 2})
    seconds = {}
    for latency in (1e-6, 1e-1):
        file = tmp_path / "link.json"
        file.write_text(json.dumps({
            "flops": 1e11, "memory_bytes": 1 << 34, "link_bytes_per_second": 1e9, "latency_seconds": latency,
        }))  # fmt: skip
        plan = plan_command(config, device=str(file), mesh="fsdp=2", verify=False)
        seconds[latency] = plan.predicted_step_seconds
    assert seconds[1e-1] > 100 * seconds[1e-6]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON"),
        ("[]", "flops = None"),
        (json.dumps({"flops": 1, "memory_bytes": 1, "link_bytes_per_second": 0, "latency_seconds": 1}), "link_bytes"),
    ],
)
def test_a_profile_that_is_none_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        plan_command(job(), device=str(tmp_path / "p.json"))
    with pytest.raises(ConfigError, match=r"none\.json: No such file"):
        plan_command(job(), device=str(tmp_path / "none.json"))


def test_this_machine_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainrt.parallel import profile

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert profile.known() is None
    made = profile.device_of("measured")
    assert made.flops > 1e9 and 1e6 < made.link_bytes_per_second < 1e12 and 1e-7 < made.latency_seconds < 1
    monkeypatch.setattr(profile, "measure", None)
    assert profile.device_of("measured") == profile.known() == made


def test_a_large_model_is_verified_with_smaller_widths_of_the_same_heads() -> None:
    from trainrt.training.blueprint import scaled
    from trainrt.training.pipeline import Pipeline

    sizes = {
        **LLAMA,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
    }
    config = job("huggingface", mesh={"tp": 2}, model={"config": {**sizes, "vocab_size": 4096, "id2label": {0: "a"}}})
    shapes = {name: tuple(p.shape) for name, p in scaled(config, Pipeline()).make().named_parameters()}
    width = shapes["model.norm.weight"][0]
    assert width < 512 and shapes["model.layers.1.mlp.up_proj.weight"] == (4 * width, width)
    assert shapes["model.layers.0.self_attn.k_proj.weight"] == (4 * 2048 // 16, width), "four of sixteen heads"
