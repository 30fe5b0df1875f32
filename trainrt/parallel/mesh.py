"""The mesh: its axes, who sits where, and the process groups of one rank.

Axes in the order of ranks: pp, dp, fsdp, cp, tp (tp varies fastest). Experts see the same
ranks of one stage as efsdp * ep, with ep fastest. This is the one place that chooses device and backend.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

from trainrt.config import MeshSize

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh


def coordinates(size: MeshSize, rank: int) -> dict[str, int]:
    """Where a rank sits on each axis, efsdp and ep included. Pure arithmetic, no process group."""
    where: dict[str, int] = {}
    rest = rank
    for axis in ("tp", "cp", "fsdp", "dp", "pp"):
        rest, where[axis] = divmod(rest, getattr(size, axis))
    where["efsdp"], where["ep"] = divmod(rank % (size.dp * size.fsdp * size.cp * size.tp), size.ep)
    return where


def axis_size(size: MeshSize, axis: str) -> int:
    """The length of an axis, efsdp included."""
    return int(getattr(size, axis))


def choose_device(wanted: str) -> str:
    """`auto` becomes cuda where there is one, else cpu."""
    import torch

    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return wanted


def backend_of(device: str) -> str:
    """The collective backend of a device type. CUDA has gloo beside NCCL for small CPU tensors."""
    return "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"


def talk_over_the_way_to(host: str) -> None:
    """Have gloo and NCCL use the network interface that leads to `host`, unless the environment names another one.

    By itself gloo takes the address that the hostname resolves to, which on many systems is a loopback.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # Nothing is sent: connecting a datagram socket only chooses the way.
        probe.connect((host, 9))
        own = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if own in {address.address for address in addresses}:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


@dataclass(frozen=True, slots=True)
class Groups:
    """The meshes of this rank: `dense` (dp, fsdp, tp) and, with experts spread, `experts` (efsdp, ep)."""

    size: MeshSize
    device: torch.device
    dense: DeviceMesh
    experts: DeviceMesh | None

    @property
    def fsdp(self) -> DeviceMesh:
        return self.dense["fsdp"]

    @property
    def tp(self) -> dist.ProcessGroup | None:
        """The tensor-parallel group, or None where tp is 1."""
        return self.dense.get_group("tp") if self.size.tp > 1 else None

    @property
    def dp(self) -> dist.ProcessGroup | None:
        """The group of replicas, or None where dp is 1."""
        return self.dense.get_group("dp") if self.size.dp > 1 else None

    @property
    def ep(self) -> dist.ProcessGroup | None:
        """The group over which experts are spread, or None where ep is 1."""
        return self.experts.get_group("ep") if self.experts is not None else None


def make_groups(size: MeshSize, device: torch.device) -> Groups:
    """Create the process groups of a mesh; every rank of the default group calls this."""
    from torch.distributed.device_mesh import init_device_mesh

    from trainrt.parallel.collectives import name_of_all

    shape = (size.dp, size.fsdp, size.tp)
    dense = init_device_mesh(device.type, shape, mesh_dim_names=("dp", "fsdp", "tp"))
    experts = None
    if size.ep > 1:
        experts = init_device_mesh(device.type, (size.efsdp, size.ep), mesh_dim_names=("efsdp", "ep"))
    # torch has one group of all ranks; what goes over it by way of an axis is that axis's. FSDP2 says its own.
    name_of_all(next((axis for axis in ("ep", "tp") if axis_size(size, axis) == size.world_size > 1), "world"))
    return Groups(size, device, dense, experts)


@dataclass(frozen=True, slots=True)
class ExpertGroups:
    """Over which ranks what experts need travels. ep: all that hold the experts of a layer.

    inside, across: ep's ranks on this rank's host, and those with its place on every host; None where the exchange through
    hosts makes no sense. neighbours: by width, so many ranks beside each other; None of one alone.
    """

    ep: dist.ProcessGroup
    inside: dist.ProcessGroup | None
    across: dist.ProcessGroup | None
    neighbours: Mapping[int, dist.ProcessGroup | None]


def make_expert_groups(size: MeshSize, mesh: DeviceMesh, *, widths: Sequence[int], places: int) -> ExpertGroups:
    """Every rank calls this. `mesh`: ep; `widths`: of groups of neighbours; `places`: ranks of ep that a host has."""
    from torch.distributed.device_mesh import init_device_mesh

    neighbours: dict[int, dist.ProcessGroup | None] = {1: None}
    for width in widths:
        if width > 1:
            shape = (size.world_size // width, width)
            beside = init_device_mesh(mesh.device_type, shape, mesh_dim_names=("apart", "slices"))
            neighbours[width] = beside.get_group("slices")
    if not 1 < places < size.ep:
        return ExpertGroups(mesh.get_group(), None, None, neighbours)
    by_host = (size.efsdp, size.ep // places, places)
    hosts = init_device_mesh(mesh.device_type, by_host, mesh_dim_names=("apart", "across", "inside"))
    return ExpertGroups(mesh.get_group(), hosts.get_group("inside"), hosts.get_group("across"), neighbours)


def places_on_host(ep: int, workers_per_node: int) -> int:
    """How many ranks of a group of ep are on a host: all, as many as it has, or 1 where groups lie across unevenly."""
    if workers_per_node % ep == 0:
        return ep
    return workers_per_node if ep % workers_per_node == 0 else 1
