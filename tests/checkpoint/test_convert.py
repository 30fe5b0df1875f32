"""`trainrt convert`: what comes out is what went in, whoever wrote it; kills cost a unit, and damage is named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.checkpoint.conftest import Covers, Made
from tests.checkpoint.frameworks import llama
from tests.reference import validate
from trainrt.checkpoint import writer
from trainrt.checkpoint.convert import convert
from trainrt.checkpoint.formats import open_any
from trainrt.checkpoint.inspect import diff, verify
from trainrt.checkpoint.progress import memory_bytes
from trainrt.checkpoint.source import digest
from trainrt.checkpoint.targets import Shape
from trainrt.errors import CheckpointError, ConfigError


def digests(path: Path) -> dict[Any, str]:
    return digest(open_any(path).source)


def cli(*words: object, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trainrt.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **environ})


@pytest.mark.parametrize(
    ("changes", "most"),
    [({}, "10GB"), ({}, "20KB"), ({"dtype": "bfloat16"}, "10GB"), ({"tie_word_embeddings": True}, "10GB")],
    ids=["single", "sharded", "bf16", "tied"],
)
def test_hugging_face_goes_to_universal_and_back(
    changes: dict[str, Any], most: str, tmp_path: Path, covers: Covers
) -> None:
    covers("hf", "read and written, loaded by transformers", ", ".join(map(str, changes)) or f"shards of {most}")
    model = llama(**changes)
    model.save_pretrained(tmp_path / "hf", max_shard_size=most)
    document = convert(tmp_path / "hf", tmp_path / "universal", to="universal")
    validate("convert", document)
    assert (document["source_format"], document["lost"]) == ("hf", [])
    assert verify(tmp_path / "universal")["ok"]
    assert digests(tmp_path / "hf") == digests(tmp_path / "universal")
    convert(tmp_path / "universal", tmp_path / "again", to="hf")
    assert digests(tmp_path / "hf") == digests(tmp_path / "again")
    for path in (tmp_path / "universal" / "model", tmp_path / "again"):
        loaded = type(model).from_pretrained(path)
        theirs = loaded.state_dict()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())
        assert loaded.dtype == model.dtype


ZERO_3 = {"stage": 3, "world": 2, "dtype": "bfloat16", "groups": True}
ZERO_1 = {"stage": 1, "world": 2}


def test_a_zero_checkpoint_becomes_a_model_and_keeps_its_optimizer(made: Made, tmp_path: Path) -> None:
    checkpoint, expected = made("deepspeed", **ZERO_3)
    llama().config.save_pretrained(tmp_path / "config")
    to_universal = convert(checkpoint, tmp_path / "universal", to="universal", model_config=tmp_path / "config")
    assert to_universal["lost"] == [] and "ZeRO stage 3 of 2 ranks" in to_universal["recognised_by"]
    held = open_any(tmp_path / "universal")
    assert held.step == 3 and held.metadata["optimizer"]["groups"][0]["hyperparameters"]["lr"] == 1e-3
    assert {role for _, role in held.source.layout.tensors} == {"parameter", "master", "exp_avg", "exp_avg_sq"}
    to_hf = convert(tmp_path / "universal", tmp_path / "hf", to="hf")
    assert [text.split(":")[0] for text in to_hf["lost"]] == ["exp_avg", "exp_avg_sq", "master"]
    loaded = type(llama()).from_pretrained(tmp_path / "hf").state_dict()
    for name, tensor in loaded.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, torch.from_numpy(expected[f"master/{name}"]).bfloat16()), name


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of some thirty units of the size that `small_units` makes."""
    llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


SMALL_UNITS = """
import sys, time
from trainrt.checkpoint import convert, writer
writer.CHUNK_BYTES = 8192
note = convert.Journal.note
def slow(self, *arguments, **named):
    note(self, *arguments, **named)
    time.sleep(0.05)
convert.Journal.note = slow
convert.convert(sys.argv[1], sys.argv[2], to="universal", jobs=2)
"""


def interrupt(model: Path, target: Path, *, units: int) -> Path:
    """Kill a conversion when so many units are noted; the journal."""
    journal = target.parent / f".{target.name}.converting" / "journal.jsonl"
    process = subprocess.Popen([sys.executable, "-c", SMALL_UNITS, str(model), str(target)])
    while not journal.exists() or len(journal.read_text().splitlines()) <= units:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    # Its jobs end with it.
    time.sleep(0.2)
    return journal


def test_after_a_kill_the_same_command_goes_on_and_redoes_a_unit_a_job_at_most(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "CHUNK_BYTES", 8192)
    target = tmp_path / "universal"
    journal = interrupt(model, target, units=7)
    noted = len(journal.read_text().splitlines()) - 1
    assert not target.exists()
    seen: list[tuple[int, int]] = []
    document = convert(model, target, to="universal", jobs=1, progress=lambda *at: seen.append(at))
    assert seen[0] == (noted, document["units"]) and 7 <= noted < document["units"]
    assert document["bytes_written"] < document["bytes_read"]
    assert digests(target) == digests(model)
    assert not journal.parent.exists()


def test_a_changed_source_is_noticed_and_restart_begins_anew(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "CHUNK_BYTES", 8192)
    target = tmp_path / "universal"
    interrupt(model, target, units=3)
    with (model / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x07")
    with pytest.raises(ConfigError, match="the source has changed since"):
        convert(model, target, to="universal")
    convert(model, target, to="universal", restart=True)
    assert digests(target) == digests(model)


@pytest.mark.parametrize(("to", "shape"), [("universal", Shape()), ("hf", Shape()), ("deepspeed", Shape(world=2))])
def test_an_end_just_before_the_name_is_given_costs_nothing(
    to: str, shape: Shape, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr("trainrt.checkpoint.convert._publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert(model, tmp_path / "out", to=to, shape=shape)
    assert not (tmp_path / "out").exists()
    assert convert(model, tmp_path / "out", to=to, shape=shape)["bytes_written"] == 0
    assert digests(tmp_path / "out") == digests(model)
    assert not (tmp_path / ".out.converting").exists()


def test_a_model_without_a_config_has_none_and_the_command_says_so(model: Path, tmp_path: Path) -> None:
    (model / "config.json").rename(tmp_path / "config.json")
    document = convert(model, tmp_path / "out", to="hf")
    assert document["lost"] == ["config.json: not known (--model-config gives it)"]
    assert not (tmp_path / "out" / "config.json").exists()
    convert(model, tmp_path / "with", to="hf", model_config=tmp_path / "config.json")
    assert json.loads((tmp_path / "with" / "config.json").read_text())["hidden_size"] == 64


def test_a_complete_target_is_compared_and_another_one_is_refused(model: Path, tmp_path: Path) -> None:
    first = convert(model, tmp_path / "universal", to="universal")
    again = convert(model, tmp_path / "universal", to="universal")
    assert first["bytes_written"] > 0 == again["bytes_written"]
    llama(hidden_size=64, intermediate_size=128, rms_norm_eps=1e-5).save_pretrained(tmp_path / "other")
    shutil.copy(model / "model.safetensors", tmp_path / "other")
    with (tmp_path / "other" / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x07")
    with pytest.raises(ConfigError, match="is not what this conversion makes"):
        convert(tmp_path / "other", tmp_path / "universal", to="universal")
    (tmp_path / "universal" / "model" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"is there already, and damaged: model/config\.json"):
        convert(model, tmp_path / "universal", to="universal")


def test_a_difference_is_measured_over_formats(model: Path, tmp_path: Path) -> None:
    convert(model, tmp_path / "universal", to="universal")
    document = diff(model, tmp_path / "universal")
    validate("checkpoint-diff", document)
    assert document["equal"]
    changed = llama(hidden_size=64, intermediate_size=128, num_hidden_layers=3)
    with torch.no_grad():
        changed.model.norm.weight += 0.25
    changed.save_pretrained(tmp_path / "changed")
    lines = {line["name"]: line for line in diff(model, tmp_path / "changed")["tensors"]}
    assert lines["model.norm.weight"]["kind"] == "differs" and lines["model.norm.weight"]["max_abs"] == 0.25
    assert lines["model.norm.weight"]["max_rel"] == 0.2
    assert lines["model.layers.2.mlp.up_proj.weight"]["kind"] == "extra"
    shown = cli("checkpoint", "diff", tmp_path / "changed", model)
    assert shown.returncode == 1 and "missing" in shown.stdout


def test_replicas_that_differ_are_named_unless_the_mean_is_asked_for(made: Made, tmp_path: Path) -> None:
    checkpoint, _ = made("deepspeed", **ZERO_1)
    path = checkpoint / "global_step3" / "mp_rank_00_model_states.pt"
    state = torch.load(path, weights_only=False)
    state["module"]["model.norm.weight"] += 0.5
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"model.norm.weight \(parameter\) is replicated and differs"):
        convert(checkpoint, tmp_path / "universal", to="universal")
    assert not (tmp_path / "universal").exists()
    convert(checkpoint, tmp_path / "universal", to="universal", average=True, restart=True)
    held = open_any(tmp_path / "universal").source
    from trainrt.checkpoint.source import read_whole

    found = read_whole(held, held.layout.tensors["model.norm.weight", "parameter"]).view(np.float32)
    assert np.allclose(found, state["module"]["model.norm.weight"].numpy() - 0.25)


def test_damage_in_a_record_of_a_pickled_file_is_found_before_it_is_used(made: Made, tmp_path: Path) -> None:
    checkpoint, _ = made("deepspeed", **ZERO_1)
    path = next((checkpoint / "global_step3").glob("*optim_states.pt"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        convert(checkpoint, tmp_path / "universal", to="universal")


def test_the_command_says_what_it_would_do_and_what_is_wrong(model: Path, tmp_path: Path) -> None:
    dry = cli("convert", model, tmp_path / "out", "--to", "universal", "--dry-run", "--json")
    document = json.loads(dry.stdout)
    assert dry.returncode == 0 and document["lost"] == [] and document["bytes_to_write"] > 0
    assert not list(tmp_path.glob("*out*"))
    wrong = cli("convert", model, tmp_path / "out", "--to", "universl")
    assert (wrong.returncode, 'did you mean "universal"?' in wrong.stderr, "Traceback" in wrong.stderr) == (
        2,
        True,
        False,
    )
    with pytest.raises(ConfigError, match="--memory 104857600: at least"):
        convert(model, tmp_path / "out", to="hf", memory_bytes=memory_bytes("100MiB"))
    with pytest.raises(ConfigError, match="--memory lots"):
        memory_bytes("lots")
    with pytest.raises(ConfigError, match="--model-config /nothing"):
        convert(model, tmp_path / "out", to="hf", model_config="/nothing")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint of a format that is known"):
        convert(empty, tmp_path / "out", to="hf")
