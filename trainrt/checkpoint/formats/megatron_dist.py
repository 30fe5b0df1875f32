"""Megatron-LM's distributed checkpoints (`torch_dist`): a directory of torch.distributed.checkpoint, and what goes with it.

    ROOT/latest_checkpointed_iteration.txt   a number, or "release"
    ROOT/iter_0000100/metadata.json          "sharded_backend": "torch_dist"
                     /common.pt              arguments, scheduler, settings of the optimizer
                     /.metadata, __R_N.distcp

Tensors are whole, and those of the layers stacked: `decoder.layers.mlp.linear_fc1.weight` has a dimension for layers, and with
experts one for those. Where layers differ (or with `singleton_local_shards`) each has a key of its own. The optimizer's state is
at `optimizer.state.{role}.{key}`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainrt.checkpoint.formats import torch_file
from trainrt.checkpoint.formats.dcp_items import METADATA, Items
from trainrt.checkpoint.formats.megatron import iteration_of
from trainrt.checkpoint.formats.megatron_config import metadata_of
from trainrt.checkpoint.formats.megatron_model import STAND_INS, Facts, Parameter, arguments_of, without_numbers
from trainrt.checkpoint.formats.megatron_optimizer import LOW, ROLES, Groups
from trainrt.checkpoint.formats.opened import Opened
from trainrt.checkpoint.manifest import strict_json
from trainrt.checkpoint.mapping.expression import Shape
from trainrt.checkpoint.mapping.rules import Rule, compile_reading
from trainrt.errors import CheckpointError

NAME = "megatron-dist"
COMMON = "common.pt"
BACKEND = "metadata.json"
STATE = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(?P<role>\w+)\.(?P<key>.+)")
BUFFERS = "optimizer.distributed."
"""Where the distributed optimizer's state is by rank, and not by parameter (`dp_reshardable`)."""
EXTRA = "._extra_state"
"""What Transformer Engine keeps besides, for 8-bit formats."""
LAYERS = "decoder.layers."


def recognise(path: Path) -> tuple[Path, str] | None:
    """The iteration's directory, and why it is one; None for anything else."""
    folder = iteration_of(path)
    here = (folder / METADATA).is_file() and (folder / COMMON).is_file() and (folder / BACKEND).is_file()
    return (folder, f"{METADATA}, {COMMON} and {BACKEND}") if here else None


def open_checkpoint(path: Path, *, model_config: Mapping[str, Any] | None = None) -> Opened:
    """Raises CheckpointError for what is missing, refused or contradicts itself, ConfigError where only a config can say it."""
    found = recognise(path)
    if found is None:
        raise CheckpointError(f"{path}: no {METADATA}, {COMMON} and {BACKEND} are here")
    folder, why = found
    backend = strict_json((folder / BACKEND).read_bytes(), str(folder / BACKEND)).get("sharded_backend")
    if backend != "torch_dist":
        raise CheckpointError(f"{folder / BACKEND}: sharded_backend = {backend!r}; allowed: 'torch_dist'")
    common = torch_file.load(folder / COMMON, stand_ins=STAND_INS)
    items = Items(folder)
    facts = Facts(folder, arguments_of(common), model_config or {}, dict(_shapes(items)))
    arrays = [items.array(key, *place) for key, place in _places(items).items()]
    layout, strange, _ = compile_reading(_rules(facts), arrays, variables=facts.variables)
    metadata, against = metadata_of(facts, common, layout, Groups(facts.arguments), folder / COMMON)
    keys = [*(array.name for array in strange), *items.objects]
    unknown = sorted({_short(key) for key in keys if EXTRA not in key})
    return Opened(NAME, why, path, items.source(layout), metadata, [*unknown, *against])


def _short(key: str) -> str:
    """What an entry is a part of."""
    return f"{BUFFERS}*" if BUFFERS in key else key.partition("/shard_")[0]


def _shapes(items: Items) -> Iterator[tuple[str, Shape]]:
    """Of the parameters; of what is kept in halves (`_w`, `_v`), of the whole."""
    for key in items.tensors:
        if STATE.fullmatch(key) is None:
            *rest, rows, columns = (1, *items.shape(key))
            half = key.endswith(("_w", "_v"))
            yield without_numbers(key[:-2] if half else key), (*rest, rows * 2 if half else rows, columns)


def _places(items: Items) -> dict[str, tuple[str, str]]:
    """Entry to (key of the parameter, role)."""
    found = {}
    for key in items.tensors:
        state = STATE.fullmatch(key)
        if state is None:
            found[key] = key, "parameter"
            continue
        parameter, role = state["key"], ROLES.get(state["role"], state["role"])
        if parameter in items.tensors:
            if items.shape(key) != items.shape(parameter):
                raise CheckpointError(
                    f"{key}: of shape {items.shape(key)}, its parameter of {items.shape(parameter)}: ranges of flat parameters, "
                    "as megatron-core before 0.14 wrote them, are not read"
                )
            # Full precision needs no master: it is the parameter once more.
            low = items.dtype(parameter) in LOW
            role = "parameter" if role == "master" and not low else role
        found[key] = parameter, role
    return found


def _rules(facts: Facts) -> list[Rule]:
    rules = [Rule(name, parameter.whole()) for name, parameter in facts.outside().items()]
    for name, parameter in _halved(facts.inside()).items():
        rules += [Rule(f"{LAYERS}{name}", parameter.whole("l")), Rule(f"{LAYERS}{{l}}.{name}", parameter.whole())]
    for name, parameter in _halved(facts.experts("mlp.experts.experts.")).items():
        rules += [
            Rule(f"{LAYERS}{name}", parameter.whole("e", "l")),
            Rule(f"{LAYERS}{{l}}.{name}", parameter.whole("e")),
        ]
    for name, parameter in _halved(facts.experts("mlp.experts.experts.{e}.")).items():
        rules.append(Rule(f"{LAYERS}{{l}}.{name}", parameter.whole()))
    return rules


def _halved(parameters: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """With the halves of those that have two parts, as parameters of their own."""
    found = dict(parameters)
    for name, parameter in parameters.items():
        if len(parameter.parts) == 2:
            for half, part in zip("wv", parameter.parts, strict=True):
                found[f"{name}_{half}"] = Parameter((part,), parameter.dim)
    return found
