"""The repeated layers of a model."""

from __future__ import annotations

from torch import nn

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
"""Modules that are looked into and not called."""


def find_blocks(model: nn.Module) -> nn.ModuleList | None:
    """The module list that holds the most parameters, or None. Its modules must be called, not only looked into."""
    lists = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) and not any(isinstance(m, CONTAINERS) for m in module)
    ]
    return max(lists, key=lambda found: sum(p.numel() for p in found.parameters()), default=None)
