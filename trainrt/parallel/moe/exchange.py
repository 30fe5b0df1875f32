"""The exchange: rows to the ranks that hold their experts, and back, in chunks, straight or through the ranks of a host.

Uneven all-to-all without padding. Every rank knows how many rows every rank has for every expert (one small all-gather), so
whatever else there is to know about the way follows without a word. Legend: N rows here, sorted by expert; M rows received; E
experts, W ranks of the group, L experts here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from trainrt.parallel.collectives import Started, all_gather, start_exchange
from trainrt.parallel.mesh import ExpertGroups
from trainrt.parallel.moe.layout import ExpertLayout

Counts = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Hop:
    """One all-to-all on the way. order: how rows are put in order before it; None: as they are."""

    group: dist.ProcessGroup
    order: Tensor | None
    send: list[int]
    receive: list[int]

    def there(self, x_ND: Tensor) -> Started:
        return start_exchange(x_ND if self.order is None else x_ND[self.order], self.send, self.receive, self.group)

    def back(self, y_MD: Tensor) -> Returning:
        return Returning(start_exchange(y_MD, self.receive, self.send, self.group), self.order)


@dataclass(frozen=True, slots=True)
class Returning:
    """Rows on their way back over a hop, which are put in the order that they had before it."""

    started: Started
    order: Tensor | None

    def wait(self) -> Tensor:
        y_ND = self.started.wait()
        return y_ND if self.order is None else torch.empty_like(y_ND).index_copy_(0, self.order, y_ND)

    def is_completed(self) -> bool:
        return self.started.is_completed()


@dataclass(frozen=True, slots=True)
class Chunk:
    """One chunk of the way there. rows: which of the rows to send are in it; arrived: which of those received.

    order: what arrives of it, sorted by expert; counts: rows of each expert held here.
    """

    rows: Tensor | slice
    hops: list[Hop]
    arrived: Tensor | slice
    order: Tensor
    counts: list[int]

    def unsorted(self, y_MD: Tensor) -> Tensor:
        """Rows sorted by expert in the order they came in."""
        return torch.empty_like(y_MD).index_copy(0, self.order, y_MD)


@dataclass(frozen=True, slots=True)
class Exchange:
    """Who sends how many rows to whom. Both directions and every number of chunks follow from it.

    source: of each row that is sent, in the order of destinations, which row of this rank it is (a row is sent r times);
    None where each is sent once, in order. rows_WW: rows from a rank to a rank. received_WL: rows from a rank to each of the
    experts here.
    """

    groups: ExpertGroups
    hierarchical: bool
    source: Tensor | None
    rows_WW: Counts
    received_WL: Counts
    device: torch.device

    @classmethod
    def plan(
        cls, count_WE: Counts, layout: ExpertLayout, groups: ExpertGroups, *,
        device: torch.device, r: int = 1, hierarchical: bool = False,
    ) -> Exchange:  # fmt: skip
        """From the rows of every rank for every expert, in the order of positions; so are each rank's."""
        rank = groups.ep.rank()
        if layout.slices == 1:
            first, here = layout.first(rank), layout.here(rank)
            rows_WW = np.add.reduceat(count_WE, layout.firsts, axis=1)
            return cls(groups, hierarchical, None, rows_WW, count_WE[:, first : first + here], device)
        # Copy j of a row goes to group j of its expert's ranks, and there to one of its `width` ranks in turn.
        width = layout.slices // r
        turn_W = np.arange(layout.ranks) % width
        rows_WW = (np.repeat(count_WE, layout.slices, 1) - turn_W + width - 1) // width
        source = torch.from_numpy(_copies(count_WE[rank], layout, r)).to(device)
        return cls(groups, hierarchical, source, rows_WW, rows_WW[:, rank : rank + 1], device)

    @property
    def received(self) -> int:
        """M."""
        return int(self.received_WL.sum())

    @property
    def hops(self) -> int:
        return 2 if self.hierarchical else 1

    def chunks(self, number: int) -> list[Chunk]:
        """Of what goes from a rank to a rank, the first part is in the first chunk, and so on."""
        return [self._chunk(number, k) for k in range(number)]

    def _chunk(self, number: int, k: int) -> Chunk:
        rank = self.groups.ep.rank()
        start_WW, stop_WW = self.rows_WW * k // number, self.rows_WW * (k + 1) // number
        here = self.received_WL.shape[1]
        expert_M = np.repeat(np.tile(np.arange(here), len(self.received_WL)), self.received_WL.ravel())
        rows: Tensor | slice = slice(None)
        arrived: Tensor | slice = slice(None)
        # One chunk is everything as it lies.
        if number > 1:
            arrived_M = _parts(self.rows_WW[:, rank], start_WW[:, rank], stop_WW[:, rank])
            expert_M = expert_M[arrived_M]
            rows = torch.from_numpy(_parts(self.rows_WW[rank], start_WW[rank], stop_WW[rank])).to(self.device)
            arrived = torch.from_numpy(arrived_M).to(self.device)
        order = torch.from_numpy(np.argsort(expert_M, kind="stable")).to(self.device)
        counts = np.bincount(expert_M, minlength=here).tolist()
        return Chunk(rows, self._way(stop_WW - start_WW), arrived, order, counts)

    def _way(self, rows_WW: Counts) -> list[Hop]:
        rank = self.groups.ep.rank()
        if not self.hierarchical:
            return [Hop(self.groups.ep, None, rows_WW[rank].tolist(), rows_WW[:, rank].tolist())]
        return _through_hosts(rows_WW, self.groups, self.device)


def _parts(lengths: Counts, start: Counts, stop: Counts) -> Counts:
    """Of rows in runs of `lengths`, the indices of those from `start` to `stop` of each run."""
    return _ranges(np.cumsum(lengths) - lengths + start, stop - start)


def _copies(count_E: Counts, layout: ExpertLayout, r: int) -> Counts:
    """Which row it is that is sent, in the order of destinations: each row r times, to slices of its expert."""
    width, rows = layout.slices // r, int(count_E.sum())
    expert_N = np.repeat(np.arange(layout.experts), count_E)
    turn_N = np.arange(rows) - np.repeat(np.cumsum(count_E) - count_E, count_E)
    to = np.concatenate([expert_N * layout.slices + copy * width + turn_N % width for copy in range(r)])
    return np.argsort(to, kind="stable") % max(rows, 1)


def _through_hosts(rows_WW: Counts, groups: ExpertGroups, device: torch.device) -> list[Hop]:
    """Inside the host to the rank with the destination's place in its host, then between hosts (2DH: Tutel, MLSys'23, 3.4).

    H hosts of P places. A rank sends H messages of P times the size between hosts, instead of W.
    """
    inside, across = groups.inside, groups.across
    assert inside is not None and across is not None
    host, place = divmod(groups.ep.rank(), inside.size())
    rows_HPHP = rows_WW.reshape(across.size(), inside.size(), across.size(), inside.size())
    mine_HP = rows_HPHP[host, place]
    # What this place of the host's ranks gets: from each of them, for each host.
    held_PH = rows_HPHP[host, :, :, place]
    first = Hop(inside, _transposed(mine_HP, device), mine_HP.sum(0).tolist(), held_PH.sum(1).tolist())
    arriving_H = rows_HPHP[:, :, host, place].sum(1)
    return [first, Hop(across, _transposed(held_PH, device), held_PH.sum(0).tolist(), arriving_H.tolist())]


def _transposed(lengths_AB: Counts, device: torch.device) -> Tensor:
    """Rows in runs by A, then B: their indices by B, then A."""
    first_AB = (np.cumsum(lengths_AB) - lengths_AB.ravel()).reshape(lengths_AB.shape)
    return torch.from_numpy(_ranges(first_AB.T.ravel(), lengths_AB.T.ravel())).to(device)


def _ranges(first: Counts, lengths: Counts) -> Counts:
    """first[0], first[0] + 1, ... of each range, one after the other."""
    before = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) + np.repeat(first - before, lengths)


def gather_counts(count_E: Tensor, group: dist.ProcessGroup, *, agreed: Sequence[int] = ()) -> Counts:
    """The rows of every rank for every expert, and that all ranks came with the same `agreed`. Raises RuntimeError."""
    own = torch.cat((torch.tensor(agreed, dtype=torch.int64, device=count_E.device), count_E.to(torch.int64)))
    table = all_gather(own, group).cpu().numpy()
    known = table[:, : len(agreed)]
    if (known != known[0]).any():
        raise RuntimeError(f"the ranks do not agree how a mixture is to be computed: {known.tolist()}")
    return table[:, len(agreed) :]
