"""How a module of experts that is not ours is called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ExpertsForm:
    """One module with the weights of all experts: their number, and the names of its three arguments."""

    experts: int
    rows: str
    index: str
    weight: str


@dataclass(frozen=True, slots=True)
class ListedExperts:
    """A list of modules, one for each expert, which the code around it calls as it likes."""

    experts: int


Form = ExpertsForm | ListedExperts


def form_from_json(document: Mapping[str, Any]) -> Form:
    """The form whose fields these are."""
    return ExpertsForm(**document) if "rows" in document else ListedExperts(**document)
