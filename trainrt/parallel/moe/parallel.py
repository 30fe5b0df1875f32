"""Experts spread over ranks: each keeps its run of them, rows travel to the experts they chose and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from trainrt.parallel.mesh import ExpertGroups
from trainrt.parallel.moe.experts import Experts, layout_of
from trainrt.parallel.moe.foreign import ForeignExperts
from trainrt.parallel.moe.form import Form, ListedExperts
from trainrt.parallel.moe.layout import NO_ORDERS, ExpertLayout, Orders
from trainrt.parallel.moe.listed import gather_list
from trainrt.parallel.moe.spread import Spread
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
        how = Spread(layout, groups, tp, chooser(module, layout), recomputed)
        for owner in module.modules():
            for leaf, parameter in list(owner.named_parameters(recurse=False)):
                mine = share_of(module, leaf, parameter.detach(), layout, mesh.get_local_rank()).clone()
                first = len(parameter) * layout.slices
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


def share_of(module: nn.Module, leaf: str, whole: Tensor, layout: ExpertLayout, rank: int) -> Tensor:
    """What a rank holds of a weight of stacked or flattened experts (a view, where that is one run)."""
    runs = [whole.narrow(0, *run) for run in layout.runs(rank, len(whole) // layout.experts)]
    share = runs[0] if len(runs) == 1 else torch.cat(runs)
    if not isinstance(module, Experts):
        return share
    inner = module.INNER[leaf]
    return share.narrow(inner, *layout.inner_run(rank, whole.shape[inner]))
