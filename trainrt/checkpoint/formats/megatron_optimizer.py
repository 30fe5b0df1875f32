"""The optimizer's state in Megatron's classic files, which know parameters by number, or by a place in a buffer.

Numbers follow the order of the parameters in the model, group by group: parameters without weight decay (of one dimension, and
biases), spread experts, and, with `decoupled_lr`, embedding and output layer have groups of their own. The distributed optimizer
joins what its ranks hold in one buffer for each dtype of a model's chunk: parameters in reverse order, each begun at a multiple
of 64 elements. Where numbers or lengths do not come out, nothing of it is taken.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from trainrt.checkpoint.formats import torch_file
from trainrt.checkpoint.formats.deepspeed import read_step
from trainrt.checkpoint.formats.megatron_model import EMBEDDING, OUTPUT
from trainrt.checkpoint.formats.opened import by_settings, plain
from trainrt.checkpoint.mapping.rules import StoredArray
from trainrt.errors import CheckpointError
from trainrt.parallel.layout import LogicalTensor

LOW = ("bfloat16", "float16")
ROLES = {"param": "master", "fp32_param": "master", "master_param": "master"}
WORDS = (EMBEDDING, OUTPUT, "model.embed_tokens.weight", "lm_head.weight")
ALIGNMENT = 64
BUCKET = 40_000_000
"""Elements of a bucket, at least, where gradients are reduced while others are computed (Megatron's default)."""


class Unclear(CheckpointError):
    """What is there is not what is known of such files."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What decides the group of a parameter."""

    decays: bool
    spread: bool
    apart: bool


class Groups:
    """Groups of parameters, as these arguments make them."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self._spread = (arguments.get("expert_model_parallel_size") or 1) > 1
        self._rate = arguments.get("decoupled_lr")
        self._decay_norms = bool(arguments.get("apply_wd_to_qk_layernorm"))

    def of_group(self, group: Mapping[str, Any]) -> Kind:
        decays = group.get("wd_mult", group.get("pre_wd_mult", 1.0)) != 0
        apart = bool(group.get("is_decoupled_lr")) or (self._rate is not None and group.get("max_lr") == self._rate)
        return Kind(decays, bool(group.get("is_expert_parallel")), apart)

    def of_parameter(self, name: str, dims: int) -> Kind:
        """By the name that Megatron has for it, or by one of the tensors in it."""
        norm = any(part in name for part in ("q_layernorm.", "k_layernorm.", "q_norm.", "k_norm."))
        short = (dims == 1 or name.endswith(".bias")) and not (norm and self._decay_norms)
        return Kind(not short, self._spread and ".experts." in name, self._rate is not None and name in WORDS)

    def document(self, tensors: Iterable[LogicalTensor], groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Of a manifest: the tensors of each group, with its hyperparameters."""
        settings = {
            self.of_group(group): {
                key: value for key, value in group.items() if key not in ("params", "step") and plain(value)
            }
            for group in groups
        }
        kinds = {tensor.name: self.of_parameter(tensor.name, len(tensor.shape)) for tensor in tensors}
        return by_settings({name: settings[kind] for name, kind in kinds.items() if kind in settings})


def optimizers_of(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One, or one for experts besides."""
    held = state.get("optimizer") or []
    if isinstance(held, dict) and all(isinstance(key, int) for key in held):
        return list(held.values())
    return held if isinstance(held, list) else [held]


def groups_of(optimizers: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [group for one in optimizers for group in one.get("optimizer", one).get("param_groups", [])]


def step_of(optimizers: Iterable[Mapping[str, Any]], file: Path) -> int | None:
    """Updates so far: Megatron's optimizers keep one number for all parameters."""
    for one in optimizers:
        inner = one.get("optimizer", one)
        states = inner.get("state") or {}
        found = [states["common_step"]] if "common_step" in states else []
        found += [state["step"] for state in states.values() if isinstance(state, dict) and "step" in state]
        found += [group["step"] for group in inner.get("param_groups", []) if group.get("step") is not None]
        if found:
            return read_step(found[0], file)
    return None


def numbered(
    optimizers: Sequence[Mapping[str, Any]], parameters: Sequence[StoredArray], file: Path, groups: Groups
) -> Iterator[StoredArray]:
    """The state that is kept by the number of a parameter. `parameters`: of this file, in their order. Raises Unclear."""
    waiting = defaultdict(list)
    for parameter in parameters:
        waiting[groups.of_parameter(parameter.name, len(parameter.shape))].append(parameter)
    for one in optimizers:
        inner = one.get("optimizer", one)
        masters = one.get("fp32_from_fp16_params") or one.get("fp32_from_fp16")
        for place, group in enumerate(inner["param_groups"]):
            members = waiting.pop(groups.of_group(group), [])
            if len(members) != len(group["params"]):
                raise Unclear(
                    f"a group has {len(group['params'])} parameters, {len(members)} in the model belong to it"
                )
            for number, parameter in zip(group["params"], members, strict=True):
                for role, value in inner["state"].get(number, {}).items():
                    if isinstance(value, Tensor) and value.dim():
                        yield _state(value, parameter, file, role)
            low = [parameter for parameter in members if parameter.dtype in LOW]
            if masters is not None and len(masters[place]) != len(low):
                raise Unclear(f"a group has {len(masters[place])} masters for {len(low)} parameters")
            for value, parameter in zip(masters[place] if masters is not None else [], low, strict=False):
                yield _state(value, parameter, file, "master")
    if waiting:
        raise Unclear(f"{next(iter(waiting.values()))[0].name} belongs to no group")


def _state(value: Tensor, parameter: StoredArray, file: Path, role: str) -> StoredArray:
    if tuple(value.shape) != parameter.shape:
        raise Unclear(f"what would be {role} of {parameter.name} has the shape {tuple(value.shape)}")
    return torch_file.array_of(value, file, parameter.name, ROLES.get(role, role), **parameter.at)


class Buffers:
    """Where the distributed optimizer keeps what belongs to the parameters of one file (`distrib_optim.pt`)."""

    def __init__(self, arguments: Mapping[str, Any], groups: Groups, *, apart: bool) -> None:
        """`apart`: embedding and output layer are copies of each other on two stages, and have buckets of their own."""
        self._groups, self._apart = groups, apart
        ranks = arguments.get("data_parallel_size") or 1
        bucket = arguments.get("ddp_bucket_size") or max(BUCKET, 1_000_000 * ranks)
        self._bucket = bucket if arguments.get("overlap_grad_reduce") else None

    def arrays(self, saved: Any, parameters: Sequence[StoredArray], file: Path) -> Iterator[StoredArray]:
        """Raises Unclear."""
        optimizers = saved if isinstance(saved, list) else [saved]
        spread = [self._groups.of_parameter(p.name, len(p.shape)).spread for p in parameters]
        for number, held in enumerate(optimizers):
            if held is None:
                # Another rank, which holds the same, has written it.
                continue
            mine = [p for p, away in zip(parameters, spread, strict=True) if away == bool(number)]
            members = list(_by_chunk_and_dtype(mine))
            buffers = [held[key] for key in sorted(key for key in held if isinstance(key, int))]
            if not held.get("buckets_coalesced") or len(buffers) != len(members):
                raise Unclear("its buffers are not those of the model")
            for buffer, inside in zip(buffers, members, strict=True):
                (flat,) = buffer.values()
                yield from self._buffer(flat, inside, file)

    def _buffer(self, flat: Mapping[str, Any], members: Sequence[StoredArray], file: Path) -> Iterator[StoredArray]:
        placed, total = self._placed(members)
        for key, value in flat.items():
            if not isinstance(value, Tensor):
                continue
            if value.numel() != total:
                raise Unclear(f"a buffer has {value.numel()} elements, {total} were expected")
            for parameter, offset in placed:
                # Full precision needs no master: it is the parameter once more.
                role = "parameter" if key == "param" and parameter.dtype not in LOW else ROLES.get(key, key)
                array = torch_file.array_of(value, file, parameter.name, role, **parameter.at)
                yield replace(array, shape=parameter.shape, strides=None, start=array.start + offset)

    def _placed(self, members: Sequence[StoredArray]) -> tuple[list[tuple[StoredArray, int]], int]:
        """Where each parameter begins, and where all end. Buckets are filled up in memory, and not in the file."""
        bucket = self._bucket if members[0].at["pp"] == members[0].at["vp"] == 0 else None
        found, base, end = [], 0, 0
        for parameter in reversed(members):
            alone = self._apart and parameter.name in WORDS
            start = -(-end // ALIGNMENT) * ALIGNMENT
            if alone:
                base, start = base + start, 0
            found.append((parameter, base + start))
            end = start + math.prod(parameter.shape)
            if alone or (bucket is not None and end >= bucket):
                base, end = base + end, 0
        return found, base + end


def _by_chunk_and_dtype(parameters: Collection[StoredArray]) -> Iterator[list[StoredArray]]:
    """Each chunk's parameters of one dtype, in the order in which the chunk has them."""
    found: dict[tuple[int, str], list[StoredArray]] = {}
    for parameter in parameters:
        found.setdefault((parameter.at["vp"], parameter.dtype), []).append(parameter)
    for chunk in sorted({chunk for chunk, _ in found}):
        yield from (members for (home, _), members in found.items() if home == chunk)
