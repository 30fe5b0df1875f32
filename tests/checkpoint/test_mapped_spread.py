"""A framework with virtual stages, experts spread unevenly and factored moments, all numbered anew, read by a mapping."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import xxhash

from trainrt.checkpoint.convert import convert
from trainrt.checkpoint.formats import open_any
from trainrt.checkpoint.inspect import inspect
from trainrt.checkpoint.source import digest
from trainrt.errors import ConfigError

LAYERS = {(0, 0): (0, 1), (0, 1): (2, 3), (1, 0): (4, 5), (1, 1): (6,)}
"""(virtual stage, stage) to its layers: rank 0 holds 0, 1, 4, 5."""
EXPERTS = ((0, 1, 2), (3, 4))
RULES = """
format = "mine"
files = "{files}"

[[tensor]]
stored = "{chunk}layer{{l}}.w"
holds = '"m.{{l + first}}.w"'
[[tensor]]
stored = "{chunk}layer{{l}}.expert{{e}}.w"
holds = '"m.{{l + first}}.x.{{e + first_expert}}.w"'
[[tensor]]
stored = "{chunk}layer{{l}}.w"
role = "col_var"
holds = 'transpose("m.{{l + first}}.w")'

[roles]
row_var = "opt.{{name}}.r"
col_var = "opt.{{name}}.c"

[counts]
first = {{of = "l", over = {over}}}
first_expert = {{of = "e", over = ["ep"]}}
"""
FORMS = {
    "a file a virtual stage": ("stage{pp}.{vpp}_{ep}.pt", "", '["vpp", "pp"]'),
    "virtual stages in a file": ("stage{pp}_{ep}.pt", "chunk{v}.", '["v", "pp"]'),
}


def value(layer: int, expert: int, *shape: int) -> torch.Tensor:
    return torch.arange(float(torch.Size(shape).numel())).view(shape) + 100 * layer + 10000 * (expert + 1)


def save_mine(folder: Path, form: str) -> dict[tuple[str, str], torch.Tensor]:
    """Files as that framework has them. Returns what is in them, under its name and role."""
    whole: dict[tuple[str, str], torch.Tensor] = {}
    files: dict[str, dict[str, torch.Tensor]] = {}
    template, chunk, _ = FORMS[form]
    for (virtual, stage), layers in LAYERS.items():
        for rank, experts in enumerate(EXPERTS):
            file = files.setdefault(template.format(pp=stage, vpp=virtual, ep=rank), {})
            for local, layer in enumerate(layers):
                name = f"{chunk.format(v=virtual)}layer{local}"
                file[f"{name}.w"] = whole[f"m.{layer}.w", "parameter"] = value(layer, -1, 3, 4)
                file[f"opt.{name}.w.r"] = whole[f"m.{layer}.w", "row_var"] = value(layer, -1, 3, 1)
                whole[f"m.{layer}.w", "col_var"] = value(layer, -1, 1, 4)
                file[f"opt.{name}.w.c"] = whole[f"m.{layer}.w", "col_var"].t().contiguous()
                for number, expert in enumerate(experts):
                    held = value(layer, expert, 2, 2)
                    file[f"{name}.expert{number}.w"] = whole[f"m.{layer}.x.{expert}.w", "parameter"] = held
    folder.mkdir()
    for file_name, state in files.items():
        torch.save(state, folder / file_name)
    return whole


@pytest.mark.parametrize("form", FORMS)
def test_what_is_numbered_anew_is_counted_and_factored_moments_keep_their_shape(form: str, tmp_path: Path) -> None:
    whole = save_mine(tmp_path / "mine", form)
    files, chunk, over = FORMS[form]
    mapping = tmp_path / "mine.toml"
    mapping.write_text(RULES.format(files=files, chunk=chunk, over=over))
    assert convert(tmp_path / "mine", tmp_path / "universal", to="universal", mapping=mapping)["lost"] == []
    shown = {
        (t["name"], t["role"]): (tuple(t["shape"]), t["digest"]) for t in inspect(tmp_path / "universal")["tensors"]
    }
    assert shown == {
        key: (tuple(tensor.shape), xxhash.xxh3_128_hexdigest(tensor.numpy().tobytes())) for key, tensor in whole.items()
    }
    assert convert(tmp_path / "universal", tmp_path / "dcp", to="dcp")["lost"] == []
    assert digest(open_any(tmp_path / "dcp").source) == {key: held for key, (_, held) in shown.items()}
    lost = convert(tmp_path / "universal", tmp_path / "hf", to="hf")["lost"]
    assert [text.partition(":")[0] for text in lost] == ["col_var", "row_var", "config.json"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('of = "l", over = ["v", "pp"]', 'of = "l"', "counts.first.over: field required"),
        ('role = "col_var"', 'role = "../col"', "tensor.2.role: string should match pattern"),
        ("stage{pp}_{ep}.pt", "stage{pp}_{pp}.pt", "in braces stand the mesh's axes, each once"),
        ('format = "mine"', 'format = "mine', "--mapping"),
    ],
)
def test_a_wrong_mapping_is_refused_with_what_is_wrong(old: str, new: str, message: str, tmp_path: Path) -> None:
    save_mine(tmp_path / "mine", "virtual stages in a file")
    files, chunk, over = FORMS["virtual stages in a file"]
    text = RULES.format(files=files, chunk=chunk, over=over)
    (tmp_path / "mine.toml").write_text(text.replace(old, new))
    with pytest.raises(ConfigError) as error:
        convert(tmp_path / "mine", tmp_path / "out", to="universal", mapping=tmp_path / "mine.toml")
    assert message in str(error.value)
    (tmp_path / "mine.py").write_text("MAPPING = 1 / 0")
    with pytest.raises(ConfigError, match="ZeroDivisionError"):
        convert(tmp_path / "mine", tmp_path / "out", to="universal", mapping=tmp_path / "mine.py")
    (tmp_path / "mine.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"--mapping .*mine\.toml"):
        convert(tmp_path / "mine", tmp_path / "out", to="universal", mapping=tmp_path / "mine.toml")
