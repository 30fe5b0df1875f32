"""The universal checkpoint: whole or refused, loadable anywhere, and in Hugging Face as it stands."""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.jobs import job
from tests.reference import validate
from tests.state import Trained
from trainrt.checkpoint.inspect import inspect, verify
from trainrt.checkpoint.manifest import Chunk, file_digest
from trainrt.checkpoint.source import MemorySource, digest
from trainrt.checkpoint.universal import Universal, WritePlan, complete, finish, newest, prepare, prune, write_part
from trainrt.errors import CheckpointError
from trainrt.parallel.layout import Box, Fragment, Layout, LogicalTensor

METADATA: dict[str, Any] = {
    "step": 7,
    "run_id": "r",
    "model_config": {"a": 1},
    "aliases": {},
    "optimizer": {"steps": {}},
}


def small_state() -> MemorySource:
    """Two ranks: a matrix cut over rows, a bf16 one cut over columns, a vector on both, an empty tensor, a scalar."""
    rng = np.random.default_rng(0)
    layout, storages = Layout(), {}
    matrix = LogicalTensor("a.weight", "parameter", "float32", (5, 4))
    columns = LogicalTensor("b.weight", "parameter", "bfloat16", (3, 8))
    vector = LogicalTensor("c", "exp_avg", "float32", (6,))
    empty = LogicalTensor("d", "parameter", "float32", (0, 4))
    scalar = LogicalTensor("e", "buffer", "int64", ())
    shared = rng.integers(0, 255, 24, np.uint8)
    for rank, (first, rows) in enumerate([(0, 3), (3, 2)]):
        storages[rank, "state"] = rng.integers(0, 255, 256, np.uint8)
        storages[rank, "state"][128:152] = shared
        storages[rank, "state"][160:168] = 7
        layout.add(matrix, Fragment(rank, Box((first, 0), (rows, 4)), "state", (4, 1)))
        layout.add(columns, Fragment(rank, Box((0, 4 * rank), (3, 4)), "state", (4, 1), base=64))
        layout.add(vector, Fragment(rank, Box((0,), (6,)), "state", (1,), base=128))
        layout.add(scalar, Fragment(rank, Box((), ()), "state", (), base=160))
    layout.add(empty)
    return MemorySource(layout, storages)


def save(folder: Path, source: MemorySource, metadata: dict[str, Any] = METADATA, *, compress: bool = False) -> Path:
    plan = WritePlan.build(
        source.layout, metadata, writers=["x", "y"], writer_of_rank={0: "x", 1: "y"}, compress=compress
    )
    plan = WritePlan.from_json(json.loads(json.dumps(plan.to_json())))
    prepare(plan, folder)
    return finish(plan, folder, [r for name in ("x", "y") for r in write_part(plan, folder, name, source)])


@pytest.mark.parametrize("compress", [False, True])
def test_what_is_written_is_read(compress: bool, tmp_path: Path) -> None:
    source = small_state()
    path = save(tmp_path, source, compress=compress)
    assert path.name == "step-00000007"
    assert digest(Universal.open(path)) == digest(source)
    assert verify(path)["ok"]
    validate("checkpoint-inspect", inspect(path))
    validate("checkpoint-verify", verify(path))
    validate("manifest", json.loads((path / "manifest.json").read_text()))


def test_both_writers_take_part_and_no_range_is_written_twice() -> None:
    source = small_state()
    plan = WritePlan.build(source.layout, METADATA, writers=["x", "y"], writer_of_rank={0: "x", 1: "y"})
    assert {chunk.writer for chunk in plan.chunks} == {"x", "y"}
    ranges = sorted((chunk.file, chunk.offset, chunk.offset + chunk.length) for chunk in plan.chunks)
    for (file, _, stop), (next_file, start, _) in itertools.pairwise(ranges):
        assert file != next_file or stop <= start


def files_of(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file())


def read_everything(path: Path) -> None:
    digest(Universal.open(path))


@pytest.mark.parametrize("compress", [False, True])
def test_a_flipped_bit_anywhere_is_found_before_a_tensor_is_used(compress: bool, tmp_path: Path) -> None:
    path = save(tmp_path, small_state(), compress=compress)
    rng = random.Random(1)
    for file in files_of(path):
        original = file.read_bytes()
        for _ in range(16):
            at, bit = rng.randrange(len(original)), rng.randrange(8)
            damaged = bytearray(original)
            damaged[at] ^= 1 << bit
            file.write_bytes(damaged)
            with pytest.raises(CheckpointError):
                read_everything(path)
            report = verify(path)
            assert not report["ok"], f"{file} byte {at} bit {bit}"
            assert report["problems"]
        file.write_bytes(original)
    read_everything(path)
    assert verify(path)["ok"]


def test_truncated_missing_and_extra_files_are_named(tmp_path: Path) -> None:
    path = save(tmp_path, small_state())
    for file in files_of(path):
        if file.name in ("COMMIT", "manifest.json"):
            continue
        original, name = file.read_bytes(), str(file.relative_to(path))
        file.write_bytes(original[:-1])
        assert name in {problem["file"] for problem in verify(path)["problems"]}
        file.unlink()
        with pytest.raises(CheckpointError, match=name):
            Universal.open(path)
        file.write_bytes(original)
    (path / "model" / "more").write_text("x")
    assert verify(path)["problems"][0] | {"message": ""} == {
        "file": "model/more", "tensor": None, "kind": "extra", "message": "",
    }  # fmt: skip


def recommit(path: Path, text: str) -> None:
    (path / "manifest.json").write_text(text)
    (path / "COMMIT").write_text(hashlib.sha256(text.encode()).hexdigest() + "\n")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"trainrt-universal/1"', '"trainrt-universal/9"', "trainrt-universal/9"),
        ('"schema":', '"schema": "x", "schema":', "twice"),
        ('"model/config.json"', '"../config.json"', "relative path inside"),
        ('"model/config.json"', '"/etc/passwd"', "relative path inside"),
    ],
)
def test_hostile_manifests_are_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = save(tmp_path, small_state())
    recommit(path, (path / "manifest.json").read_text().replace(old, new, 1))
    with pytest.raises(CheckpointError, match=message):
        Universal.open(path)


def tensor_of(document: dict[str, Any], name: str) -> dict[str, Any]:
    return next(entry for entry in document["tensors"] if entry["name"] == name)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.pop("files"), "manifest.json: files: Field required"),
        (lambda d: d.update(more=1), "manifest.json: more: Extra inputs"),
        (lambda d: d.update(step="7"), "manifest.json: step: Input should be a valid integer"),
        (lambda d: tensor_of(d, "c").update(dtype="float13"), "dtype 'float13'; allowed: float64"),
        (lambda d: tensor_of(d, "c").update(role="../x"), "role: String should match pattern"),
        (lambda d: tensor_of(d, "c").update(shape=[-6]), "shape.0: Input should be greater than or equal to 0"),
        (lambda d: tensor_of(d, "c").update(shape=[7]), r"c \(exp_avg\): its chunks are not the 28 bytes of its shape"),
        (lambda d: tensor_of(d, "c").update(file="model/config.json"), "is in model/config.json, which is no file of tensors"),
        (lambda d: tensor_of(d, "c").update(file="elsewhere"), "is in elsewhere, which is no file of tensors"),
        (lambda d: tensor_of(d, "c")["chunks"][0].update(stored=4), "a chunk that is not compressed is stored in another length"),
        (lambda d: tensor_of(d, "c")["chunks"][0].update(offset=-1), "chunks.0.offset: Input should be greater"),
        (lambda d: d["tensors"].append(tensor_of(d, "c")), r"c \(exp_avg\) stands in it twice"),
        (lambda d: tensor_of(d, "e").update(alias_of="none", file=None, chunks=[]), "e is tied to none, which is not in it"),
        (lambda d: tensor_of(d, "a.weight").update(chunks=tensor_of(d, "a.weight")["chunks"] * 2), "its chunks are not the 80"),
    ],
)  # fmt: skip
def test_a_manifest_of_another_form_is_refused(tmp_path: Path, edit: Any, message: str) -> None:
    path = save(tmp_path, small_state())
    document = json.loads((path / "manifest.json").read_text())
    edit(document)
    recommit(path, json.dumps(document))
    with pytest.raises(CheckpointError, match=message):
        Universal.open(path)
    assert not verify(path)["ok"]


@pytest.mark.parametrize("kind", ["exchanged", "extra", "no object"])
def test_a_header_that_says_otherwise_than_the_manifest_is_refused(kind: str, tmp_path: Path) -> None:
    """transformers goes by the header, we by the manifest: both must lead to the same bytes."""
    layout, storages = Layout(), {(0, "s"): np.arange(16, dtype=np.uint8)}
    for number, name in enumerate(("v", "w")):
        layout.add(
            LogicalTensor(name, "parameter", "float32", (2,)), Fragment(0, Box((0,), (2,)), "s", (1,), 2 * number)
        )
    path = save(tmp_path, MemorySource(layout, storages))
    document = json.loads((path / "manifest.json").read_text())
    name, facts = next((name, facts) for name, facts in document["files"].items() if facts["header_bytes"])
    data = (path / name).read_bytes()
    header = json.loads(data[8 : facts["header_bytes"]])
    if kind == "exchanged":
        header["v"], header["w"] = header["w"], header["v"]
    else:
        header["__metadata__"], header["x"] = {}, header.pop("v") if kind == "extra" else header["v"]
    text = json.dumps(header if kind != "no object" else [], separators=(",", ":")).encode()
    changed = data[:8] + text.ljust(facts["header_bytes"] - 8) + data[facts["header_bytes"] :]
    (path / name).write_bytes(changed)
    chunks = [Chunk(**chunk) for entry in document["tensors"] for chunk in entry["chunks"]]
    document["files"][name]["xxh3"] = file_digest(changed[: facts["header_bytes"]], chunks)
    recommit(path, json.dumps(document))
    message = "is no JSON object" if kind == "no object" else "the file's header and the manifest disagree"
    with pytest.raises(CheckpointError, match=message):
        Universal.open(path)
    assert verify(path)["problems"][0]["kind"] == "header"


@pytest.mark.parametrize("name", ["COMMIT", "manifest.json", "model"])
def test_what_is_behind_a_link_is_refused(name: str, tmp_path: Path) -> None:
    path = save(tmp_path, small_state())
    shutil.move(path / name, tmp_path / "elsewhere")
    (path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=f"{name}: is a symbolic link|{name}.* is not in the manifest"):
        Universal.open(path)


def test_a_symbolic_link_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, small_state())
    file = path / "model" / "config.json"
    shutil.move(file, tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="symbolic link"):
        Universal.open(path)


def test_without_commit_it_is_no_checkpoint(tmp_path: Path) -> None:
    path = save(tmp_path, small_state())
    (path / "COMMIT").unlink()
    assert newest(tmp_path) is None
    with pytest.raises(CheckpointError, match="never finished"):
        Universal.open(path)


def test_a_chunk_that_nobody_wrote_leaves_no_checkpoint(tmp_path: Path) -> None:
    source = small_state()
    plan = WritePlan.build(source.layout, METADATA, writers=["x"], writer_of_rank={})
    prepare(plan, tmp_path)
    with pytest.raises(CheckpointError, match="nobody wrote"):
        finish(plan, tmp_path, write_part(plan, tmp_path, "x", source)[1:])
    assert newest(tmp_path) is None


def test_prune_keeps_the_newest_and_removes_what_was_never_finished(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, small_state(), {**METADATA, "step": step})
    (tmp_path / ".step-00000009.partial").mkdir()
    prune(tmp_path, 2)
    assert [path.name for path in complete(tmp_path)] == ["step-00000003", "step-00000004"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def _write_in_process(document: dict[str, Any], folder: str, name: str, queue: Any) -> None:
    queue.put(write_part(WritePlan.from_json(document), Path(folder), name, small_state()))


def test_processes_write_their_parts_at_the_same_time(tmp_path: Path) -> None:
    source = small_state()
    plan = WritePlan.build(source.layout, METADATA, writers=["x", "y"], writer_of_rank={0: "x", 1: "y"})
    prepare(plan, tmp_path)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [
        context.Process(target=_write_in_process, args=(plan.to_json(), str(tmp_path), n, queue)) for n in "xy"
    ]
    for process in processes:
        process.start()
    results = [result for _ in processes for result in queue.get(timeout=60)]
    for process in processes:
        process.join()
    assert digest(Universal.open(finish(plan, tmp_path, results))) == digest(source)


SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
    "max_position_embeddings": 32,
}  # fmt: skip
LLAMA = {"model_type": "llama", "intermediate_size": 64, "tie_word_embeddings": True}
MOE = {"model_type": "mixtral", "intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2}
TIED = {"model": {"config": {**SIZES, **LLAMA}}}
MIXTRAL = {"model": {"config": {**SIZES, **MOE}}}
BF16 = {"model": {"dtype": "bfloat16"}}


@pytest.mark.parametrize(
    ("sections", "ranks"), [({}, 2), (BF16, 2), (TIED, 2), (MIXTRAL, 2)], ids=["fp32", "bf16", "tied", "mixtral"]
)
def test_transformers_loads_the_model_directory_as_it_stands(
    sections: dict[str, Any], ranks: int, tmp_path: Path
) -> None:
    import torch
    import transformers

    trained = Trained(job("huggingface", mesh={"fsdp": ranks}, **sections), tmp_path, steps=2)
    path = trained.checkpoint()
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        path / "model", output_loading_info=True, dtype="auto"
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert next(model.parameters()).dtype == (torch.bfloat16 if sections is BF16 else torch.float32)
    model.save_pretrained(tmp_path / "saved")
    from safetensors import safe_open

    ours = {key[0]: value for key, value in trained.digests({"parameter"}).items()}
    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as file:
        import xxhash

        for name in file.keys():  # noqa: SIM118
            data = file.get_tensor(name).contiguous().view(torch.uint8).numpy()
            assert xxhash.xxh3_128_hexdigest(data.tobytes()) == ours[name], name


def test_bf16_parameters_are_the_rounded_masters(tmp_path: Path) -> None:
    import torch

    source = Universal.open(Trained(job(mesh={"fsdp": 2}, **BF16), tmp_path, steps=2).checkpoint())
    name = "layers.0.self_attn.q_proj.weight"
    held = [
        (source.layout.tensors[name, role], source.layout.fragments[name, role][0]) for role in ("master", "parameter")
    ]
    master, rounded = (source.read(*where) for where in held)
    assert torch.equal(
        torch.from_numpy(master.view(np.float32)).bfloat16().view(torch.int16), torch.from_numpy(rounded.view(np.int16))
    )
