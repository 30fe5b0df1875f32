"""How a module of experts that is not ours is called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trainrt.parallel.moe.layout import Slices


@dataclass(frozen=True, slots=True)
class ExpertsForm:
    """One module with the weights of all experts: their number, and the names of its three arguments.

    slices: how they are cut where there are more ranks than experts (planner/slices.py).
    """

    experts: int
    rows: str
    index: str
    weight: str
    slices: Slices = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ListedExperts:
    """A list of modules, one for each expert, which the code around it calls as it likes."""

    experts: int


Form = ExpertsForm | ListedExperts


def form_from_json(document: Mapping[str, Any]) -> Form:
    """The form whose fields these are."""
    return ExpertsForm(**document) if "rows" in document else ListedExperts(**document)
