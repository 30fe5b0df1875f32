"""Megatron-LM's classic checkpoints: a file for each rank of the model.

ROOT/latest_checkpointed_iteration.txt                           a number, or "release"
ROOT/iter_0000100/mp_rank_{TP}[_{PP}][_{EP}]/model_optim_rng.pt  arguments, model (with virtual stages model0, model1 ...),
                                                                 optimizer, scheduler, random states
                                          .../distrib_optim.pt   what the distributed optimizer keeps
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from trainrt.checkpoint.formats import torch_file
from trainrt.checkpoint.formats.files import FileSource
from trainrt.checkpoint.formats.megatron_config import metadata_of
from trainrt.checkpoint.formats.megatron_model import STAND_INS, Facts, arguments_of, without_numbers
from trainrt.checkpoint.formats.megatron_optimizer import Buffers, Groups, Unclear, groups_of, numbered, optimizers_of
from trainrt.checkpoint.formats.opened import Opened
from trainrt.checkpoint.mapping.rules import Rule, StoredArray, compile_reading
from trainrt.errors import CheckpointError

NAME = "megatron"
LATEST = "latest_checkpointed_iteration.txt"
FILE = "model_optim_rng.pt"
BUFFERS = "distrib_optim.pt"
HOME = re.compile(r"mp_rank_(\d\d+)(?:_(\d\d\d))?(?:_(\d\d\d))?")
EXPERT = re.compile(r"\.experts\.(?:local_experts\.(\d+)\.|linear_fc1\.weight(\d+)$)")
LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


def iteration_of(path: Path) -> Path:
    """The directory of one iteration: a root leads to its latest."""
    latest = path / LATEST
    if not latest.is_file():
        return path
    said = latest.read_text().strip()
    return path / (f"iter_{int(said):07d}" if said.isdecimal() else said)


def recognise(path: Path) -> tuple[Path, str] | None:
    """The iteration's directory, and why it is one; None for anything else."""
    folder = iteration_of(path)
    found = sorted(folder.glob(f"mp_rank_*/{FILE}"))
    return (folder, str(found[0].relative_to(folder.parent))) if found else None


def open_checkpoint(path: Path, *, model_config: Mapping[str, Any] | None = None) -> Opened:
    """Raises CheckpointError for what is missing, refused or contradicts itself, ConfigError where only a config can say it."""
    found = recognise(path)
    if found is None:
        raise CheckpointError(f"{path}: no mp_rank_*/{FILE} is here")
    folder, why = found
    ranks = _read(folder)
    parameters = [parameter for rank in ranks for parameter in rank.parameters]
    facts = Facts(
        folder, ranks[0].arguments, model_config or {}, {without_numbers(p.name): p.shape for p in parameters}
    )
    groups = Groups(facts.arguments)
    try:
        state, unclear = list(_state(ranks, facts, groups)), []
    except Unclear as error:
        state, unclear = [], [f"optimizer ({error})"]
    first, experts = _layers_before(parameters), _experts_on_a_rank(parameters)
    layout, strange, coordinates = compile_reading(
        _rules(facts), [*parameters, *state], variables=facts.variables,
        local=lambda at: {"first": first[at["vp"], at["pp"]], "before": at.get("ep", 0) * experts},
    )  # fmt: skip
    metadata, against = metadata_of(facts, ranks[0].state, layout, groups, ranks[0].file)
    unknown = [*sorted({array.name for array in strange if array.role in ("parameter", "buffer")}), *unclear, *against]
    return Opened(NAME, why, path, FileSource(layout), metadata, unknown, coordinates)


@dataclass(frozen=True, slots=True)
class _Rank:
    """One file, and what it holds; `parameters` in their order in the model."""

    file: Path
    at: Mapping[str, int]
    state: Mapping[str, Any]
    parameters: list[StoredArray]

    @property
    def arguments(self) -> dict[str, Any]:
        return arguments_of(self.state)


def _read(folder: Path) -> list[_Rank]:
    """All files of an iteration, by rank."""
    ranks = []
    for file in sorted(folder.glob(f"mp_rank_*/{FILE}")):
        home = HOME.fullmatch(file.parent.name)
        if home is None:
            raise CheckpointError(
                f"{file.parent}: no name of a rank; allowed: mp_rank_TT, mp_rank_TT_PPP, mp_rank_TT_PPP_EEE"
            )
        state = torch_file.load(file, stand_ins=STAND_INS)
        if not isinstance(state, dict) or not ({"model", "model0"} & set(state)):
            raise CheckpointError(f"{file}: no model is in it")
        tp, second, third = (int(number or 0) for number in home.groups())
        alone = arguments_of(state).get("pipeline_model_parallel_size", 2) == 1
        at = {"tp": tp, "pp": 0, "ep": second} if alone else {"tp": tp, "pp": second, "ep": third}
        ranks.append(_Rank(file, at, state, list(_parameters(state, file, at))))
    ranks.sort(key=lambda rank: (rank.at["pp"], rank.at["ep"], rank.at["tp"]))
    _check_complete(folder, ranks)
    return ranks


def _parameters(state: Mapping[str, Any], file: Path, at: Mapping[str, int]) -> Iterator[StoredArray]:
    arguments = arguments_of(state)
    chunks = ["model"] if "model" in state else [key for key in state if re.fullmatch(r"model\d+", key)]
    for stage, key in enumerate(chunks):
        for name, value in state[key].items():
            if isinstance(value, dict):
                raise CheckpointError(f"{file}: a model from before megatron-core ({key}.{name}), which is not read")
            # What Transformer Engine keeps besides is for 8-bit formats.
            if isinstance(value, Tensor) and not name.endswith("._extra_state"):
                role = "buffer" if name.endswith(".expert_bias") else "parameter"
                along = {axis: index for axis, index in at.items() if axis != _other_axis(arguments, name)}
                yield torch_file.array_of(value, file, name, role, **along, vp=stage)


def _expert_ranks(arguments: Mapping[str, Any]) -> int | None:
    """Over how many ranks each expert is cut; None where it is as many as the rest."""
    cut, tp = arguments.get("expert_tensor_parallel_size"), arguments.get("tensor_model_parallel_size")
    return cut if cut != tp else None


def _other_axis(arguments: Mapping[str, Any], name: str) -> str | None:
    """The axis that says nothing of a parameter: where experts are cut by themselves, ranks of tp and ep do not make a grid."""
    if _expert_ranks(arguments) is None:
        return None
    return "tp" if ".experts." in name else "ep"


def _check_complete(folder: Path, ranks: list[_Rank]) -> None:
    """Every rank of tp and of ep must be there, for every stage; not every pair of them (experts may be cut otherwise)."""
    arguments = ranks[0].arguments
    sizes = {
        axis: arguments.get(f"{name}_model_parallel_size") or 1 + max(rank.at[axis] for rank in ranks)
        for axis, name in (("tp", "tensor"), ("pp", "pipeline"), ("ep", "expert"))
    }
    for axis in ("tp", "ep"):
        there = {(rank.at["pp"], rank.at[axis]) for rank in ranks}
        for stage in range(sizes["pp"]):
            for index in range(sizes[axis]):
                if (stage, index) not in there:
                    raise CheckpointError(
                        f"{folder}: the file of {axis} {index}, pp {stage} is missing ({sizes} were written)"
                    )


def _layers_before(parameters: list[StoredArray]) -> dict[tuple[int, int], int]:
    """How many layers come before those of a (virtual stage, stage): layers go round the stages."""
    counts: dict[tuple[int, int], int] = {}
    for parameter in parameters:
        layer = LAYER.match(parameter.name)
        here = (parameter.at["vp"], parameter.at["pp"])
        counts[here] = max(counts.get(here, 0), int(layer[1]) + 1 if layer is not None else 0)
    return {here: sum(count for other, count in counts.items() if other < here) for here in counts}


def _experts_on_a_rank(parameters: list[StoredArray]) -> int:
    found = (EXPERT.search(parameter.name) for parameter in parameters)
    return max((int(match[1] or match[2]) + 1 for match in found if match is not None), default=0)


def _rules(facts: Facts) -> list[Rule]:
    cut = _expert_ranks(facts.arguments)
    if cut not in (None, 1):
        raise CheckpointError(f"{facts.path}: experts cut over {cut} ranks, the model over others, are not read")
    experts = facts.experts("mlp.experts.local_experts.{e}.") | facts.experts("mlp.experts.", "{e}")
    if cut is not None:
        experts = {name: replace(parameter, dim=None) for name, parameter in experts.items()}
    rules = [Rule(name, parameter.on_a_rank()) for name, parameter in facts.outside().items()]
    inside = facts.inside() | experts
    return rules + [Rule(f"decoder.layers.{{l}}.{name}", parameter.on_a_rank()) for name, parameter in inside.items()]


def _state(ranks: list[_Rank], facts: Facts, groups: Groups) -> Iterator[StoredArray]:
    """Masters and moments. Raises Unclear."""
    several = max(rank.at["pp"] for rank in ranks) > 0
    buffers = Buffers(facts.arguments, groups, apart=facts.tied and several)
    for rank in ranks:
        optimizers = optimizers_of(rank.state)
        trained = [parameter for parameter in rank.parameters if parameter.role == "parameter"]
        spread = rank.file.parent / BUFFERS
        if spread.is_file():
            yield from buffers.arrays(torch_file.load(spread, stand_ins=STAND_INS), trained, spread)
        elif all("params" in group for group in groups_of(optimizers)):
            yield from numbered(optimizers, trained, rank.file, groups) if optimizers else ()
        else:
            raise Unclear(f"{spread.parent.name}/{BUFFERS} is missing")
