"""The state of a rank as bytes: packed into a snapshot slot, filled from any source.

The plan says which bytes; this module only moves them between live tensors and flat storage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from trainrt.checkpoint.source import Source, fill
from trainrt.errors import CheckpointError
from trainrt.parallel.layout import Layout, LogicalTensor
from trainrt.parallel.plan import ParameterPlan, Plan, Slot
from trainrt.training.staging import SideStream

BUCKET_BYTES = 16 << 20
"""How much is copied before the store is told: it begins to hash and code then."""


class StateHolder(Protocol):
    """What an engine shows of its state."""

    plan: Plan
    rank: int

    def roles(self) -> list[tuple[str, str | None]]: ...
    def tensor(self, name: str, role: str) -> Tensor: ...


class Snapshotter:
    """Copies the state of one rank into a slot: views of the slot are made once per buffer.

    Of what replicas hold, each copies its share. Only the optimizer changes most of it, so `copy_rest` may run beside
    the next forward and backward; what a forward pass changes, `copy_buffers` copies before.
    """

    def __init__(self, holder: StateHolder) -> None:
        plan, roles = holder.plan, holder.roles()
        self.slots, self.bytes = plan.slots(holder.rank, roles, shared=True)
        self.layout = plan.layout([holder.rank], roles, shared=True)
        self.replicas = plan.replicas(holder.rank)
        self._shares = {rank: plan.slots(rank, roles, shared=True)[0] for rank in self.replicas}
        self._holder = holder
        self._views: dict[int, list[Tensor]] = {}
        device = holder.tensor(self.slots[0].name, self.slots[0].role).device if self.slots else torch.device("cpu")
        self._side = SideStream(device)

    def copy_into(self, buffer: np.ndarray) -> None:
        """All of the state, at once."""
        self.copy_buffers(buffer)
        self.copy_rest(buffer)

    @torch.no_grad()
    def copy_buffers(
        self, buffer: np.ndarray, mirror: tuple[np.ndarray, list[tuple[int, int, int, int]]] | None = None
    ) -> None:
        """The model's buffers, in the mirror as well (see `copy_mirror`), and the mark of the step that is kept.

        To be called before the next forward pass is queued.
        """
        self._side.mark()
        self._copy(buffer, [number for number, slot in enumerate(self.slots) if slot.role == "buffer"])
        if mirror is not None:
            self._copy_orders(*mirror, buffers=True)
        self._side.hold_back()

    @torch.no_grad()
    def copy_rest(self, buffer: np.ndarray, *, copied: Callable[[int], None] = lambda _: None) -> None:
        """One memory copy of all else; rounding to the parameter's dtype happens in it.

        `copied` hears up to which byte the buffer is complete, every BUCKET_BYTES.
        """
        wanted: list[int] = []
        start = 0
        for number, slot in enumerate(self.slots):
            if slot.base - start >= BUCKET_BYTES:
                self._copy(buffer, wanted)
                self._side.wait()
                copied(slot.base)
                wanted, start = [], slot.base
            if slot.role != "buffer":
                wanted.append(number)
        self._copy(buffer, wanted)
        self._side.wait()

    @torch.no_grad()
    def copy_mirror(self, mirror: np.ndarray, orders: list[tuple[int, int, int, int]]) -> None:
        """Ranges (rank, start, stop, at) of replicas' shares, which are held here as well; without the model's buffers."""
        self._copy_orders(mirror, orders, buffers=False)
        self._side.wait()

    def _copy_orders(self, mirror: np.ndarray, orders: list[tuple[int, int, int, int]], *, buffers: bool) -> None:
        self._side.pin(mirror)
        flat, views, live = torch.from_numpy(mirror), [], []
        for rank, start, stop, at in orders:
            for slot in self._shares[rank]:
                item = getattr(torch, slot.dtype).itemsize
                first, last = max(start, slot.base), min(stop, slot.base + _slot_bytes(slot))
                if first < last and (slot.role == "buffer") == buffers:
                    elements = slice((first - slot.base) // item, (last - slot.base) // item)
                    live.append(self._live(slot).reshape(-1)[elements])
                    views.append(flat[at + first - start : at + last - start].view(getattr(torch, slot.dtype)))
        self._side.copy(views, live)

    def _copy(self, buffer: np.ndarray, wanted: list[int]) -> None:
        address = buffer.__array_interface__["data"][0]
        if address not in self._views:
            self._side.pin(buffer)
            flat = torch.from_numpy(buffer)
            self._views[address] = [_view(flat, slot) for slot in self.slots]
        views = [self._views[address][number] for number in wanted]
        self._side.copy(views, [self._live(self.slots[number]) for number in wanted])

    def _live(self, slot: Slot) -> Tensor:
        tensor = self._holder.tensor(slot.name, slot.role).detach()
        if tensor.shape == torch.Size(slot.shape):
            return tensor
        return tensor.narrow(0, slot.start, slot.shape[0]) if tensor.dim() else tensor.new_empty(slot.shape)


def _slot_bytes(slot: Slot) -> int:
    return int(np.prod(slot.shape, dtype=np.int64)) * getattr(torch, slot.dtype).itemsize


def _view(flat: Tensor, slot: Slot) -> Tensor:
    dtype = getattr(torch, slot.dtype)
    elements = int(np.prod(slot.shape, dtype=np.int64))
    return flat[slot.base : slot.base + elements * dtype.itemsize].view(dtype).view(slot.shape)


class Filler(Protocol):
    """Fills the storages of a target layout from a source: `fill`, or all ranks together."""

    def __call__(self, target: Layout, storages: Mapping[tuple[int, str], np.ndarray], source: Any, /) -> Any: ...


@torch.no_grad()
def restore(holder: StateHolder, source: Source, *, fill: Filler = fill) -> Any:
    """Fill the live state of this rank from any layout of the same tensors. Returns what `fill` does.

    Weights come from the masters where the source has them, else from the parameters; the rounded
    parameters follow from the masters. Raises CheckpointError where the source lacks a tensor.
    """
    target = Layout()
    storages: dict[tuple[int, str], np.ndarray] = {}
    apart: list[tuple[Tensor, Tensor]] = []
    by_name = {parameter.name: parameter for parameter in holder.plan.parameters}
    for slot in _wanted(holder):
        live, storage = holder.tensor(slot.name, slot.role).detach(), f"{slot.role} of {slot.name}"
        dtype = _describe(target, holder, by_name[slot.name], slot.role, source, storage)
        if live.device.type == "cpu" and live.dtype == dtype and live.is_contiguous():
            landing = live
        else:
            landing = torch.empty(live.shape, dtype=dtype)
            apart.append((live, landing))
        storages[holder.rank, storage] = landing.reshape(-1).view(torch.uint8).numpy()
    done = fill(target, storages, source)
    for live, landing in apart:
        live.copy_(landing)
    return done


def _wanted(holder: StateHolder) -> list[Slot]:
    """The local tensors that are restored: all but parameters that are the rounded form of a master."""
    slots, _ = holder.plan.slots(holder.rank, holder.roles())
    mastered = {slot.name for slot in slots if slot.role == "master"}
    return [slot for slot in slots if not (slot.role == "parameter" and slot.name in mastered)]


def _describe(
    target: Layout, holder: StateHolder, parameter: ParameterPlan, role: str, source: Source, storage: str
) -> torch.dtype:
    """Add what a local tensor holds to the target, in the source's role and dtype. Returns that dtype."""
    mine, dtype = parameter.held(holder.plan.mesh, holder.rank), parameter.dtype
    for part in parameter.parts:
        held = _held(source, part.name, role)
        dtype = held.dtype
        fragments = parameter.fragments(part, mine, holder.rank, base=0)
        target.add(
            LogicalTensor(part.name, held.role, held.dtype, part.shape),
            *(replace(fragment, storage=storage) for fragment in fragments),
        )
    found: torch.dtype = getattr(torch, dtype)
    return found


def _held(source: Source, name: str, role: str) -> LogicalTensor:
    tensors: dict[Any, LogicalTensor] = source.layout.tensors
    candidates = ("master", "parameter") if role in ("parameter", "master") else (role,)
    for candidate in candidates:
        if (name, candidate) in tensors:
            return tensors[(name, candidate)]
    raise CheckpointError(f"the source holds no {role} of {name}")
