"""Replicated state is coded without network: what replicas on other nodes hold, the trainers of this node hold as well.

Besides its own share a trainer copies those ranges of its replicas' shares that this store's parity needs. The owner of a
range is asked only whether its checksum is the same; if not (the replicas have drifted, or a buffer has changed meanwhile),
its data is pulled like any other, so that parity is always of what the owner keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
import xxhash

from trainrt.checkpoint.store.group import Group
from trainrt.checkpoint.store.segments import NodeData, cut
from trainrt.checkpoint.store.slots import owner_of

Order = tuple[int, int, int, int]
"""(rank, start, stop, at): bytes of a replica's share, and where they go in the mirror."""


@dataclass(slots=True)
class Mirror:
    """What each rank of this node copies for its store, and where the segments of other nodes lie in that."""

    orders: dict[int, list[Order]] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)
    slots: dict[int, str] = field(default_factory=dict)
    _segments: dict[tuple[str, int], list[tuple[int, int, int]]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, group: Group, node: str, *, sizes: Mapping[str, Mapping[int, int]], replicas: Mapping[int, Collection[int]]
    ) -> Mirror:
        """`sizes`: node to the bytes of its ranks; `replicas`: rank of this node to the ranks whose shares it holds."""
        mirror = cls()
        for stripe, _ in group.parity_of(node):
            for segment in range(group.k):
                owner = group.contributor(stripe, segment)
                if (owner, segment) not in mirror._segments:
                    mirror._add(owner, segment, group.k, sizes[owner], replicas)
        return mirror

    def _add(
        self, owner: str, segment: int, k: int, sizes: Mapping[int, int], replicas: Mapping[int, Collection[int]]
    ) -> None:
        """Take in a segment, if all of it is held here."""
        ranks = sorted(sizes)
        data = NodeData([(sizes[rank], cut(np.empty(0, np.uint8))) for rank in ranks])
        spans = list(data.spans(*data.segment(segment, k, 0, data.bytes)))
        here = [next((mine for mine, held in replicas.items() if ranks[piece] in held), None) for piece, _, _ in spans]
        if None in here:
            return
        pieces = self._segments[owner, segment] = []
        for mine, (piece, start, stop) in zip(here, spans, strict=True):
            assert mine is not None
            at = self.sizes.get(mine, 0)
            self.orders.setdefault(mine, []).append((ranks[piece], start, stop, at))
            self.sizes[mine] = at + stop - start
            pieces.append((mine, at, stop - start))

    def read(
        self, maps: Callable[[str], np.ndarray], owner: str, segment: int, offset: int, length: int
    ) -> np.ndarray | None:
        """A range of a segment of another node; None where it is not held here."""
        if not self.slots or (owner, segment) not in self._segments:
            return None
        pieces = [
            (size, cut(maps(self.slots[mine])[at : at + size])) for mine, at, size in self._segments[owner, segment]
        ]
        return NodeData(pieces).read(offset, offset + length)


def mirror_owner(rank: int) -> str:
    """What the slot of a rank's mirror is for: see `Slots`."""
    return f"mirror-{owner_of(rank)}"


def digest(data: np.ndarray) -> str:
    return xxhash.xxh3_64_hexdigest(data)
