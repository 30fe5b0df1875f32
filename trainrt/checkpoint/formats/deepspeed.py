"""DeepSpeed's ZeRO checkpoints, stages 1 to 3, as `engine.save_checkpoint` writes them.

    TAG/mp_rank_00_model_states.pt                           stages 1 and 2: the module's weights, and facts
    TAG/zero_pp_rank_{R}_mp_rank_00_model_states.pt          stage 3: facts
    TAG/[bf16_]zero_pp_rank_{R}_mp_rank_00_optim_states.pt   what rank R holds of the masters and the optimizer's state

Stages 1 and 2 flatten the parameters of a group one after the other and cut that in equal ranges; the masters are stored without
the padding at the end, the moments with it. Stage 3 cuts each parameter by itself, and joins its ranges in sub-groups.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from trainrt.checkpoint.formats import torch_file
from trainrt.checkpoint.formats.files import FileSource
from trainrt.checkpoint.formats.opened import Cast, Opened, optimizer_of, plain
from trainrt.checkpoint.formats.place import inside
from trainrt.checkpoint.mapping.expression import Shape
from trainrt.checkpoint.mapping.rules import Rule, StoredArray, compile_reading
from trainrt.checkpoint.source import Source
from trainrt.errors import CheckpointError
from trainrt.parallel.layout import Layout, LogicalTensor

NAME = "deepspeed"
OPTIMIZER_FILE = re.compile(r"(bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
FORMAT_VERSION = "0.19.8"
"""The DeepSpeed whose files these are."""
STAND_INS = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)


def recognise(path: Path) -> tuple[Path, str] | None:
    """The tag's directory, and why it is one; None for anything else. A root with `latest` leads to its tag."""
    latest = path / "latest"
    tag = tag_of(path, latest) if latest.is_file() else path
    found = [file.name for file in tag.iterdir() if OPTIMIZER_FILE.fullmatch(file.name)] if tag.is_dir() else []
    return (tag, f"{tag.name}/{min(found)}") if found else None


def tag_of(path: Path, latest: Path) -> Path:
    """The directory that a file names. Raises CheckpointError for one elsewhere."""
    return inside(path, latest.read_text(errors="replace").strip(), latest)


def open_checkpoint(path: Path, *, model_config: Mapping[str, Any] | None = None) -> Opened:
    """Raises CheckpointError for what is missing or contradicts itself."""
    found = recognise(path)
    if found is None:
        raise CheckpointError(f"{path}: no ZeRO optimizer states of DeepSpeed are here")
    tag, why = found
    ranks = _optimizer_files(tag)
    states = [torch_file.load(file, stand_ins=STAND_INS)["optimizer_state_dict"] for file in ranks]
    stage = int(getattr(states[0]["zero_stage"], "arguments", (states[0]["zero_stage"],))[0])
    count = states[0]["partition_count"]
    count = int(max(count) if isinstance(count, (list, tuple)) else count)
    if count != len(ranks):
        raise CheckpointError(f"{tag}: states of {count} ranks were written, and {len(ranks)} are here")
    facts = Facts(tag, stage, len(ranks))
    low = facts.module_dtype in ("bfloat16", "float16")
    rules, arrays, steps = _flat(ranks, states, facts.groups, stage, role="master" if low else "parameter")
    module_rules, module = facts.module()
    layout, unknown, coordinates = compile_reading(
        [*rules, *module_rules], [*arrays, *module], variables={}, shapes=facts.shapes
    )
    source = with_rounded(FileSource(layout), facts) if low and stage == 3 else FileSource(layout)
    return Opened(
        NAME, f"{why}: ZeRO stage {stage} of {len(ranks)} ranks", path, source,
        facts.metadata(states[0], layout, steps, model_config), [array.name for array in unknown], coordinates,
    )  # fmt: skip


def with_rounded(source: Source, facts: Facts) -> Source:
    """With the parameters of a low precision, where only their masters are stored."""
    tensors = source.layout.tensors
    masters = [tensors[name, "master"] for name in facts.shapes if (name, "master") in tensors]
    return Cast(source, {LogicalTensor(m.name, "parameter", facts.module_dtype, m.shape): m for m in masters})


def _optimizer_files(tag: Path) -> list[Path]:
    found = {}
    for file in tag.iterdir():
        match = OPTIMIZER_FILE.fullmatch(file.name)
        if match is not None:
            if int(match[3]):
                raise CheckpointError(f"{tag}: {file.name}: ZeRO with tensor parallelism is not read")
            found[int(match[2])] = file
    return [found[rank] for rank in sorted(found)]


class Facts:
    """What the model's files say: names and shapes of the groups' parameters, what is tied or frozen, and the module itself."""

    def __init__(self, tag: Path, stage: int, ranks: int) -> None:
        self._name = "zero_pp_rank_{}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
        self._path, self._tag, self._stage, self._ranks = tag / self._name.format(0), tag, stage, ranks
        self._state = torch_file.load(self._path, stand_ins=STAND_INS)
        shapes = self._state["param_shapes"]
        self.groups: list[dict[str, Shape]] = [
            {name: tuple(shape) for name, shape in group.items()}
            for group in (shapes if isinstance(shapes, list) else [shapes])
        ]
        self.aliases: dict[str, str] = dict(self._state.get("shared_params") or {})
        self.buffers = set(self._state.get("buffer_names") or ())
        module = {name: tensor for name, tensor in self._state["module"].items() if isinstance(tensor, Tensor)}
        self._module: dict[str, Tensor] = module
        trained = {name: shape for group in self.groups for name, shape in group.items()}
        frozen = self._state.get("frozen_param_shapes") or {}
        self.frozen = {name: tuple(shape) for name, shape in frozen.items()}
        if stage < 3:
            # Stage 1 says nothing of what is frozen, but has it.
            others = {name: tuple(tensor.shape) for name, tensor in module.items() if name not in trained}
            self.frozen |= {
                name: s for name, s in others.items() if name not in self.buffers and name not in self.aliases
            }
        self.shapes = trained | self.frozen
        floating = {
            str(t.dtype).removeprefix("torch.")
            for name, t in module.items()
            if t.is_floating_point() and name in self.shapes
        }
        config = self._state.get("ds_config") or {}
        enabled = next(
            (kind for kind, key in (("bfloat16", "bf16"), ("float16", "fp16")) if _enabled(config, key)), None
        )
        self.module_dtype = enabled or next(iter(sorted(floating)), "float32")

    def module(self) -> tuple[list[Rule], list[StoredArray]]:
        """Weights as the module has them (stages 1 and 2), buffers, and frozen parameters."""
        rules, arrays = [], []
        for name, tensor in self._module.items():
            whole = self._stage < 3 and name in self.shapes
            if name not in self.aliases and (whole or name in self.buffers):
                rules.append(Rule(name, f'"{name}"'))
                arrays.append(
                    torch_file.array_of(tensor, self._path, name, "buffer" if name in self.buffers else "parameter")
                )
        if self._stage == 3 and self.frozen:
            for rank in range(self._ranks):
                path = self._tag / self._name.format(rank)
                state = self._state if rank == 0 else torch_file.load(path, stand_ins=STAND_INS)
                for name, tensor in state["frozen_param_fragments"].items():
                    arrays.append(torch_file.array_of(tensor, path, f"frozen.{name}", "parameter", dp=rank))
            rules += [Rule(f"frozen.{name}", f'partition("{name}", axis="dp")') for name in self.frozen]
        return rules, arrays

    def metadata(
        self, state: Mapping[str, Any], layout: Layout, steps: Mapping[str, int], model_config: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        base = state.get("base_optimizer_state") or state.get("optimizer_state_dict") or {}
        groups = [
            {
                "tensors": list(names),
                "hyperparameters": {key: value for key, value in group.items() if key != "params" and plain(value)},
            }
            for names, group in zip(self.groups, base.get("param_groups", []), strict=False)
        ]
        return {
            "step": int(self._state.get("global_steps", 0)),
            "aliases": {tied: owner for tied, owner in self.aliases.items() if (owner, "parameter") in layout.tensors},
            "model_config": dict(model_config or {}),
            "optimizer": {
                "name": optimizer_of({role for _, role in layout.tensors}), "groups": groups, "steps": dict(steps),
                **self._loss_scale(state),
            },
            "scheduler": {key: value for key, value in (self._state.get("lr_scheduler") or {}).items() if plain(value)},
        }  # fmt: skip

    def _loss_scale(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """By how much losses are multiplied in float16, and how that follows overflows."""
        scaler = state.get("loss_scaler")
        if self.module_dtype != "float16" or scaler is None:
            return {}
        held = {key: value for key, value in vars(scaler).items() if key != "arguments" and plain(value)}
        return {"loss_scale": held or {"cur_scale": float(scaler.arguments[0]), "dynamic": False}}


def _enabled(config: Any, key: str) -> bool:
    section = config.get(key) or config.get("bfloat16" if key == "bf16" else key) if isinstance(config, dict) else None
    return bool(isinstance(section, dict) and section.get("enabled"))


def _flat(
    files: list[Path], states: list[Mapping[str, Any]], groups: list[dict[str, Shape]], stage: int, *, role: str
) -> tuple[list[Rule], list[StoredArray], dict[str, int]]:
    """Rules and arrays of the flattened masters and moments, and the step of each parameter."""
    world = len(files)
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    parts = _sub_groups(groups, [int(tensor.numel()) for tensor in states[0][key]], world) if stage == 3 else groups
    rules, arrays = [], []
    steps: dict[str, int] = {}
    for number, names in enumerate(parts):
        rules.append(Rule(f"flat.{number}", flat_expression(names, world, stage)))
        for rank, (file, state) in enumerate(zip(files, states, strict=True)):
            arrays.append(torch_file.array_of(state[key][number], file, f"flat.{number}", role, dp=rank))
            for moment, value in _moments(state, number).items():
                if isinstance(value, Tensor) and value.dim():
                    arrays.append(torch_file.array_of(value, file, f"flat.{number}", moment, dp=rank))
                elif moment == "step" and rank == 0:
                    steps |= dict.fromkeys(names, read_step(value, file))
    return rules, arrays, steps


def flat_expression(names: Mapping[str, Shape], world: int, stage: int) -> str:
    """What the flat tensors of a group (of stage 3: of a sub-group) hold. Stages 1 and 2 pad to an even length on each rank."""
    if stage < 3:
        return f'partition({", ".join(map(_quoted, names))}, axis="dp", multiple=2)'
    pieces = ", ".join(f'partition({_quoted(name)}, axis="dp")' for name in names)
    sizes = ", ".join(str(-(-math.prod(shape) // world)) for shape in names.values())
    return f"concat({pieces}, sizes=({sizes},))"


def _quoted(name: str) -> str:
    return f'"{name}"'


def _sub_groups(groups: list[dict[str, Shape]], lengths: list[int], world: int) -> list[dict[str, Shape]]:
    """Stage 3's sub-groups: parameters in their order, as many as fill each one's length exactly."""
    waiting = [(name, shape) for group in groups for name, shape in group.items()]
    found = []
    for length in lengths:
        names: dict[str, Shape] = {}
        while waiting and length > 0:
            name, shape = waiting.pop(0)
            names[name] = shape
            length -= -(-math.prod(shape) // world)
        if length:
            raise CheckpointError(
                f"a sub-group of ZeRO stage 3 does not end with a parameter: {length} elements are left"
            )
        found.append(names)
    return found


def _moments(state: Mapping[str, Any], number: int) -> dict[str, Any]:
    base = state.get("base_optimizer_state") or state["optimizer_state_dict"]
    held = base["state"] if isinstance(base, dict) else base
    return dict(held[number]) if number in held or isinstance(held, list) else {}


def read_step(value: Any, file: Path) -> int:
    """An optimizer's step: a number, or a tensor of one, which is read from its file."""
    if not isinstance(value, Tensor):
        return int(value)
    array = torch_file.array_of(value, file, "step", "step")
    layout, _, _ = compile_reading([Rule("step", '"step"')], [array], variables={})
    source, tensor = FileSource(layout), layout.tensors["step", "step"]
    data = source.read(tensor, layout.fragments[tensor.key][0])
    return int(data.view(array.dtype)[()])
