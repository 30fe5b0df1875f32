"""How a module of experts that is not ours is called."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ExpertsForm:
    """How a module of experts is called: their number, and the names of its three arguments."""

    experts: int
    rows: str
    index: str
    weight: str
