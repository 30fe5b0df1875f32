"""Experts spread over ranks: each keeps its run of them, and the layers get the group to exchange rows over."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from trainrt.parallel.moe.experts import Experts


def spread_experts(model: nn.Module, mesh: DeviceMesh) -> None:
    """Leave this rank its even run of the experts of every layer, as DTensors over `mesh` (ep)."""
    for module in model.modules():
        if isinstance(module, Experts):
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                share = parameter.detach().chunk(mesh.size(), 0)[mesh.get_local_rank()].clone()
                cut = DTensor.from_local(share, mesh, [Shard(0)], run_check=False)
                setattr(module, leaf, nn.Parameter(cut, requires_grad=parameter.requires_grad))
            module.ep_group = mesh.get_group()
