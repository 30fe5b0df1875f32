"""What may be wrong with a checkpoint of others, by accident or on purpose: it is refused, with the name of what is wrong."""

from __future__ import annotations

import json
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from tests.checkpoint.frameworks import llama
from trainrt.checkpoint.convert import convert
from trainrt.checkpoint.formats import open_any
from trainrt.checkpoint.formats.files import MappedFile
from trainrt.checkpoint.formats.torch_file import records
from trainrt.checkpoint.inspect import verify
from trainrt.checkpoint.source import digest
from trainrt.checkpoint.targets import Shape
from trainrt.checkpoint.targets.universal import UniversalTarget
from trainrt.errors import CheckpointError, TrainrtError
from trainrt.parallel.layout import Layout, LogicalTensor


def safetensors(path: Path, header: str, data: int) -> None:
    """A file with any header, and so many bytes behind it."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(data))


W = '{"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'
HEADERS = {
    "a name twice": (f'{{"w": {W}, "w": {W}}}', 8, "'w' stands twice"),
    "a key twice": ('{"w": {"dtype": "F32", "shape": [2], "shape": [2], "data_offsets": [0, 8]}}', 8, "'shape' stands twice"),
    "overlap": (f'{{"w": {W}, "v": {W.replace("[0, 8]", "[4, 12]")}}}', 12, "v: bytes 4 to 12 overlap"),
    "the same": (f'{{"w": {W}, "v": {W}}}', 8, "w: bytes 0 to 8 overlap"),
    "gap": (f'{{"w": {W}, "v": {W.replace("[0, 8]", "[12, 20]")}}}', 20, "v: bytes 12 to 20 overlap, leave a gap"),
    "overreach": (f'{{"w": {W}}}', 4, "w: bytes 0 to 8 overlap"),
    "more than it says": (f'{{"w": {W}}}', 12, "its header accounts for"),
    "another shape": (f'{{"w": {W.replace("[2]", "[3]")}}}', 8, r"are not \(3,\) of float32"),
    "negative": (f'{{"w": {W.replace("[2]", "[-1, -2]")}}}', 8, "w: .* is not dtype, shape, data_offsets"),
    "true": (f'{{"w": {W.replace("[0, 8]", "[false, 8]")}}}', 8, "w: .* is not dtype, shape, data_offsets"),
    "text": (f'{{"w": {W.replace("[0, 8]", json.dumps("08"))}}}', 8, "w: .* is not dtype, shape, data_offsets"),
    "no entry": ('{"w": 3}', 8, "w: 3 is not dtype, shape, data_offsets"),
    "dtype": (f'{{"w": {W.replace("F32", "F13")}}}', 8, "w: dtype 'F13'; allowed: BF16"),
    "no object": ("[]", 0, "is no JSON object"),
    "no JSON": ('{"w": ', 8, "no JSON"),
    "deep": ("[" * 100_000, 0, "nested too deeply"),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_contradicts_its_file_is_refused(case: str, tmp_path: Path) -> None:
    header, data, message = HEADERS[case]
    safetensors(tmp_path / "hf" / "model.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as error:
        open_any(tmp_path / "hf")
    assert "model.safetensors" in str(error.value)


@pytest.mark.parametrize("length", [2**63, 10**6, 0])
def test_a_header_longer_than_its_file_is_not_read(length: int, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(length.to_bytes(8, "little"))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: (its header would have|no JSON)"):
        open_any(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"1234")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: its header would have"):
        open_any(tmp_path)


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ('{"weight_map": {"w": "a.safetensors", "w": "a.safetensors"}}', "'w' stands twice"),
        ('{"weight_map": {"w": "../a.safetensors"}}', r"names the file '\.\./a.safetensors'"),
        ('{"weight_map": {"w": "/etc/passwd"}}', "names the file '/etc/passwd'"),
        ('{"weight_map": {"w": "linked.safetensors"}}', r"linked\.safetensors: is a symbolic link"),
        ('{"weight_map": {"w": "missing.safetensors"}}', r"missing\.safetensors: No such file"),
        (
            '{"weight_map": {"v": "a.safetensors"}}',
            r"a\.safetensors: v is in the index or in the file, and not in both",
        ),
        ('{"weight_map": {"w": 3}}', "weight_map is no table"),
        ("[]", "is no JSON object"),
        ("{}", "weight_map is no table"),
    ],
)
def test_an_index_that_leads_elsewhere_is_refused(index: str, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    for place in (tmp_path / "a.safetensors", folder / "a.safetensors"):
        safetensors(place, f'{{"w": {W}}}', 8)
    (folder / "linked.safetensors").symlink_to(tmp_path / "a.safetensors")
    (folder / INDEX).write_text(index)
    with pytest.raises(CheckpointError, match=message) as error:
        open_any(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_model_behind_a_link_is_refused(name: str, written: Path, tmp_path: Path) -> None:
    folder = copied(written / "hf", tmp_path / "hf")
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name}: is a symbolic link"):
        open_any(folder)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in the formats of others: directories `zero`, `universal` and `dcp`."""
    folder = tmp_path_factory.mktemp("written")
    llama(num_hidden_layers=1, dtype="bfloat16").save_pretrained(folder / "hf")
    convert(folder / "hf", folder / "zero", to="deepspeed", shape=Shape(world=2))
    convert(folder / "hf", folder / "universal", to="deepspeed-universal")
    convert(folder / "hf", folder / "dcp", to="dcp")
    return folder


def copied(path: Path, to: Path) -> Path:
    shutil.copytree(path, to, symlinks=True)
    return to


TAG = "global_step0"
RANK = f"{TAG}/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"


def linked(path: Path) -> None:
    elsewhere = path.parent.parent.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flipped_pickle(path: Path) -> None:
    """A bit of the name of a tensor, in a part that torch itself does not check."""
    data = bytearray(path.read_bytes())
    data[data.index(b"q_proj")] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "zero: latest leads out": ("zero/latest", lambda p: p.write_text("../elsewhere"), r"latest names the file '\.\./elsewhere'"),
    "zero: latest is absolute": ("zero/latest", lambda p: p.write_text("/etc"), "latest names the file '/etc'"),
    "zero: latest is nothing": ("zero/latest", lambda p: p.write_bytes(b""), "latest names the file ''"),
    "zero: linked": (f"zero/{RANK}", linked, "rank_1_mp_rank_00_optim_states.pt: is a symbolic link"),
    "zero: linked tag": (f"zero/{TAG}", linked, f"{TAG}: is a symbolic link"),
    "zero: missing": (f"zero/{RANK}", Path.unlink, "states of 2 ranks were written, and 1 are here"),
    "zero: extra": (
        f"zero/{RANK}", lambda p: p.with_name(p.name.replace("rank_1", "rank_2", 1)).write_bytes(p.read_bytes()),
        "states of 2 ranks were written, and 3 are here",
    ),
    "zero: no facts": (f"zero/{TAG}/mp_rank_00_model_states.pt", Path.unlink, "model_states.pt: is missing"),
    "zero: truncated": (f"zero/{RANK}", truncated, "rank_1_mp_rank_00_optim_states.pt: no zip file"),
    "zero: flipped": (f"zero/{TAG}/mp_rank_00_model_states.pt", flipped_pickle, "model_states.pt: refused: BadZipFile"),
    "zero: another form": (f"zero/{RANK}", lambda p: torch.save({}, p), "is not as deepspeed writes it"),
    "universal: latest": (
        "universal/latest_universal", lambda p: p.write_text("../x"), r"latest_universal names the file '\.\./x'",
    ),
    "universal: linked": (f"universal/{TAG}/zero/model.norm.weight", linked, "model.norm.weight: is a symbolic link"),
    "universal: truncated": (f"universal/{TAG}/zero/model.norm.weight/fp32.pt", truncated, "fp32.pt: no zip file"),
    "dcp: missing": ("dcp/__0_0.distcp", Path.unlink, "__0_0.distcp: is missing"),
    "dcp: truncated": ("dcp/__0_0.distcp", truncated, "__0_0.distcp: refused"),
    "dcp: linked": ("dcp/__0_0.distcp", linked, "__0_0.distcp: is a symbolic link"),
    "dcp: another pickle": ("dcp/.metadata", lambda p: p.write_bytes(pickle.dumps({"a": 1})), "is not as dcp writes it"),
    "dcp: half a pickle": ("dcp/.metadata", truncated, "no metadata of a distributed checkpoint"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(case: str, written: Path, tmp_path: Path) -> None:
    place, damage, message = DAMAGE[case]
    root = copied(written / place.split("/")[0], tmp_path / "made" / place.split("/")[0])
    damage(tmp_path / "made" / place)
    with pytest.raises(CheckpointError, match=message):
        open_any(root)
    with pytest.raises(CheckpointError, match=message):
        convert(root, tmp_path / "out", to="universal")
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"relative_path": "../dcp/__0_0.distcp"}, r"names the file '\.\./dcp/__0_0\.distcp'"),
        ({"relative_path": "/etc/passwd"}, "names the file '/etc/passwd'"),
        ({"offset": 10**9}, "refused"),
        ({"box": 1}, "reaches outside of it"),
    ],
)
def test_metadata_of_dcp_that_leads_elsewhere_is_refused(
    change: dict[str, Any], message: str, written: Path, tmp_path: Path
) -> None:
    path = copied(written / "dcp", tmp_path / "dcp")
    metadata = dcp.FileSystemReader(path).read_metadata()
    for info in metadata.storage_data.values():
        vars(info).update({key: value for key, value in change.items() if key != "box"})
    if "box" in change:
        entry: Any = metadata.state_dict_metadata["model.model.norm.weight"]
        entry.size = torch.Size([n - change["box"] for n in entry.size])
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=message):
        open_any(path)


def test_a_tensor_that_claims_more_than_its_record_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(4), "v": torch.ones(400)}, tmp_path / "only.pt")
    (first, size, _), *_ = records(tmp_path / "only.pt")
    held = MappedFile(tmp_path / "only.pt", records(tmp_path / "only.pt"))
    held.check(first, first + size)
    with pytest.raises(CheckpointError, match="are not the data of one tensor"):
        held.check(first, first + size + 1)
    with pytest.raises(CheckpointError, match="are not the data of one tensor"):
        held.check(first - 1, first + 1)


def test_names_of_tensors_become_no_files_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    save_file({"../../../evil": torch.ones(2), "w": torch.ones(2)}, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"a tensor of the source names the file '.*/\.\./\.\./\.\./evil/fp32\.pt'"
    ):
        convert(tmp_path / "hf", tmp_path / "a" / "out", to="deepspeed-universal")
    convert(tmp_path / "hf", tmp_path / "a" / "out", to="universal")
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "a"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"out"}
    layout = Layout()
    layout.add(LogicalTensor("w", "../../../exp_avg", "float32", (0,)))
    with pytest.raises(CheckpointError, match=r"w: role '\.\./\.\./\.\./exp_avg'; allowed: letters"):
        UniversalTarget(layout, {"step": 0})


def test_any_flipped_bit_is_refused_or_changes_nothing(
    written: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Also those outside of what has checksums: the structure of zip files. `.metadata` has none."""
    count, rng = (400 if request.config.getoption("--campaign") else 24), random.Random(5)
    for form in ("zero", "universal", "dcp"):
        path = copied(written / form, tmp_path / form)
        files = sorted(p for p in path.rglob("*") if p.suffix in (".pt", ".distcp") or p.name == ".metadata")
        opened = open_any(path)
        sound = digest(opened.source), opened.metadata
        for _ in range(count):
            file = rng.choice(files)
            original = file.read_bytes()
            data = bytearray(original)
            at = rng.choice((rng.randrange(len(data)), rng.randrange(max(0, len(data) - 2000), len(data))))
            data[at] ^= 1 << rng.randrange(8)
            file.write_bytes(data)
            try:
                again = open_any(path)
                same = (digest(again.source), again.metadata) == sound
            except TrainrtError:
                same = True
            assert same or file.name == ".metadata", (file, at)
            file.write_bytes(original)
    assert verify(written / "zero")["ok"]
