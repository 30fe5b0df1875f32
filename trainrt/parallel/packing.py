"""How a live Hugging Face model packs the tensors of its file format, as parts of a plan.

transformers merges, for example, the experts of a file into one stacked parameter. Its own reverse
conversion is run on coordinates instead of weights: for each live dimension a tensor that says
where along it an element lies. What comes out says, for each file tensor, which live box it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainrt.errors import ModelError
from trainrt.parallel.plan import Part


def packed_parts(model: Any) -> dict[str, tuple[Part, ...]]:
    """Live tensor name to the file tensors inside it; empty where the live model is its file format.

    Raises ModelError where a file tensor is not a plain box of a live one.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import revert_weight_conversion

    if not get_model_conversion_mapping(model, add_legacy=False):
        return {}
    live = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    names = list(live)
    marks = {name: torch.tensor(index).expand(live[name]) for index, name in enumerate(names)}
    owner = revert_weight_conversion(model, marks)
    depth = max(len(shape) for shape in live.values())
    along = [revert_weight_conversion(model, _coordinates(live, d)) for d in range(depth)]
    parts: dict[str, list[Part]] = {}
    for name, mark in owner.items():
        source = names[int(mark.flatten()[0])]
        where = [along[d][name] for d in range(len(live[source]))]
        if not bool((mark == mark.flatten()[0]).all()):
            raise ModelError(f"{name} is made of several live tensors; such a model cannot be checkpointed yet")
        parts.setdefault(source, []).append(_part(name, tuple(mark.shape), where))
    return {name: tuple(found) for name, found in parts.items()}


def _coordinates(live: dict[str, tuple[int, ...]], dim: int) -> dict[str, Any]:
    """For each live tensor the index along `dim` of each element; 0 where it has no such dimension."""
    made = {}
    for name, shape in live.items():
        if dim < len(shape):
            column = [1] * len(shape)
            column[dim] = shape[dim]
            made[name] = torch.arange(shape[dim]).view(column).expand(shape)
        else:
            made[name] = torch.zeros((), dtype=torch.long).expand(shape)
    return made


def _part(name: str, shape: tuple[int, ...], where: list[Tensor]) -> Part:
    """Read off which live dimension each file dimension runs along. `where[d]` has the file's shape."""
    offset = [int(index.flatten()[0]) for index in where]
    dims: list[int] = [-1] * len(shape)
    for live_dim, index in enumerate(where):
        moving = [
            d for d in range(len(shape)) if shape[d] > 1 and int(index.select(d, 1).flatten()[0]) != offset[live_dim]
        ]
        if len(moving) > 1:
            raise ModelError(f"{name} is no box of its live tensor; such a model cannot be checkpointed yet")
        expected = torch.tensor(offset[live_dim]).expand(shape)
        if moving:
            column = [1] * len(shape)
            column[moving[0]] = shape[moving[0]]
            expected = (offset[live_dim] + torch.arange(shape[moving[0]])).view(column).expand(shape)
            dims[moving[0]] = live_dim
        if not bool((index == expected).all()):
            raise ModelError(f"{name} is interleaved in its live tensor; such a model cannot be checkpointed yet")
    free = [d for d in range(len(where)) if d not in dims]
    dims = [d if d >= 0 else free.pop(0) for d in dims]
    return Part(name, shape, tuple(dims), tuple(offset))
