"""Sharded data parallelism: FSDP2 around each block, with sums instead of means and every wait recorded.

Losses are sums over tokens and are divided by the global token count once, after the reduction; so
gradients are summed everywhere, which is right for any mix of dp, fsdp and ep without a factor.
Replicas (dp) are reduced after the scatter, on the shard. With a `Turn` the sums have one order on
every mesh (tree.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter
from torch.distributed.tensor import Shard

from trainrt.events import ring
from trainrt.parallel.collectives import all_gather, all_reduce
from trainrt.parallel.mesh import Groups
from trainrt.parallel.moe.listed import GatheredList
from trainrt.parallel.sharded.model import locals_shown
from trainrt.parallel.tree import TreeSum, Turn


class _Allocate:
    """A temporary buffer per call, as FSDP2's own communication does."""

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class RecordedAllGather(_Allocate, AllGather):
    """FSDP2's all-gather of a module's parameters over `axis`, as an event."""

    def __init__(self, axis: str) -> None:
        self._axis = axis

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        size = output_tensor.nbytes
        with ring.collective("fsdp_all_gather", group=self._axis, bytes=size):
            return dist.all_gather_single(output_tensor, input_tensor, group=group, async_op=async_op)


class RecordedReduceScatter(_Allocate, ReduceScatter):
    """FSDP2's reduce-scatter of a module's gradients over `axis`, as an event."""

    def __init__(self, axis: str) -> None:
        self._axis = axis

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> dist.Work | None:
        size = input_tensor.nbytes
        with ring.collective("fsdp_reduce_scatter", group=self._axis, bytes=size):
            return dist.reduce_scatter_single(output_tensor, input_tensor, op=op, group=group, async_op=async_op)


class TreeReduction(_Allocate, ReduceScatter):
    """FSDP2's reduction of one module's gradients, in tree order: every round sends, the last one writes the sum.

    A rank of `axis` (and of `replicas`) brings the sum of `span` leaves: one, or those of an ep group, whose rows meet
    at its experts: always the same neighbouring leaves, whatever the number of data ranks. Before the last round the
    gradients are zero, and FSDP adds what comes later to them.
    """

    def __init__(self, axis: str, turn: Turn, *, replicas: dist.ProcessGroup | None, span: int) -> None:
        self._axis, self._turn, self._replicas, self._span = axis, turn, replicas, span
        self._arrived: Tensor | None = None
        self._sum = TreeSum()

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        """Exchange the shards instead of adding them. FSDP calls it where the axis has more than one rank."""
        arrived = torch.empty_like(input_tensor)
        size = input_tensor.nbytes
        with ring.collective("fsdp_exchange_gradients", group=self._axis, bytes=size):
            dist.all_to_all_single(arrived, input_tensor, group=group)
        self._arrived = arrived.view(group.size(), -1)

    def reduce(self, output: Tensor) -> None:
        """FSDP's all-reduce hook, called in every round: take what arrived, and write the sum in the last."""
        shards = output.clone().unsqueeze(0) if self._arrived is None else self._arrived
        self._arrived = None
        if self._replicas is not None:
            shards = all_gather(shards, self._replicas, axis="dp").flatten(0, 1)
        first = self._turn.index * len(shards)
        for position, shard in enumerate(shards):
            if (first + position) * self._span < self._turn.leaves:
                self._sum.add(shard)
        if self._turn.index == self._turn.rounds - 1:
            output.copy_(self._sum.total())
        else:
            output.zero_()


def apply_fsdp(
    model: nn.Module, blocks: nn.ModuleList | None, groups: Groups, *, experts: Sequence[nn.Module],
    compute: torch.dtype, turn: Turn | None,
) -> None:  # fmt: skip
    """Shard the modules of experts that are spread over ep over efsdp, then each block and the rest over fsdp.

    Parameters stay in their dtype (the masters, where `compute` is lower); gradients are reduced in it, in the
    order of the leaves where a `turn` says which of them runs.
    """
    stored = next(model.parameters()).dtype
    policy = MixedPrecisionPolicy(param_dtype=compute if compute != stored else None, reduce_dtype=stored)
    if groups.experts is not None:
        for module in experts:
            # An expert of a list may have vectors; stacked ones are cut over ep along the first dimension already.
            placement = Shard(0 if isinstance(module, GatheredList) else 1)
            fully_shard(
                module, mesh=groups.experts["efsdp"], mp_policy=policy, shard_placement_fn=partial(_always, placement)
            )
            # Every rank of efsdp * ep took part in the exchange: no replicas are left to reduce over.
            _configure(module, axis="efsdp", replicas=None, turn=turn, span=groups.size.ep)
    for module in (*(blocks or ()), model):
        with locals_shown(module) if groups.tp is not None else nullcontext():
            fully_shard(module, mesh=groups.fsdp, mp_policy=policy)
        _configure(module, axis="fsdp", replicas=groups.dp, turn=turn)


def _always(placement: Shard, _: nn.Parameter) -> Shard:
    return placement


def _configure(
    module: nn.Module, *, axis: str, replicas: dist.ProcessGroup | None, turn: Turn | None, span: int = 1
) -> None:
    assert isinstance(module, FSDPModule)
    module.set_custom_all_gather(RecordedAllGather(axis))
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)
    if turn is not None:
        reduction = TreeReduction(axis, turn, replicas=replicas, span=span)
        module.set_custom_reduce_scatter(reduction)
        module.set_all_reduce_hook(reduction.reduce)
        # A parameter that one leaf does not use must not change what the others' buffers hold where.
        module.set_reduce_scatter_unused_params(True, recurse=False)
        return
    module.set_custom_reduce_scatter(RecordedReduceScatter(axis))
    if replicas is not None:
        module.set_all_reduce_hook(lambda gradient: _sum_over(gradient, replicas))


def _sum_over(gradient: Tensor, replicas: dist.ProcessGroup) -> None:
    all_reduce(gradient, replicas, axis="dp")
