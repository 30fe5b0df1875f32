"""The model split as on the first of some ranks, without the others: what flows is no result, but has its size and its way.

What a plan costs is read off such a run: operators that gather, bytes that are kept for backward.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn

from trainrt.parallel.planner.probe import RANDOM_ELEMENTS, Blueprint, small_model
from trainrt.parallel.sharded.model import split_parameters
from trainrt.parallel.sharded.owners import Split
from trainrt.parallel.sharded.tensor import Axis


def imagined_group(ranks: int) -> dist.ProcessGroup:
    """A group whose first rank this is, and whose collectives move nothing. It needs no default group."""
    from torch._C._distributed_c10d import FakeProcessGroup

    kind = dist.ProcessGroup.BackendType.CUSTOM
    group = dist.ProcessGroup(0, ranks)  # type: ignore[call-arg, arg-type]
    group._register_backend(torch.device("cpu"), kind, FakeProcessGroup._create_internal(0, ranks))
    group._set_default_backend(kind)
    group._set_group_desc("imagined")
    return group


def split_as_first(model: nn.Module, splits: Mapping[str, Split], ranks: int, *, sequence: bool) -> Axis:
    """Leave a model what the first of `ranks` holds of it, and return its axis."""
    axis = Axis(imagined_group(ranks), sequence=sequence)
    split_parameters(model, splits, axis, lambda parameter, split: axis.take(parameter, split.dim, split.owners))
    return axis


def scatters(blueprint: Blueprint, splits: Mapping[str, Split], ranks: int) -> bool:
    """Whether activations can be scattered by positions between split regions, so that no operator has to gather."""
    model = small_model(blueprint, random_elements=RANDOM_ELEMENTS)
    axis = split_as_first(model, splits, ranks, sequence=True)
    try:
        blueprint.loss(model)
    except Exception:
        # Not every model's code takes numbers that are no results.
        return False
    return axis.scattered > 0 and not axis.gathered
