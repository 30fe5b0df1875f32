"""Expert feed-forward networks: stacked SwiGLU weights, applied to rows sorted by expert.

Under expert parallelism each rank holds some experts, or a slice of one, and rows travel to them and back, or the weights to
the rows, inside `forward`: FSDP gathers these weights around the whole exchange.

Legend: N rows, D width, F inner width, E experts of the layer, L experts here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainrt.errors import PlanError
from trainrt.parallel.moe.feed_forward import gated, projected
from trainrt.parallel.moe.flex import Beside, Piece
from trainrt.parallel.moe.form import ExpertsForm, Form
from trainrt.parallel.moe.layout import WHOLE, ExpertLayout, Sliced, Slices
from trainrt.parallel.moe.spread import Held, Spread, through


class Experts(nn.Module):
    """E SwiGLU networks. `forward(rows, counts)` takes rows sorted by expert, counts of length E."""

    INNER = {"gate_proj": 1, "up_proj": 1, "down_proj": 2}  # noqa: RUF012
    """The dimension of each weight along which an expert is cut into slices."""

    def __init__(self, *, experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Parameter(torch.empty(experts, intermediate_size, hidden_size))
        self.up_proj = nn.Parameter(torch.empty(experts, intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden_size, intermediate_size))
        self.number = experts
        self.spread: Spread | None = None

    @property
    def fills_gaps(self) -> bool:
        """Whether something may be computed beside. With tensor parallelism the model's own code does that."""
        return self.spread is not None and self.spread.tp is None

    def forward(self, x_ND: Tensor, count_E: Tensor, *besides: Beside) -> Tensor:
        """`besides` is computed while rows travel, where `fills_gaps`."""
        weights = [local(getattr(self, name)) for name in self.INNER]
        if self.spread is None:
            return through(SWIGLU, x_ND, count_E.tolist(), weights)
        return self.spread.mix(x_ND, count_E, Held(SWIGLU, weights, tuple(self.INNER), besides))


SWIGLU = (Piece(gated, (0, 1)), Piece(projected, (2,)))
"""SwiGLU of rows sorted by expert, with stacked weights (gate, up, down) of as many experts."""


def layout_of(
    module: nn.Module, form: Form | None, ranks: int, order: tuple[int, ...] | None = None
) -> ExpertLayout:  # fmt: skip
    """How a module of experts lies over ranks; without a form it is one of ours. Raises PlanError."""
    if form is not None:
        if order is not None:
            raise PlanError("experts of a model that is not moe_lm have no other order than their own")
        return ExpertLayout(form.experts, ranks)
    assert isinstance(module, Experts)
    return ExpertLayout(module.number, ranks, order)


def slices_of(module: nn.Module, form: Form | None, layout: ExpertLayout) -> Slices:
    """How the whole weights of a module of experts are cut. Raises PlanError where that is not possible."""
    if layout.slices == 1:
        return WHOLE
    if isinstance(form, ExpertsForm):
        return form.slices
    assert isinstance(module, Experts)
    width = module.gate_proj.shape[1]
    if width % layout.slices:
        raise PlanError(
            f"parallel.ep = {layout.ranks} cuts each of {layout.experts} experts into {layout.slices} slices, which do not "
            f"divide its inner width {width}"
        )
    runs = tuple((layout.inner_run(rank, width),) for rank in range(layout.slices))
    return {leaf: Sliced(dim, runs) for leaf, dim in Experts.INNER.items()}


def local(parameter: Tensor) -> Tensor:
    """The part of a parameter that this rank computes with."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
