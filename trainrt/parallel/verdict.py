"""What the comparison of a divided model with one process found, and whether that is right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from trainrt.errors import PlanError

LOSS, GRADIENT = 1e-6, 5e-6
"""Relative errors that pass. Doubles are compared, but models round to floats here and there."""

NOTHING = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Gradients below this share of the whole gradient's norm count as zero (a key bias has none in exact arithmetic)."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a comparison found. worst: the parameter whose gradient differs most. held: the share of elements a rank holds.

    gathered: operators that had no rule for split tensors, with how often they ran: right, but slow.
    """

    ranks: int
    precision: str
    loss_error: float
    gradient_error: float
    worst: str
    held: float
    gathered: Mapping[str, int]

    @property
    def right(self) -> bool:
        # Comparisons with nan are false.
        return self.loss_error <= LOSS and self.gradient_error <= GRADIENT

    def require(self, what: str) -> None:
        """Raises PlanError where the plan is not right."""
        if self.right:
            return
        module = self.worst.rpartition(".")[0] or "the model"
        raise PlanError(
            f"{what}: the plan of {module} is not right: the gradient of {self.worst} differs by {self.gradient_error:.1e} "
            f"(relative), the loss by {self.loss_error:.1e}, from one process; allowed: 1"
        )
