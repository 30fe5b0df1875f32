"""How a mixture is computed: which way rows or experts travel, and in how many chunks."""

from __future__ import annotations

from dataclasses import dataclass

from trainrt.config import MoeConfig
from trainrt.errors import PlanError
from trainrt.parallel.moe.layout import ExpertLayout


@dataclass(frozen=True, slots=True)
class Strategy:
    """r: 0 gathers experts, r >= 1 sends each row to r groups of ranks. degree, backward_degree: chunks on the way.

    recomputed: what experts compute is not kept for backward but computed again, as where layers are.
    """

    r: int = 1
    degree: int = 1
    backward_degree: int = 1
    recomputed: bool = False

    @property
    def keeps(self) -> bool:
        """Whether backward finds what forward computed, chunk by chunk."""
        return self.degree == self.backward_degree and not self.recomputed

    @classmethod
    def of(cls, config: MoeConfig, *, recomputed: bool = False) -> Strategy:
        """What the config fixes; "auto" is one exchange in one piece, until strategies are measured."""
        given = {key: getattr(config, key) for key in ("r", "degree", "backward_degree")}
        chosen = {key: value for key, value in given.items() if value != "auto"}
        return cls(**{"backward_degree": chosen.get("degree", 1), **chosen}, recomputed=recomputed)

    def check(self, layout: ExpertLayout | None) -> None:
        """Raises PlanError where experts so laid out cannot be computed so; None: they are not ours."""
        if layout is None:
            if self != PLAIN:
                raise PlanError(
                    f"moe.r = {self.r}, moe.degree = {self.degree}, moe.backward_degree = {self.backward_degree}: "
                    f'for experts of a model that is not moe_lm allowed are "auto" and 1'
                )
        elif self.r not in layout.choices:
            raise PlanError(
                f"moe.r = {self.r} with {layout.experts} experts over parallel.ep = {layout.ranks}; "
                f'allowed: "auto", {", ".join(map(str, layout.choices))}'
            )


PLAIN = Strategy()
"""One exchange in one piece."""
