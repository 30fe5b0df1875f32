"""The exchange: rows to the ranks that hold their experts, and back, in chunks.

Uneven all-to-all without padding. Legend: N rows here, sorted by expert; M rows received; E experts, W ranks of the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from trainrt.parallel.collectives import exchange_rows
from trainrt.parallel.moe.layout import ExpertLayout
from trainrt.parallel.schedule import parts


@dataclass(frozen=True, slots=True)
class Chunk:
    """One chunk of the way there. rows: which of the rows to send are in it; arrived: which of those received.

    order: what arrives of it, sorted by expert; counts: rows of each expert held here.
    """

    rows: Tensor | slice
    send: list[int]
    receive: list[int]
    arrived: Tensor | slice
    order: Tensor
    counts: list[int]

    def unsorted(self, y_MD: Tensor) -> Tensor:
        """Rows sorted by expert in the order they came in; differentiable."""
        return torch.empty_like(y_MD).index_copy(0, self.order, y_MD)


@dataclass(frozen=True, slots=True)
class Exchange:
    """Who sends how many rows to whom. Both directions and every number of chunks follow from it.

    source: of each row that is sent, in the order of destinations, which row of this rank it is (a row is sent r times);
    None where each is sent once, in order. expert: of each row received, in the order of senders, which of the experts held
    here it is for.
    """

    group: dist.ProcessGroup
    source: Tensor | None
    send: list[int]
    receive: list[int]
    expert: Tensor
    here: int

    @classmethod
    def plan(cls, count_E: Tensor, layout: ExpertLayout, group: dist.ProcessGroup, *, r: int = 1) -> Exchange:
        """Agree on the counts; `count_E` rows of this rank, sorted by expert, go to each expert."""
        device, ranks, here = count_E.device, range(layout.ranks), layout.here(group.rank())
        if layout.slices == 1:
            held = [layout.here(rank) for rank in ranks]
            count_WL = exchange_rows(count_E, held, [here] * layout.ranks, group)
            send = [int(part.sum()) for part in count_E.cpu().split(held)]
            receive = count_WL.view(layout.ranks, here).sum(1).tolist()
            local_L = torch.arange(here, device=device).repeat(layout.ranks)
            return cls(group, None, send, receive, local_L.repeat_interleave(count_WL), here)
        # Copy j of a row goes to group j of its expert's ranks, and there to one of its `width` ranks in turn.
        width = layout.slices // r
        expert_N = torch.arange(layout.experts, device=device).repeat_interleave(count_E)
        turn_N = torch.arange(len(expert_N), device=device) - (count_E.cumsum(0) - count_E)[expert_N]
        copies = [expert_N * layout.slices + copy * width + turn_N % width for copy in range(r)]
        to, source = torch.cat(copies).sort(stable=True)
        send_W = torch.bincount(to, minlength=layout.ranks)
        receive_W = exchange_rows(send_W, [1] * layout.ranks, [1] * layout.ranks, group)
        expert = torch.zeros(int(receive_W.sum()), dtype=torch.int64, device=device)
        return cls(group, source % max(len(expert_N), 1), send_W.tolist(), receive_W.tolist(), expert, here)

    def chunks(self, number: int) -> list[Chunk]:
        """Of what goes to each rank, the first part is in the first chunk, and so on."""
        return [self._chunk(number, k) for k in range(number)]

    def _chunk(self, number: int, k: int) -> Chunk:
        sent, received = _runs(self.send, number, k), _runs(self.receive, number, k)
        # One chunk is everything as it lies.
        whole = number == 1
        arrived = slice(None) if whole else _indices(received, self.expert.device)
        expert = self.expert[arrived]
        return Chunk(
            rows=slice(None) if whole else _indices(sent, self.expert.device), send=[b - a for a, b in sent],
            receive=[b - a for a, b in received], arrived=arrived, order=expert.argsort(stable=True),
            counts=torch.bincount(expert, minlength=self.here).tolist(),
        )  # fmt: skip


def _runs(counts: Sequence[int], number: int, k: int) -> list[tuple[int, int]]:
    """Of rows in runs of `counts`, (start, stop) of the k-th part of each run."""
    runs, at = [], 0
    for count in counts:
        start, stop = parts(count, number)[k]
        runs.append((at + start, at + stop))
        at += count
    return runs


def _indices(runs: list[tuple[int, int]], device: torch.device) -> Tensor:
    return torch.cat([torch.arange(start, stop, device=device) for start, stop in runs])
