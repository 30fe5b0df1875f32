"""Configs: what is wrong is said in one line each, with key, value, and what is allowed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest

from trainrt.config import learned_differences, load, parse, to_toml
from trainrt.errors import ConfigError

EXPLICIT = {"mode": "explicit"}


def test_an_empty_file_is_a_whole_job(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text("")
    config = load(tmp_path / "job.toml")
    assert (config.run.steps, config.data.source, config.world_size, config.mesh()) == (100, "stdlib", 4, None)
    assert parse(tomllib.loads(to_toml(config))) == config


def test_overrides_are_toml_values_or_words(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text("[run]\nsteps = 5\n")
    config = load(
        tmp_path / "job.toml", ["run.steps=7", "optimizer.betas=[0.8, 0.9]", "run.name=x", "optimizer.warmup_steps=1"]
    )
    assert (config.run.steps, config.optimizer.betas, config.run.name) == (7, (0.8, 0.9), "x")


def test_relative_paths_start_at_the_file(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("x")
    (tmp_path / "job.toml").write_text('[data]\nsource = "text.txt"\n')
    assert load(tmp_path / "job.toml").data.source == str(tmp_path / "text.txt")


def directory(tmp: Path, **sizes: Any) -> dict[str, Any]:
    (tmp / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 64, **sizes}))
    return {"kind": "huggingface", "config": str(tmp)}


WRONG: list[tuple[dict[str, Any], list[str]]] = [
    ({"run": {"stps": 1}}, ["run.stps", 'did you mean "steps"']),
    ({"modl": {}}, ["modl", 'did you mean "model"']),
    ({"model": {"config": {"hiden_size": 4}}}, ["model.config.hiden_size", 'did you mean "hidden_size"']),
    ({"run": {"steps": "many"}}, ["run.steps", "'many'", "integer"]),
    ({"snapshot": {"parity_shards": 4}}, ["snapshot.parity_shards = 4", "0, 1, 2, 3"]),
    ({"snapshot": {"data_shards": 0}}, ["snapshot.data_shards = 0", "from 1"]),
    ({"cluster": {"node_mtbf_hours": 0}}, ["cluster.node_mtbf_hours = 0", "above 0"]),
    ({"cluster": {"node_mtbf_hours": "often"}}, ["cluster.node_mtbf_hours = 'often'", "number"]),
    ({"run": {"steps": 0}}, ["run.steps = 0", "greater than or equal to 1"]),
    ({"parallel": {"mode": "explict"}}, ["parallel.mode", 'did you mean "explicit"', "'auto'"]),
    ({"data": {"global_batch": 10, "microbatch": 4}}, ["data.microbatch = 4", "data.global_batch = 10", "1, 2, 5, 10"]),
    ({"parallel": {**EXPLICIT, "fsdp": 3}}, ["parallel", "1*1*3*1*1 = 3", "cluster.nodes", "= 4"]),
    (
        {"parallel": {**EXPLICIT, "tp": 4}, "model": {"config": {"heads": 2}}},
        ["parallel.tp = 4", "model.config.heads = 2", "1, 2"],
    ),
    ({"parallel": {**EXPLICIT, "fsdp": 4, "ep": 3}}, ["parallel.ep = 3", "dp*fsdp*cp*tp = 4", "1, 2, 4"]),
    (
        {"parallel": {**EXPLICIT, "fsdp": 4, "ep": 4}, "moe": {"experts": 3}},
        ["parallel.ep = 4", "moe.experts = 3", "at most 3, or a multiple of it"],
    ),
    ({"parallel": {**EXPLICIT, "pp": 2, "fsdp": 2}}, ["parallel.pp = 2", "not built yet"]),
    ({"parallel": {**EXPLICIT, "cp": 2, "fsdp": 2}}, ["parallel.cp = 2", "not built yet"]),
    ({"engine": {"kind": "deepspeed"}}, ["engine.kind", "not built yet"]),
    ({"moe": {"top_k": 11, "zero_experts": 1, "copy_experts": 1}}, ["moe.top_k = 11", "10 experts"]),
    ({"moe": {"degree": 0}}, ["moe.degree = 0", "a whole number from 1"]),
    ({"moe": {"r": -1}}, ["moe.r = -1", '"auto", 0, or a divisor']),
    ({"checkpoint": {"compress": "lz4"}}, ["checkpoint.compress", "zstd"]),
    ({"moe": {"top_k": 9}}, ["moe.top_k = 9", "moe.experts = 8"]),
    ({"moe": {"prioritised": True}}, ["moe.prioritised = true", "moe.capacity_factor other than 0"]),
    ({"moe": {"balance": "bias", "copy_experts": 1}}, ['moe.balance = "bias"', "zero-computation", '"loss"']),
    ({"moe": {"balance": "bias", "bias_rate": 0}}, ["moe.bias_rate = 0", "greater than 0"]),
    (
        {"moe": {"routing": "expert_choice", "prioritised": True, "capacity_factor": 2, "balance": "bias"}},
        ['moe.routing = "expert_choice"', "moe.prioritised = true", 'moe.balance = "bias"'],
    ),
    (
        {"moe": {"routing": "expert_choice", "zero_experts": 1}},
        ['moe.routing = "expert_choice"', "moe.zero_experts", "top_k"],
    ),
    ({"moe": {"routing": "expert_choice", "dropless": True}}, ['moe.routing = "expert_choice"', "moe.dropless = true"]),
    ({"moe": {"dropless": True, "capacity_factor": 1.0}}, ["moe.dropless", "moe.capacity_factor"]),
    ({"model": {"config": {"heads": 3}}}, ["model.config.heads = 3", "model.config.hidden_size = 128"]),
    ({"model": {"config": {"kv_heads": 3}}}, ["model.config.kv_heads = 3", "model.config.heads = 4"]),
    ({"data": {"sequence_length": 2048}}, ["data.sequence_length = 2048", "model.config.max_position = 1024"]),
    ({"optimizer": {"warmup_steps": 200}}, ["optimizer.warmup_steps = 200", "run.steps = 100"]),
    ({"data": {"source": "/no/such/file"}}, ["data.source", "/no/such/file", "stdlib"]),
    ({"model": {"kind": "huggingface", "config": "/no/such/model"}}, ["model.config", "config.json"]),
    ({"model": {"kind": "huggingface", "config": {}}}, ["model.config", "model_type"]),
    ({"model": {"kind": "huggingface", "config": {"model_type": "llama"}}, "moe": {"experts": 4}}, ["moe.experts = 4"]),
    (
        {
            "model": {"kind": "huggingface", "config": {"model_type": "llama"}},
            "moe": {"prioritised": True, "capacity_factor": 1},
        },
        ["moe.prioritised = true: only moe_lm has this"],
    ),
    ({"model": {"kind": "moe_lm", "config": "somewhere"}}, ["model.config", "table"]),
]


@pytest.mark.parametrize(("document", "words"), WRONG, ids=lambda value: None)
def test_what_is_wrong_is_said(document: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(document)
    for word in words:
        assert word in str(caught.value)


def test_several_mistakes_are_said_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse({"run": {"stps": 1}, "data": {"microbatch": "x"}})
    assert len(str(caught.value).splitlines()) == 2


def test_a_model_directory_is_held_against_the_job(tmp_path: Path) -> None:
    model = directory(tmp_path, num_attention_heads=6, max_position_embeddings=128)
    with pytest.raises(ConfigError, match="max_position_embeddings = 128"):
        parse({"model": model})
    with pytest.raises(ConfigError, match="num_attention_heads = 6"):
        parse({"model": model})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="no JSON"):
        parse({"model": model})


def test_what_changes_what_is_learned_is_named() -> None:
    old = parse({})
    assert (
        learned_differences(old, parse({"cluster": {"nodes": 1}, "snapshot": {"every": 5}, "run": {"steps": 200}}))
        == []
    )
    found = learned_differences(old, parse({"optimizer": {"learning_rate": 1e-3}, "run": {"seed": 1}}))
    assert [line.partition(":")[0] for line in found] == ["optimizer.learning_rate", "run.seed"]
    assert "run.steps" in learned_differences(old, parse({"run": {"steps": 50}}))[0]


def launch(tmp_path: Path, text: str, *options: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "job.toml").write_text(text)
    command = [sys.executable, "-m", "trainrt.cli", "launch", "job.toml", *options]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("text", "options", "word"),
    [
        ("[run]\nstps = 3\n", [], "run.stps"),
        ("[run\n", [], "line 1"),
        ("", ["--set", "run.steps"], "--set run.steps"),
        ("", ["--set", "run.stpes=3"], 'did you mean "steps"'),
        ("", ["--nodes", "x"], "nodes"),
    ],
)
def test_the_command_exits_2_at_once_and_writes_nothing(
    tmp_path: Path, text: str, options: list[str], word: str
) -> None:
    started = time.monotonic()
    result = launch(tmp_path, text, *options)
    assert (result.returncode, result.stdout) == (2, "")
    assert word in result.stderr
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["job.toml"]
    assert time.monotonic() - started < 30  # a hang, not a measure


def test_a_wrong_config_loads_neither_torch_nor_ray() -> None:
    code = "import sys, trainrt.cli, trainrt.config; print({'torch', 'ray', 'transformers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.toml: No such file"):
        load(tmp_path / "nothing.toml")


def test_a_bias_leaves_no_balance_loss_unless_one_is_given() -> None:
    assert parse({}).moe.balance_loss == 0.01
    for moe, expected in (({"balance": "bias"}, 0.0), ({"balance": "bias", "balance_loss": 0.02}, 0.02)):
        config = parse({"moe": moe})
        assert config.moe.balance_loss == expected and parse(tomllib.loads(to_toml(config))) == config
