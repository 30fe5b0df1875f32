"""Loading by all ranks together: each chunk is read and verified once in the job, and its boxes are passed on.

Every rank knows only what it wants itself. All say which chunks that touches, deal out their reading
(dealing.py), order pieces of each chunk from its reader, and then take turns in rounds of bounded size.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from trainrt.checkpoint.dealing import Run, Transfer, cut_runs, deal, schedule
from trainrt.checkpoint.reader import Universal
from trainrt.errors import CheckpointError, TrainrtError
from trainrt.events import ring
from trainrt.parallel.collectives import all_gather, all_reduce, exchange_rows
from trainrt.parallel.layout import Copy, Fragment, Layout, LogicalTensor, copies

ROUND_BYTES = 32 << 20

Orders = dict[tuple[int, int], list[tuple[LogicalTensor, Fragment]]]
"""(piece, rank) to what the rank wants of the piece, in the order in which it wants it."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Bytes of chunks: what the ranks read of them in all, what is stored of those that somebody wants, and of all."""

    read: int
    wanted: int
    stored: int


class Talk:
    """What the ranks of a job tell each other, in the same order on all. `group` None: there is one rank."""

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self._group, self._device = group, device
        self.rank = group.rank() if group is not None else 0
        self.ranks = group.size() if group is not None else 1

    def gather(self, numbers: Sequence[int]) -> np.ndarray:
        """The equally many whole numbers of every rank: (ranks, n)."""
        row = torch.tensor(list(numbers), dtype=torch.int64, device=self._device)
        return (all_gather(row, self._group) if self._group is not None else row[None]).cpu().numpy()

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """Of each of the equally many flags whether it is set on some rank."""
        row = torch.tensor(list(flags), dtype=torch.uint8, device=self._device)
        return (all_reduce(row, self._group, op=dist.ReduceOp.MAX) if self._group is not None else row).bool().tolist()

    def exchange(self, data: np.ndarray, send: list[int], receive: list[int]) -> np.ndarray:
        """Flat bytes: the first `send[0]` go to rank 0 and so on, `receive[0]` come from it."""
        if self._group is None:
            return data
        sent = torch.from_numpy(data).to(self._device)
        return exchange_rows(sent, send, receive, self._group).cpu().numpy()

    def from_first(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        held = [value]
        if self._group is not None:
            dist.broadcast_object_list(held, src=dist.get_global_rank(self._group, 0), group=self._group)
        return held[0]

    def agree(self, failure: Exception | None) -> None:
        """Raise on every rank where one has failed: the failure itself where there is no other rank."""
        if not self.any([failure is not None])[0]:
            return
        if self._group is None:
            assert failure is not None
            raise failure
        said: list[str | None] = [None] * self.ranks
        dist.all_gather_object(said, str(failure) if failure is not None else None, group=self._group)
        raise CheckpointError("; ".join(dict.fromkeys(text for text in said if text is not None)))


def open_together(path: Path, group: dist.ProcessGroup | None, device: torch.device) -> Universal:
    """Open a checkpoint that rank 0 checks for all. Raises CheckpointError on every rank with what is wrong."""
    talk = Talk(group, device)
    manifest, failure = None, None
    if talk.rank == 0:
        try:
            manifest = Universal.open(path).manifest
        except (TrainrtError, OSError) as error:
            failure = error
    talk.agree(failure)
    return Universal(path, talk.from_first(manifest))


def fill_together(
    target: Layout, storages: Mapping[tuple[int, str], np.ndarray], source: Universal, *,
    group: dist.ProcessGroup | None, device: torch.device, round_bytes: int = ROUND_BYTES,
) -> Reading:  # fmt: skip
    """Fill this rank's storages while all ranks of the group fill theirs; every rank calls this.

    target: what this rank wants. Beside it a rank holds one run of chunks and what it sends and receives in a
    round. Raises CheckpointError on every rank where a chunk is damaged, and where a rank wants what is not there.
    """
    talk = Talk(group, device)
    wanted: dict[int, list[Copy]] = defaultdict(list)
    failure = None
    try:
        for copy in copies(source.in_chunks(), target):
            wanted[int(copy.source.storage)].append(copy)
    except TrainrtError as error:
        failure = error
    talk.agree(failure)
    touched = talk.any([number in wanted for number in range(len(source.pieces))])
    runs = cut_runs(source.pieces, touched, ranks=talk.ranks)
    shares = talk.gather([sum(c.bytes for piece in run.pieces for c in wanted.get(piece, ())) for run in runs])
    readers = deal(runs, shares)
    reader = _Reader(source, runs, _take_orders(talk, runs, readers, wanted))
    for transfers in schedule(readers, shares, most_bytes=round_bytes):
        parcels = _pass_on(talk, reader, transfers)
        for transfer in (each for each in transfers if each.rank == talk.rank):
            for copy in (copy for piece in runs[transfer.run].pieces for copy in wanted.get(piece, ())):
                view = copy.target.view(storages[copy.target.rank, copy.target.storage], copy.tensor.item_bytes)
                view[...] = parcels[transfer.reader].take(copy.tensor, copy.box.length)
        # What came is not kept while the next round is read.
        del parcels
    stored = [piece.chunk.stored for piece in source.pieces]
    read = int(talk.gather([source.bytes_read]).sum())
    return Reading(read, sum(n for n, want in zip(stored, touched, strict=True) if want), sum(stored))


def _take_orders(
    talk: Talk, runs: Sequence[Run], readers: Sequence[int], wanted: Mapping[int, Sequence[Copy]]
) -> Orders:
    """Order boxes of chunks from their readers. Returns what was ordered from this one."""
    orders = [Layout() for _ in range(talk.ranks)]
    for run, reader in zip(runs, readers, strict=True):
        for copy in (copy for piece in run.pieces for copy in wanted.get(piece, ())):
            orders[reader].add(copy.tensor, copy.source)
    texts = [json.dumps(layout.to_json()).encode() for layout in orders]
    lengths = talk.gather([len(text) for text in texts])
    joined = np.frombuffer(bytearray(b"".join(texts)), np.uint8)
    data = talk.exchange(joined, lengths[talk.rank].tolist(), lengths[:, talk.rank].tolist())
    taken: Orders = defaultdict(list)
    for rank, text in enumerate(np.split(data, np.cumsum(lengths[:, talk.rank])[:-1])):
        for tensor, fragments in Layout.from_json(json.loads(text.tobytes())):
            for fragment in fragments:
                taken[int(fragment.storage), rank].append((tensor, fragment))
    return taken


def _pass_on(talk: Talk, reader: _Reader, transfers: Sequence[Transfer]) -> list[_Bytes]:
    """One round: read, pack and exchange. Returns what came from each rank."""
    sent = [sum(t.bytes for t in transfers if (t.reader, t.rank) == (talk.rank, rank)) for rank in range(talk.ranks)]
    come = [sum(t.bytes for t in transfers if (t.reader, t.rank) == (rank, talk.rank)) for rank in range(talk.ranks)]
    data, failure = np.empty(sum(sent), np.uint8), None
    try:
        parcels = [_Bytes(part) for part in np.split(data, np.cumsum(sent)[:-1])]
        for transfer in (each for each in transfers if each.reader == talk.rank):
            reader.pack(transfer, parcels[transfer.rank])
    except (TrainrtError, OSError) as error:
        failure = error
    talk.agree(failure)
    received = talk.exchange(data, sent, come)
    return [_Bytes(part) for part in np.split(received, np.cumsum(come)[:-1])]


class _Reader:
    """Reads the runs that were dealt to this rank, one at a time, and packs what was ordered of them."""

    def __init__(self, source: Universal, runs: Sequence[Run], orders: Orders) -> None:
        self._source, self._runs, self._orders = source, runs, orders
        self._held: tuple[int, list[np.ndarray]] | None = None

    def pack(self, transfer: Transfer, parcel: _Bytes) -> None:
        """What a rank wants of a run, in the order in which it wants it."""
        run = self._runs[transfer.run]
        if self._held is None or self._held[0] != transfer.run:
            self._held = None
            with ring.span("read", kind="checkpoint", bytes=run.bytes):
                self._held = (transfer.run, self._source.read_pieces([self._source.pieces[n] for n in run.pieces]))
        for number, data in zip(run.pieces, self._held[1], strict=True):
            for tensor, fragment in self._orders.get((number, transfer.rank), ()):
                place = parcel.take(tensor, fragment.box.length)
                place[...] = fragment.view(data, tensor.item_bytes)


class _Bytes:
    """Packed boxes, one behind the other, taken in the order in which they were put there."""

    def __init__(self, data: np.ndarray) -> None:
        self._data, self._at = data, 0

    def take(self, tensor: LogicalTensor, length: tuple[int, ...]) -> np.ndarray:
        """The place of the next box, as unsigned integers."""
        view = np.ndarray(length, f"u{tensor.item_bytes}", self._data, offset=self._at)
        self._at += view.nbytes
        return view
