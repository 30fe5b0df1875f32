"""The exchange: rows to the ranks that hold their experts, and back, in chunks.

Uneven all-to-all without padding. Legend: N rows here, sorted by expert; M rows received; E experts, W ranks of the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainrt.events import ring
from trainrt.parallel.collectives import ExchangeRows, exchange_rows, group_name
from trainrt.parallel.moe.layout import ExpertLayout
from trainrt.parallel.schedule import parts


@dataclass(frozen=True, slots=True)
class Started:
    """An all-to-all on its way. The tensors are kept until it has ended."""

    work: Any
    sent: Tensor
    received: Tensor
    group: dist.ProcessGroup

    def wait(self) -> Tensor:
        size, name = self.sent.nbytes, group_name(self.group)
        with ring.span("all_to_all", kind="collective", bytes=size, group=name, waiting=True):
            self.work.wait()
        return self.received


def start_exchange(x_ND: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Started:
    """Start an uneven all-to-all of rows; not differentiable."""
    received = x_ND.new_empty((sum(receive), *x_ND.shape[1:]))
    sent = x_ND.contiguous()
    work = dist.all_to_all_single(received, sent, receive, send, group=group, async_op=True)
    return Started(work, sent, received, group)


@dataclass(frozen=True, slots=True)
class Chunk:
    """One chunk of the way there. rows: which of the rows to send are in it; arrived: which of those received.

    order: what arrives of it, sorted by expert; counts: rows of each expert held here.
    """

    rows: Tensor
    send: list[int]
    receive: list[int]
    arrived: Tensor
    order: Tensor
    counts: list[int]


@dataclass(frozen=True, slots=True)
class Exchange:
    """Who sends how many rows to whom. Both directions and every number of chunks follow from it.

    source: of each row that is sent, in the order of destinations, which row of this rank it is (a row is sent r times).
    expert: of each row received, in the order of senders, which of the experts held here it is for.
    """

    group: dist.ProcessGroup
    source: Tensor
    send: list[int]
    receive: list[int]
    expert: Tensor
    here: int

    @classmethod
    def plan(cls, count_E: Tensor, layout: ExpertLayout, group: dist.ProcessGroup, *, r: int = 1) -> Exchange:
        """Agree on the counts; `count_E` rows of this rank, sorted by expert, go to each expert."""
        device, here = count_E.device, layout.here(group.rank())
        expert_N = torch.arange(layout.experts, device=device).repeat_interleave(count_E)
        ranks = range(layout.ranks)
        if layout.slices == 1:
            source = torch.arange(len(expert_N), device=device)
            count_WL = exchange_rows(count_E, [layout.here(p) for p in ranks], [here] * layout.ranks, group)
            sent_E = count_E.tolist()
            send = [sum(sent_E[layout.first(p) : layout.first(p + 1)]) for p in ranks]
            receive = count_WL.view(layout.ranks, here).sum(1).tolist()
            local_L = torch.arange(here, device=device).repeat(layout.ranks)
            return cls(group, source, send, receive, local_L.repeat_interleave(count_WL), here)
        # Copy j of a row goes to group j of its expert's ranks, and there to one of its `width` ranks in turn.
        width = layout.slices // r
        turn_N = torch.arange(len(expert_N), device=device) - (count_E.cumsum(0) - count_E)[expert_N]
        copies = [expert_N * layout.slices + copy * width + turn_N % width for copy in range(r)]
        to, source = torch.cat(copies).sort(stable=True)
        send_W = torch.bincount(to, minlength=layout.ranks)
        receive_W = exchange_rows(send_W, [1] * layout.ranks, [1] * layout.ranks, group)
        expert = torch.zeros(int(receive_W.sum()), dtype=torch.int64, device=device)
        return cls(group, source % max(len(expert_N), 1), send_W.tolist(), receive_W.tolist(), expert, here)

    @property
    def counts(self) -> list[int]:
        """Rows received for each expert held here."""
        counts: list[int] = torch.bincount(self.expert, minlength=self.here).tolist()
        return counts

    def there(self, x_ND: Tensor) -> Tensor:
        """Rows in the order of destinations to those received, sorted by expert; in one piece, differentiable."""
        return ExchangeRows.apply(x_ND, self.send, self.receive, self.group)[self.expert.argsort(stable=True)]

    def back(self, y_MD: Tensor) -> Tensor:
        """Results of rows received to where they came from, in the order they were sent in."""
        unsorted = self.expert.argsort(stable=True).argsort()
        return ExchangeRows.apply(y_MD[unsorted], self.receive, self.send, self.group)

    def chunks(self, number: int) -> list[Chunk]:
        """Of what goes to each rank, the first part is in the first chunk, and so on."""
        made = []
        for k in range(number):
            sent, received = _runs(self.send, number, k), _runs(self.receive, number, k)
            arrived = _indices(received, self.expert.device)
            expert = self.expert[arrived]
            made.append(Chunk(
                rows=_indices(sent, self.expert.device), send=[b - a for a, b in sent],
                receive=[b - a for a, b in received], arrived=arrived, order=expert.argsort(stable=True),
                counts=torch.bincount(expert, minlength=self.here).tolist(),
            ))  # fmt: skip
        return made


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
