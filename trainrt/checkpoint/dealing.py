"""Who reads what when many load one checkpoint: every chunk that somebody wants is read by one rank, and passed on.

Pure arithmetic over numbers that all ranks have, so that all come to the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainrt.checkpoint.reader import Piece

RUN_BYTES = 16 << 20
RUNS_A_RANK = 4
"""At least so many, where there is enough to read: with fewer they cannot be dealt out evenly."""


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring pieces of one file, by number, that are read at once, and their bytes when decoded."""

    pieces: range
    bytes: int


@dataclass(frozen=True, slots=True)
class Transfer:
    """What `reader` sends to `rank` of one run (by number)."""

    run: int
    reader: int
    rank: int
    bytes: int


def cut_runs(pieces: Sequence[Piece], wanted: Sequence[bool], *, ranks: int) -> list[Run]:
    """The wanted pieces in runs without gaps, of RUN_BYTES at most unless one piece is larger."""
    total = sum(piece.chunk.length for piece, want in zip(pieces, wanted, strict=True) if want)
    most = min(RUN_BYTES, -(-total // (RUNS_A_RANK * ranks)))
    runs: list[Run] = []
    for number, piece in enumerate(pieces):
        if not wanted[number]:
            continue
        last = runs[-1] if runs else None
        joins = last is not None and last.pieces.stop == number and pieces[number - 1].file == piece.file
        if last is not None and joins and last.bytes + piece.chunk.length <= most:
            runs[-1] = Run(range(last.pieces.start, number + 1), last.bytes + piece.chunk.length)
        else:
            runs.append(Run(range(number, number + 1), piece.chunk.length))
    return runs


def deal(runs: Sequence[Run], shares: np.ndarray) -> list[int]:
    """The reader of each run. shares: (ranks, runs), the bytes that a rank wants of a run.

    It is who wants most of it, among those who have not read their part yet: nobody reads more than an even
    part and one run.
    """
    ranks = len(shares)
    even = sum(run.bytes for run in runs) / ranks
    largest = max((run.bytes for run in runs), default=0)
    load = np.zeros(ranks, np.int64)
    readers = []
    for number, run in enumerate(runs):
        wishes = np.where(load + run.bytes <= even + largest, shares[:, number], -1)
        keenest = np.flatnonzero(wishes == wishes.max())
        reader = int(keenest[np.argmin(load[keenest])])
        load[reader] += run.bytes
        readers.append(reader)
    return readers


def schedule(readers: Sequence[int], shares: np.ndarray, *, most_bytes: int) -> list[list[Transfer]]:
    """Rounds of transfers. No rank sends or receives more than `most_bytes` in one, unless one transfer is larger.

    A reader's runs follow one another, so that it holds one at a time; it begins with the rank after it, so
    that not all send to the same.
    """
    ranks = len(shares)
    queues: list[list[int]] = [[] for _ in range(ranks)]
    for run, reader in enumerate(readers):
        queues[reader].append(run)
    rounds: list[_Round] = []
    now = [0] * ranks
    for turn in range(max(map(len, queues), default=0)):
        for reader, queue in enumerate(queues):
            for shift in range(ranks) if turn < len(queue) else ():
                rank = (reader + shift + 1) % ranks
                transfer = Transfer(queue[turn], reader, rank, int(shares[rank, queue[turn]]))
                if not transfer.bytes:
                    continue
                while now[reader] < len(rounds) and not rounds[now[reader]].has_room(transfer):
                    now[reader] += 1
                if now[reader] == len(rounds):
                    rounds.append(_Round(ranks, most_bytes))
                rounds[now[reader]].add(transfer)
    return [each.transfers for each in rounds]


class _Round:
    """What is sent at once, and how much of it by and to each rank."""

    def __init__(self, ranks: int, most_bytes: int) -> None:
        self.transfers: list[Transfer] = []
        self._most, self._sent, self._received = most_bytes, [0] * ranks, [0] * ranks

    def has_room(self, transfer: Transfer) -> bool:
        held = max(self._sent[transfer.reader], self._received[transfer.rank])
        return not held or held + transfer.bytes <= self._most

    def add(self, transfer: Transfer) -> None:
        self.transfers.append(transfer)
        self._sent[transfer.reader] += transfer.bytes
        self._received[transfer.rank] += transfer.bytes
