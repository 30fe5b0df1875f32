"""What a detector found, before it is weighed against the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainrt.diagnostics.table import Indices, Numbers


@dataclass(frozen=True, slots=True)
class Finding:
    """ranks: culprits; hosts: theirs, or the ends of a link. effect: how much slower, as a share of the usual.

    sure: how far beyond its threshold the evidence is, from 1 on. removed: seconds that these ranks would take less in each step
    if they were ideal, (S, len(ranks)). saved: seconds that each step would be shorter, where that is not a matter of the slowest
    rank, (S,). since: index of the step where it began. action: where the cause alone does not say.
    """

    cause: str
    kind: str
    ranks: Sequence[int]
    hosts: Sequence[str]
    effect: float
    sure: float
    evidence: Sequence[str]
    removed: Numbers | None = None
    saved: Numbers | None = None
    since: int | None = None
    stage: int | None = None
    action: str | None = None

    @property
    def where(self) -> Indices:
        return np.asarray(self.ranks, dtype=np.int64)
