"""Experts spread over ranks: each keeps its run of them, rows travel to the experts they chose and back.

Where tensor-parallel ranks hold the same rows, each sends its share of them and the results are summed.

Legend: N rows, D width, K choices a row, E experts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from trainrt.parallel.collectives import CopyToGroup, ExchangeRows, ReduceFromGroup
from trainrt.parallel.moe.exchange import Exchange
from trainrt.parallel.moe.experts import Experts, Spread, layout_of
from trainrt.parallel.moe.form import ExpertsForm, Form, ListedExperts
from trainrt.parallel.moe.layout import ExpertLayout
from trainrt.parallel.moe.listed import gather_list
from trainrt.parallel.moe.strategy import PLAIN, Strategy
from trainrt.parallel.shown import local_part, show


def spread_experts(
    model: nn.Module, modules: Mapping[str, Form | None], mesh: DeviceMesh, tp: dist.ProcessGroup | None,
    strategy: Strategy = PLAIN, slices: dist.ProcessGroup | None = None,
) -> list[nn.Module]:  # fmt: skip
    """Leave this rank its part of the experts of every module, as DTensors over `mesh` (ep). Returns the modules.

    slices: the ranks that gather slices of an expert under `strategy`, where there are several.
    """
    spread = []
    for name, form in modules.items():
        if isinstance(form, ListedExperts):
            spread.append(gather_list(model, name, mesh, tp))
            continue
        module = model.get_submodule(name)
        layout = layout_of(module, form, mesh.size())
        for owner in module.modules():
            for leaf, parameter in list(owner.named_parameters(recurse=False)):
                mine = share_of(module, leaf, parameter.detach(), layout, mesh.get_local_rank()).clone()
                first = len(parameter) * layout.slices
                shape = torch.Size((first, *mine.shape[1:]))
                stride = torch.empty(shape, device="meta").stride()
                cut = DTensor.from_local(mine, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
                owner._parameters[leaf] = nn.Parameter(cut, requires_grad=parameter.requires_grad)
                if form is not None:
                    show(owner, leaf, local_part)
        if isinstance(module, Experts):
            width = layout.slices // strategy.r if strategy.r else 1
            if (slices.size() if slices is not None else 1) != width:
                raise ValueError(f"{layout.slices} slices, r = {strategy.r}: slices are gathered by {width} ranks")
            module.spread = Spread(layout, strategy, mesh.get_group(), slices, tp)
        elif form is not None:
            _tell_number(module, form.experts, form.experts // mesh.size())
            module.forward = _exchanged(module, form, layout, mesh.get_group(), tp)  # type: ignore[method-assign]
        spread.append(module)
    return spread


def share_of(module: nn.Module, leaf: str, whole: Tensor, layout: ExpertLayout, rank: int) -> Tensor:
    """What a rank holds of a weight of stacked or flattened experts (a view)."""
    share = whole.narrow(0, *layout.run(rank, len(whole) // layout.experts))
    if not isinstance(module, Experts):
        return share
    inner = module.INNER[leaf]
    return share.narrow(inner, *layout.inner_run(rank, whole.shape[inner]))


def _tell_number(module: nn.Module, experts: int, here: int) -> None:
    """What a module calls its number of experts is the number of those it has here."""
    for owner in module.modules():
        for key, value in list(vars(owner).items()):
            if "expert" in key and isinstance(value, int) and not isinstance(value, bool) and value == experts:
                setattr(owner, key, here)


def _exchanged(
    module: nn.Module, form: ExpertsForm, layout: ExpertLayout, ep: dist.ProcessGroup, tp: dist.ProcessGroup | None
) -> Callable[..., Tensor]:
    """The module's function of the same arguments, computed where the experts are, one choice of one row at a time."""
    compute = module.forward
    signature = inspect.signature(compute)

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        given = signature.bind(*args, **kwargs).arguments
        x, index_NK, weight_NK = given[form.rows], given[form.index], given[form.weight]
        rows_ND = x.reshape(-1, x.shape[-1])
        if tp is not None:
            rows_ND, weight_NK = CopyToGroup.apply(rows_ND, tp), CopyToGroup.apply(weight_NK, tp)
        choice_M, expert_M = _own_choices(index_NK, tp)
        count_E = torch.bincount(expert_M, minlength=form.experts)
        (there,) = Exchange.plan(count_E, layout, ep).chunks(1)
        sent_ND = rows_ND[choice_M // index_NK.shape[1]]
        arrived_MD = ExchangeRows.apply(sent_ND, there.send, there.receive, ep)[there.order]
        here = torch.tensor(there.counts, device=x.device)
        local_M = torch.arange(len(here), device=x.device).repeat_interleave(here)
        ones_M1 = weight_NK.new_ones(len(arrived_MD), 1)
        # Not every model's code takes no rows at all.
        results = arrived_MD
        if len(arrived_MD):
            results = compute(**{form.rows: arrived_MD, form.index: local_M.unsqueeze(1), form.weight: ones_M1})
        results = results.reshape(arrived_MD.shape) + _touched(module, arrived_MD)
        back_MD = ExchangeRows.apply(there.unsorted(results), there.receive, there.send, ep)
        y_MD = back_MD * weight_NK.reshape(-1)[choice_M].unsqueeze(1)
        y_ND = torch.zeros_like(rows_ND).index_add(0, choice_M // index_NK.shape[1], y_MD.to(rows_ND.dtype))
        return (y_ND if tp is None else ReduceFromGroup.apply(y_ND, tp)).view(x.shape)

    return forward


def _touched(module: nn.Module, arrived_MD: Tensor) -> Tensor:
    """Zeros that depend on the rows and the weights: experts that nobody chose take part in backward like the others."""
    weights = [getattr(owner, leaf) for owner in module.modules() for leaf, _ in owner.named_parameters(recurse=False)]
    return 0.0 * (arrived_MD + sum(weight.reshape(-1)[0] for weight in weights))


def _own_choices(index_NK: Tensor, tp: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Which of the N * K choices this rank sends, sorted by expert, and the expert of each."""
    expert, order = index_NK.flatten().sort(stable=True)
    if tp is None:
        return order, expert
    return order[tp.rank() :: tp.size()], expert[tp.rank() :: tp.size()]
