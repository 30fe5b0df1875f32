"""Experts of a model that is not ours, called where they are: with rows of one choice each, and with the weights that are there.

Legend: N rows, D width, K choices a row, M = N * K, E experts.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trainrt.parallel.moe.flex import Piece
from trainrt.parallel.moe.form import ExpertsForm
from trainrt.parallel.moe.layout import ExpertLayout
from trainrt.parallel.moe.spread import Held
from trainrt.parallel.shown import local_part, show


class Mixes(Protocol):
    """Takes rows to their experts, which lie by a layout."""

    @property
    def layout(self) -> ExpertLayout: ...

    def mix(self, x_ND: Tensor, count_E: Tensor, held: Held) -> Tensor: ...


class ForeignExperts:
    """The module's function of the same arguments, computed by its own code wherever rows meet weights.

    While it computes, its parameters are those that it was given, and what it calls its number of experts, and their inner
    width, is theirs.
    """

    def __init__(self, module: nn.Module, form: ExpertsForm, spread: Mixes) -> None:
        self.form, self.spread = form, spread
        self.compute = module.forward
        self.signature = inspect.signature(module.forward)
        self.names = [name for name, _ in module.named_parameters()]
        self.leaves = [
            (module.get_submodule(inside), leaf) for inside, _, leaf in (n.rpartition(".") for n in self.names)
        ]
        self.numbers = _numbers(module, form.experts)
        self.widths = _widths(module, form)
        self.given: dict[int, Tensor] = {}
        self.weight_dtype = torch.float32
        for index, (owner, leaf) in enumerate(self.leaves):
            show(owner, leaf, partial(self._seen, index))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        form, given = self.form, self.signature.bind(*args, **kwargs).arguments
        x, index_NK, weight_NK = given[form.rows], given[form.index], given[form.weight]
        self.weight_dtype = weight_NK.dtype
        rows_ND = x.reshape(-1, x.shape[-1])
        expert_M, choice_M = index_NK.flatten().sort(stable=True)
        row_M = choice_M // index_NK.shape[1]
        count_E = torch.bincount(expert_M, minlength=form.experts)
        held = [getattr(owner, leaf) for owner, leaf in self.leaves]
        pieces = (Piece(self._computed, tuple(range(len(held)))),)
        y_MD = self.spread.mix(rows_ND[row_M], count_E, Held(pieces, held, self.names))
        y_MD = y_MD * weight_NK.reshape(-1)[choice_M].unsqueeze(1)
        y_ND = torch.zeros_like(rows_ND).index_add(0, row_M, y_MD.to(rows_ND.dtype))
        # FSDP2 takes no views out of a module that code around it may change in place.
        return y_ND if y_ND.shape == x.shape else y_ND.view(x.shape).clone()

    def _computed(self, rows_MD: Tensor, counts: list[int], weights: Sequence[Tensor]) -> Tensor:
        # Experts that nobody chose take part in backward like the others.
        nothing = 0.0 * (rows_MD + sum(weight.reshape(-1)[0] for weight in weights))
        # Not every model's code takes no rows at all.
        if not len(rows_MD):
            return nothing
        here = torch.tensor(counts, device=rows_MD.device)
        expert_M = torch.arange(len(counts), device=rows_MD.device).repeat_interleave(here)
        ones_M1 = torch.ones(len(rows_MD), 1, device=rows_MD.device, dtype=self.weight_dtype)
        self.given = dict(enumerate(weights))
        for owner, key in self.numbers:
            setattr(owner, key, len(counts))
        for owner, key, whole in self.widths:
            setattr(owner, key, whole * self._slices(weights, len(counts)) // self.spread.layout.slices)
        try:
            names = self.form.rows, self.form.index, self.form.weight
            found = self.compute(**dict(zip(names, (rows_MD, expert_M.unsqueeze(1), ones_M1), strict=True)))
        finally:
            self.given = {}
        return found.reshape(rows_MD.shape).to(rows_MD.dtype) + nothing

    def _slices(self, weights: Sequence[Tensor], experts: int) -> int:
        """How many slices of each expert weights are."""
        index, sliced = next((i, s) for i, name in enumerate(self.names) if (s := self.form.slices.get(name)))
        return weights[index].shape[sliced.dim] // (sliced.width * (1 if sliced.dim else experts))

    def _seen(self, index: int, stored: Tensor) -> Tensor:
        given = self.given.get(index)
        return local_part(stored) if given is None else given


def _numbers(module: nn.Module, experts: int) -> list[tuple[nn.Module, str]]:
    """Where a module keeps what it calls its number of experts."""
    return [
        (owner, key)
        for owner in module.modules()
        for key, value in vars(owner).items()
        if "expert" in key and isinstance(value, int) and not isinstance(value, bool) and value == experts
    ]


def _widths(module: nn.Module, form: ExpertsForm) -> list[tuple[nn.Module, str, int]]:
    """Where a module keeps what is an inner width of whole experts and no other length of their weights, and that width."""
    inner: set[int] = set()
    other: set[int] = set()
    for name, parameter in module.named_parameters():
        for dim, length in enumerate(parameter.shape):
            sliced = form.slices.get(name)
            cut = sliced is not None and dim == sliced.dim
            (inner if cut else other).add(length if dim else length // form.experts)
    return [
        (owner, key, value)
        for owner in module.modules()
        for key, value in vars(owner).items()
        if isinstance(value, int) and not isinstance(value, bool) and value in inner - other
    ]
