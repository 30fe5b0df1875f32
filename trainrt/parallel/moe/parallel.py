"""Experts spread over ranks: each keeps its run of them, rows travel to the experts they chose and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from trainrt.parallel.mesh import ExpertGroups
from trainrt.parallel.moe.experts import Experts, layout_of, slices_of
from trainrt.parallel.moe.foreign import ForeignExperts
from trainrt.parallel.moe.form import Form, ListedExperts
from trainrt.parallel.moe.layout import NO_ORDERS, ExpertLayout, Orders, Sliced, Slices
from trainrt.parallel.moe.listed import gather_list
from trainrt.parallel.moe.spread import Held, Spread, through
from trainrt.parallel.moe.strategy import Chooser, Fixed


def always_plain(module: nn.Module, layout: ExpertLayout) -> Chooser:
    """One exchange in one piece."""
    return Fixed()


def spread_experts(
    model: nn.Module, modules: Mapping[str, Form | None], mesh: DeviceMesh, groups: ExpertGroups, *,
    tp: dist.ProcessGroup | None = None, chooser: Callable[[nn.Module, ExpertLayout], Chooser] = always_plain,
    recomputed: bool = False, orders: Orders = NO_ORDERS,
) -> list[nn.Module]:  # fmt: skip
    """Leave this rank its part of the experts of every module, as DTensors over `mesh` (ep). Returns the modules.

    chooser: who says how a module's rows travel. recomputed: layers are computed again for backward. orders: of modules
    whose experts are not held in their own order.
    """
    spread = []
    for name, form in modules.items():
        if isinstance(form, ListedExperts):
            spread.append(gather_list(model, name, mesh, tp))
            continue
        module = model.get_submodule(name)
        layout = layout_of(module, form, mesh.size(), orders.get(name))
        slices = slices_of(module, form, layout)
        how = Spread(layout, slices, groups, tp, chooser(module, layout), recomputed)
        for inside, owner in module.named_modules():
            for leaf, parameter in list(owner.named_parameters(recurse=False)):
                sliced = slices.get(f"{inside}.{leaf}" if inside else leaf)
                mine = share_of(parameter.detach(), layout, mesh.get_local_rank(), sliced).clone()
                first = len(parameter) if layout.slices == 1 else len(mine) * layout.ranks
                shape = torch.Size((first, *mine.shape[1:]))
                stride = torch.empty(shape, device="meta").stride()
                cut = DTensor.from_local(mine, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
                owner._parameters[leaf] = nn.Parameter(cut, requires_grad=parameter.requires_grad)
        if isinstance(module, Experts):
            module.spread = how
        elif form is not None:
            module.forward = ForeignExperts(module, form, how).forward  # type: ignore[method-assign]
        spread.append(module)
    return spread


def share_of(whole: Tensor, layout: ExpertLayout, rank: int, sliced: Sliced | None) -> Tensor:
    """What a rank holds of a weight of stacked or flattened experts (a view, where that is one run)."""
    share = _taken(whole, 0, layout.runs(rank, len(whole) // layout.experts))
    return share if sliced is None else _taken(share, sliced.dim, sliced.runs[rank % layout.slices])


def _taken(tensor: Tensor, dim: int, runs: Sequence[tuple[int, int]]) -> Tensor:
    parts = [tensor.narrow(dim, *run) for run in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


@dataclass(frozen=True, slots=True)
class SliceBySlice:
    """The slices of experts whose weights are all here, one after the other: what ranks compute, without what travels."""

    layout: ExpertLayout
    slices: Slices

    def mix(self, x_ND: Tensor, count_E: Tensor, held: Held) -> Tensor:
        """Rows sorted by expert through their experts."""
        counts = count_E.tolist()
        parts = [
            through(
                held.pieces,
                x_ND,
                counts,
                [self._slice(*part, number) for part in zip(held.names, held.weights, strict=True)],
            )
            for number in range(self.layout.slices)
        ]
        return torch.stack(parts).sum(0)

    def _slice(self, name: str, whole: Tensor, number: int) -> Tensor:
        sliced = self.slices.get(name)
        if sliced is None:
            return whole / self.layout.slices
        ranks = range(number, self.layout.ranks, self.layout.slices)
        return torch.cat([share_of(whole, self.layout, rank, sliced) for rank in ranks])
