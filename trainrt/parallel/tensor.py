"""Tensor parallelism: linear layers whose weight is cut over the tp axis.

Column-parallel (weight rows cut): replicated in, sharded out. Row-parallel (weight columns cut):
sharded in, replicated out. A pair of them costs one all-reduce forward and one backward
(Megatron-LM, arXiv 1909.08053, section 3). Stored weights are DTensors; the layers compute on the
local part, so that attention sees its own heads and no operator needs a sharding rule.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional as F

from trainrt.parallel.collectives import CopyToGroup, ReduceFromGroup
from trainrt.parallel.moe.experts import local
from trainrt.parallel.moe.layer import MoeLayer
from trainrt.parallel.planner.rules import Split


class ColumnParallelLinear(nn.Module):
    """`y = x W^T + b` with the rows of W (and b) of this rank: (..., D) -> (..., out / tp)."""

    def __init__(self, linear: nn.Linear, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else local(self.bias)
        return F.linear(CopyToGroup.apply(x, self.group), local(self.weight), bias)


class RowParallelLinear(nn.Module):
    """`y = x W^T + b` with the columns of W of this rank: (..., in / tp) -> (..., D); b is added once."""

    def __init__(self, linear: nn.Linear, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        y = ReduceFromGroup.apply(F.linear(x, local(self.weight)), self.group)
        return y if self.bias is None else y + local(self.bias)


def cut_parameter(module: nn.Module, leaf: str, mesh: DeviceMesh, dim: int) -> None:
    """Replace a whole parameter by the DTensor of this rank's even share along `dim`."""
    parameter = getattr(module, leaf)
    share = parameter.detach().chunk(mesh.size(), dim)[mesh.get_local_rank()].clone()
    cut = DTensor.from_local(share, mesh, [Shard(dim)], run_check=False)
    setattr(module, leaf, nn.Parameter(cut, requires_grad=parameter.requires_grad))


def apply_tensor_parallel(model: nn.Module, splits: dict[str, Split], mesh: DeviceMesh) -> None:
    """Cut the parameters that the plan splits over tp and put parallel layers around them."""
    group = mesh.get_group()
    owners: dict[str, None] = {}
    for name, split in splits.items():
        owner, _, leaf = name.rpartition(".")
        cut_parameter(model.get_submodule(owner), leaf, mesh, split.dim)
        owners[owner] = None
    for owner in owners:
        module = model.get_submodule(owner)
        if isinstance(module, nn.Linear):
            row = splits[f"{owner}.weight"].dim == 1
            parallel = RowParallelLinear(module, group) if row else ColumnParallelLinear(module, group)
            model.set_submodule(owner, parallel)
    for module in model.modules():
        if isinstance(module, MoeLayer):
            module.tp_group = group


def apply_expert_parallel(model: nn.Module, splits: dict[str, Split], mesh: DeviceMesh) -> None:
    """Leave each rank its run of experts and give the layers the group to exchange rows over."""
    for name, split in splits.items():
        owner, _, leaf = name.rpartition(".")
        experts = model.get_submodule(owner)
        cut_parameter(experts, leaf, mesh, split.dim)
        experts.ep_group = mesh.get_group()  # type: ignore[assignment]
