"""DeepSpeed's ZeRO checkpoints, stages 1 to 3, for any number of ranks. What is in them: see formats.deepspeed."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from trainrt.checkpoint.formats.deepspeed import FORMAT_VERSION, flat_expression
from trainrt.checkpoint.formats.opened import Opened
from trainrt.checkpoint.live import LiveModel
from trainrt.checkpoint.mapping.rules import Rule, compile_writing
from trainrt.checkpoint.targets.array import TargetArray
from trainrt.checkpoint.targets.files import FilesTarget, TargetFile
from trainrt.checkpoint.targets.foreign import Foreign
from trainrt.checkpoint.targets.shape import Shape
from trainrt.checkpoint.targets.skeleton import Skeleton
from trainrt.checkpoint.targets.target import Target
from trainrt.checkpoint.targets.training import Group, Training
from trainrt.errors import ConfigError

SUB_GROUP_ELEMENTS = 10**9
"""Of a rank: how much stage 3 joins in one flat tensor (DeepSpeed's default of `sub_group_size`)."""
LOSS_SCALER = "deepspeed.runtime.fp16.loss_scaler.LossScaler"
DYNAMIC_LOSS_SCALER = "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"
DYNAMIC = {
    "cur_scale": 2.0**16, "scale_window": 1000, "min_scale": 1, "delayed_shift": 2, "consecutive_hysteresis": False,
}  # fmt: skip
"""What float16 begins with (DeepSpeed's defaults), where the source had another precision."""
FRAGMENT = "deepspeed.utils.tensor_fragment.fragment_address"
Flat = dict[tuple[int, int], TargetArray]
"""(number of a flat tensor, rank) to what it is made of."""


def make(opened: Opened, model: LiveModel | None, shape: Shape) -> tuple[Opened, Target, list[str]]:
    """Raises ConfigError where the number of ranks is not said."""
    if shape.world is None:
        raise ConfigError("--to deepspeed wants --world N: DeepSpeed loads ZeRO states on as many ranks as wrote them")
    training = Training(opened, model)
    ranks = _Ranks(training, shape.world, shape.zero_stage or 1)
    states = [*ranks.optimizer_states(), *ranks.model_states()]
    files = [TargetFile(f"{ranks.tag}/{name}", (Skeleton.of(state),)) for name, state in states]
    return training.opened, FilesTarget(files, {"latest": ranks.tag.encode()}), ranks.lost


def make_universal(opened: Opened, model: LiveModel | None, shape: Shape) -> tuple[Opened, Target, list[str]]:
    """DeepSpeed's universal checkpoint, for ZeRO of any stage (see formats.deepspeed_universal).

    Stage 3 looks for a file of facts for every rank. Raises ConfigError where their number is not said.
    """
    stage = shape.zero_stage or 1
    if stage == 3 and shape.world is None:
        raise ConfigError(
            "--to deepspeed-universal --zero-stage 3 wants --world N: each rank looks for a file of its own"
        )
    training = Training(opened, model)
    ranks = _Ranks(training, shape.world or 1, stage)
    states = [("zero/optimizer_state.pt", ranks.common()), *ranks.model_states()]
    for group in training.groups:
        step = group.step
        for name in group.names:
            for file, role in [("fp32", training.master), *((role, role) for role in ranks.moments_of(name))]:
                whole = TargetArray.whole(training.tensors[name, role])
                states.append((f"zero/{name}/{file}.pt", {"param": whole}))
            if step is not None:
                states.append((f"zero/{name}/step.pt", torch.tensor(float(step))))
    files = [TargetFile(f"{ranks.tag}/{name}", (Skeleton.of(state),)) for name, state in states]
    lost = list(ranks.lost)
    if stage == 3 and any(group.settings != training.groups[0].settings for group in training.groups):
        lost.append(
            "settings of the parameter groups: DeepSpeed's stage 3 gives all groups those of the first when it loads"
        )
    return training.opened, FilesTarget(files, {"latest_universal": ranks.tag.encode()}), lost


class _Ranks:
    """The states of all ranks."""

    def __init__(self, training: Training, world: int, stage: int) -> None:
        self._training, self._world, self._stage = training, world, stage
        self.tag = f"global_step{training.step}"
        self._parts = [part for group in training.groups for part in self._sub_groups(group)]
        rules = [
            Rule(f"flat.{number}", flat_expression({n: training.shape(n) for n in names}, world, stage))
            for number, (_, names) in enumerate(self._parts)
        ]
        self._number = {name: number for number, (_, names) in enumerate(self._parts) for name in names}
        self._masters = self._flat(rules, training.master)
        self.lost = []
        self._moments: dict[str, Flat] = {}
        for role in training.moments:
            held = {name for name, other in training.tensors if other == role}
            whole = [number for number, (_, names) in enumerate(self._parts) if all(self._fits(n, role) for n in names)]
            if whole:
                self._moments[role] = self._flat([rules[number] for number in whole], role)
            left = held - {name for number in whole for name in self._parts[number][1]}
            if left:
                self.lost.append(
                    f"{role} of {len(left)} parameters: ZeRO keeps what has its parameter's shape, for all of a group"
                )

    def _fits(self, name: str, role: str) -> bool:
        """Whether a parameter has this role, in its own shape."""
        tensor = self._training.tensors.get((name, role))
        return tensor is not None and tensor.shape == self._training.shape(name)

    def _sub_groups(self, group: Group) -> Iterator[tuple[Group, tuple[str, ...]]]:
        """Stage 3 joins as many parameters as reach the limit."""
        names: list[str] = []
        held = 0
        for name in group.names:
            names.append(name)
            held += -(-math.prod(self._training.shape(name)) // self._world)
            if self._stage == 3 and held >= SUB_GROUP_ELEMENTS:
                yield group, tuple(names)
                names, held = [], 0
        if names:
            yield group, tuple(names)

    def _flat(self, rules: Sequence[Rule], role: str) -> Flat:
        arrays, _ = compile_writing(rules, self._training.tensors, role=role, axes={"dp": self._world}, variables={})
        return {
            (int(a.name.removeprefix("flat.")), a.at["dp"]): TargetArray(a.name, role, a.dtype, a.shape, tuple(lies))
            for a, lies in arrays
        }

    def moments_of(self, name: str) -> list[str]:
        """The roles of a parameter's state that ZeRO has a place for."""
        return [role for role, flat in self._moments.items() if (self._number[name], 0) in flat]

    def optimizer_states(self) -> Iterator[tuple[str, Any]]:
        """File names and states."""
        prefix = "bf16_" if self._training.low == "bfloat16" else ""
        for rank in range(self._world):
            state = {
                "optimizer_state_dict": self._weights_state(rank) if self._stage == 3 else self._partition_state(rank),
                "ds_config": self._config(), "ds_version": FORMAT_VERSION,
            }  # fmt: skip
            yield f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", state

    def model_states(self) -> Iterator[tuple[str, Any]]:
        """File names and states."""
        if self._stage < 3:
            yield "mp_rank_00_model_states.pt", self._model_state(self._module(), rank=0)
            return
        for rank in range(self._world):
            yield f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt", self._model_state(self._emptied(), rank=rank)

    def common(self) -> dict[str, Any]:
        """What a universal checkpoint keeps of the optimizer beside its tensors; where, the stages do not agree on."""
        state = {number: {"step": torch.tensor(float(g.step or 0))} for number, (g, _) in enumerate(self._parts)}
        groups = self._optimizer(0)["param_groups"]
        return {
            **_loss_scale(self._training), "overflow": False, "clip_grad": 0.0,
            "zero_stage": self._stage, "partition_count": self._world, "ds_version": FORMAT_VERSION, "param_groups": groups,
            "optimizer_state_dict": {"state": state, "param_groups": groups},
        }  # fmt: skip

    def _partition_state(self, rank: int) -> dict[str, Any]:
        """Stages 1 and 2: of every group this rank's range. The masters are without padding, the moments with it."""
        paddings, masters, addresses = [], [], []
        for number, (_, names) in enumerate(self._parts):
            flat = self._masters[number, rank]
            total = sum(math.prod(self._training.shape(name)) for name in names)
            last = rank == self._world - 1
            paddings.append(self._world * flat.elements - total if last else 0)
            masters.append(flat.shortened(max(0, flat.elements - paddings[-1])))
            addresses.append(self._addresses(names, rank * flat.elements, (rank + 1) * flat.elements))
        return {
            **_loss_scale(self._training), "overflow": False, "clip_grad": 0.0,
            "base_optimizer_state": self._optimizer(rank), "single_partition_of_fp32_groups": masters,
            "zero_stage": self._stage, "group_paddings": paddings,
            "param_alignment_paddings": [[0] * len(names) for _, names in self._parts],
            "partition_count": [self._world] * len(self._parts), "ds_version": FORMAT_VERSION,
            "param_slice_mappings": addresses,
        }  # fmt: skip

    def _addresses(self, names: Sequence[str], low: int, high: int) -> OrderedDict[str, Foreign]:
        """Which elements of the range belong to which parameter."""
        found: OrderedDict[str, Foreign] = OrderedDict()
        at = 0
        for name in names:
            first, last = max(low, at), min(high, at + math.prod(self._training.shape(name)))
            if first < last:
                found[name] = Foreign(FRAGMENT, last - first, first - low)
            at += math.prod(self._training.shape(name))
        return found

    def _weights_state(self, rank: int) -> dict[str, Any]:
        """Stage 3: of every parameter this rank's range."""
        return {
            "zero_stage": 3, **_loss_scale(self._training), "overflow": False,
            "partition_count": self._world, "optimizer_state_dict": self._optimizer(rank),
            "fp32_flat_groups": [self._masters[number, rank] for number in range(len(self._parts))],
        }  # fmt: skip

    def _optimizer(self, rank: int) -> dict[str, Any]:
        """As torch's optimizer shows its state, for flat tensors as parameters."""
        state = {}
        for number, (group, _) in enumerate(self._parts):
            moments = {role: flat[number, rank] for role, flat in self._moments.items() if (number, rank) in flat}
            taken = group.step if moments else None
            if moments:
                state[number] = moments if taken is None else {"step": torch.tensor(float(taken)), **moments}
        groups = [
            {**group.settings, "params": [n for n, (other, _) in enumerate(self._parts) if other is group]}
            for group in self._training.groups
        ]
        return {"state": state, "param_groups": groups}

    def _module(self) -> OrderedDict[str, Any]:
        training = self._training
        module = OrderedDict((t.name, TargetArray.whole(t)) for t in [*training.parameters, *training.buffers])
        return module | OrderedDict((tied, module[owner]) for tied, owner in training.aliases.items())

    def _emptied(self) -> OrderedDict[str, Any]:
        """Stage 3 has the names of its parameters here, and nothing of them."""
        training = self._training
        buffers = {tensor.name for tensor in training.buffers}
        emptied = {t.name: torch.empty(0, dtype=getattr(torch, t.dtype)) for t in training.parameters}
        whole = self._module()
        return OrderedDict(
            (name, value if name in buffers else emptied[training.aliases.get(name, name)])
            for name, value in whole.items()
        )

    def _model_state(self, module: OrderedDict[str, Any], *, rank: int) -> dict[str, Any]:
        training = self._training
        shapes = [OrderedDict((n, torch.Size(training.shape(n))) for n in group.names) for group in training.groups]
        frozen = OrderedDict((t.name, torch.Size(t.shape)) for t in training.frozen)
        return {
            "module": module, "buffer_names": [tensor.name for tensor in training.buffers], "optimizer": None,
            "param_shapes": shapes, "frozen_param_shapes": frozen, "shared_params": dict(training.aliases),
            "frozen_param_fragments": self._frozen(rank), "lr_scheduler": None, "data_sampler": None, "random_ltd": None,
            "sparse_tensor_module_names": [], "skipped_steps": 0, "global_steps": training.step, "global_samples": 0,
            "dp_world_size": self._world, "mp_world_size": 1, "ds_config": self._config(), "ds_version": FORMAT_VERSION,
        }  # fmt: skip

    def _frozen(self, rank: int) -> OrderedDict[str, TargetArray]:
        """Frozen parameters: whole in stages 1 and 2, this rank's range of each in stage 3."""
        frozen = self._training.frozen
        if self._stage < 3:
            return OrderedDict((tensor.name, TargetArray.whole(tensor)) for tensor in frozen)
        rules = [Rule(tensor.name, f'partition("{tensor.name}", axis="dp")') for tensor in frozen]
        arrays, _ = compile_writing(
            rules, self._training.tensors, role="parameter", axes={"dp": self._world}, variables={}
        )
        return OrderedDict(
            (array.name, TargetArray(array.name, "parameter", array.dtype, array.shape, tuple(lies)))
            for array, lies in arrays if array.at["dp"] == rank
        )  # fmt: skip

    def _config(self) -> Mapping[str, Any]:
        low = self._training.low
        return {
            "zero_optimization": {"stage": self._stage},
            "bf16": {"enabled": low == "bfloat16"}, "fp16": {"enabled": low == "float16"},
        }  # fmt: skip


def _loss_scale(training: Training) -> dict[str, Any]:
    """Of float16 what the source says, else the constant one."""
    if training.low != "float16":
        return {"loss_scaler": Foreign(LOSS_SCALER, 1.0), "dynamic_loss_scale": False}
    held = {**DYNAMIC, **(training.loss_scale or {"dynamic": True})}
    if not held.get("dynamic"):
        return {"loss_scaler": Foreign(LOSS_SCALER, held["cur_scale"]), "dynamic_loss_scale": False}
    first = [held[key] for key in DYNAMIC]
    return {"loss_scaler": Foreign(DYNAMIC_LOSS_SCALER, *first, state=held), "dynamic_loss_scale": True}
