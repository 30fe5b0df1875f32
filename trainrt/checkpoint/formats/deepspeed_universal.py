"""DeepSpeed's universal checkpoints, as its `ds_to_universal` makes them.

DIR/zero/{parameter}/{fp32,exp_avg,exp_avg_sq}.pt    the whole tensor: as it is (from stages 1 and 2, with facts beside it),
                                                     or flat, and perhaps padded (from stage 3)
DIR/zero/{parameter}/step.pt                         not from stage 3
DIR/zero/optimizer_state.pt                          settings of the parameter groups
DIR/*mp_rank_00_model_states.pt                      facts: shapes, what is tied, the module (stages 1 and 2)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from trainrt.checkpoint.formats import torch_file
from trainrt.checkpoint.formats.deepspeed import STAND_INS, Facts, read_step, tag_of, with_rounded
from trainrt.checkpoint.formats.files import FileSource
from trainrt.checkpoint.formats.opened import Opened
from trainrt.checkpoint.formats.place import no_link
from trainrt.checkpoint.mapping.rules import Rule, StoredArray, compile_reading
from trainrt.errors import CheckpointError

NAME = "deepspeed-universal"
ROLES = {"fp32": "master"}
COMMON = "zero/optimizer_state.pt"


def recognise(path: Path) -> tuple[Path, str] | None:
    """The directory, and why it is one; None for anything else. A root with `latest_universal` leads to it."""
    latest = path / "latest_universal"
    folder = tag_of(path, latest) if latest.is_file() else path
    found = sorted(no_link(folder / "zero").glob("*/fp32.pt"))
    return (folder, f"zero/{found[0].parent.name}/fp32.pt") if found else None


def open_checkpoint(path: Path, *, model_config: Mapping[str, Any] | None = None) -> Opened:
    """Raises CheckpointError for what is missing or contradicts itself."""
    found = recognise(path)
    if found is None:
        raise CheckpointError(f"{path}: no zero/*/fp32.pt is here")
    folder, why = found
    shards = sorted(folder.glob("zero_pp_rank_*_mp_rank_00_model_states.pt"))
    facts = Facts(folder, 3 if shards else 2, len(shards))
    low = facts.module_dtype in ("bfloat16", "float16")
    rules, arrays = [], []
    steps: dict[str, int] = {}
    for home in sorted(path.parent for path in folder.glob("zero/*/fp32.pt")):
        name = no_link(home).name
        if not shards and (name in facts.frozen or name in facts.aliases or name in facts.buffers):
            # The module has it as it is; here it may be once more, in float32.
            continue
        rules += [Rule(f"whole.{name}", f'"{name}"'), Rule(f"flat.{name}", f'partition("{name}")')]
        for file in sorted(home.glob("*.pt")):
            held = torch_file.load(file, stand_ins=STAND_INS)
            tensor = held.get("param") if isinstance(held, dict) else held
            if file.stem == "step":
                steps[name] = read_step(tensor, file)
                continue
            if not isinstance(tensor, Tensor):
                raise CheckpointError(f"{file}: no tensor is in it")
            whole = tuple(tensor.shape) == facts.shapes.get(name, tuple(tensor.shape))
            role = ROLES.get(file.stem, file.stem)
            role = role if low or role != "master" else "parameter"
            arrays.append(torch_file.array_of(tensor, file, f"{'whole' if whole else 'flat'}.{name}", role))
    module_rules, module = facts.module()
    unique: list[StoredArray] = [
        array
        for array in module
        if low or array.role == "buffer" or f"whole.{array.name}" not in {a.name for a in arrays}
    ]
    layout, unknown, _ = compile_reading([*rules, *module_rules], [*arrays, *unique], variables={}, shapes=facts.shapes)
    source = with_rounded(FileSource(layout), facts) if low and shards else FileSource(layout)
    metadata = facts.metadata(_common(folder), layout, steps, model_config)
    return Opened(NAME, why, path, source, metadata, [array.name for array in unknown])


def _common(folder: Path) -> dict[str, Any]:
    """What is kept of the optimizer beside its tensors, in the form of a rank's state."""
    if not (folder / COMMON).is_file():
        return {}
    held = torch_file.load(folder / COMMON, stand_ins=STAND_INS)
    return {
        "base_optimizer_state": {"param_groups": held.get("param_groups", [])}, "loss_scaler": held.get("loss_scaler"),
    }  # fmt: skip
