"""Groups of stores that protect each other: which store holds parity of what.

A group is k + m stores. Each store's own data (its ranks' slots, one after the other) is cut into k segments of equal
length; stripe t of the group takes one segment of each of k stores, and its m parity shards lie on the other m:

    parity row r of stripe t     on store (t + r) mod (k + m)
    data shard j of stripe t     segment j of store (t + m + j) mod (k + m)

So every store holds data and m parity segments, all have the same work, and whatever m stores are lost, no stripe loses
more than m shards (RAID 5 rotated over nodes, as REFT, arXiv 2310.12670, section 4.2; here for m up to 3).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SEGMENT_ALIGNMENT = 64
MOST_DATA_SHARDS = 8
"""`data_shards = "auto"`: more data shards save little memory (m / k) and make every rebuilding read more."""


@dataclass(frozen=True, slots=True)
class Group:
    """Stores by node name, in order, and the number of parity shards."""

    nodes: tuple[str, ...]
    m: int

    @property
    def k(self) -> int:
        return len(self.nodes) - self.m

    def holder(self, stripe: int, row: int) -> str:
        """Where parity row `row` of a stripe lies."""
        return self.nodes[(stripe + row) % len(self.nodes)]

    def contributor(self, stripe: int, shard: int) -> str:
        """Whose segment `shard` is that data shard of a stripe."""
        return self.nodes[(stripe + self.m + shard) % len(self.nodes)]

    def stripe_of(self, node: str, segment: int) -> int:
        """The stripe that protects a segment of a node."""
        return (self.nodes.index(node) - self.m - segment) % len(self.nodes)

    def parity_of(self, node: str) -> list[tuple[int, int]]:
        """(stripe, row) of the parity that a node holds."""
        position = self.nodes.index(node)
        return [((position - row) % len(self.nodes), row) for row in range(self.m)]

    def shards(self, stripe: int) -> dict[int, str]:
        """Shard number (data first, then parity) to the node that holds it."""
        data = {shard: self.contributor(stripe, shard) for shard in range(self.k)}
        return {**data, **{self.k + row: self.holder(stripe, row) for row in range(self.m)}}

    def decodable(self, *, data: Collection[str], parity: Collection[str]) -> bool:
        """Whether all data is there or follows, with the data and the parity of these nodes."""
        for stripe in range(len(self.nodes)):
            shards = self.shards(stripe)
            there = sum(node in (data if number < self.k else parity) for number, node in shards.items())
            lost = any(shards[number] not in data for number in range(self.k))
            if lost and there < self.k:
                return False
        return True

    def to_json(self) -> dict[str, Any]:
        return {"nodes": list(self.nodes), "m": self.m}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Group:
        return cls(tuple(document["nodes"]), document["m"])


def segment_bytes(node_bytes: int, k: int) -> int:
    """The length of a segment of a node's data; the last one is filled up with zeros."""
    return -(-node_bytes // (k * SEGMENT_ALIGNMENT)) * SEGMENT_ALIGNMENT


def choose_groups(hosts: Mapping[str, str], *, data_shards: int | None, parity_shards: int) -> list[Group]:
    """Split nodes (name to host, or "rack/host") into groups: those of one host, and of one rack, into different ones
    where that is possible.

    `data_shards` None: as many as there are nodes for, up to MOST_DATA_SHARDS. Fewer nodes than asked for make
    smaller groups, and a group of one node has no parity: what was asked for is reduced, never refused.
    """
    nodes = sorted(hosts, key=lambda node: (hosts[node], node))
    if not nodes:
        return []
    size = (data_shards or MOST_DATA_SHARDS) + parity_shards
    count = max(1, -(-len(nodes) // size)) if parity_shards else len(nodes)
    # No group may be too small for its parity.
    count = min(count, max(1, len(nodes) // (parity_shards + 1))) if parity_shards else count
    # Nodes of one host, and hosts of one rack, follow each other, so that dealing them out puts them into different groups.
    members: Sequence[list[str]] = [sorted(nodes[start::count]) for start in range(count)]
    return [Group(tuple(names), min(parity_shards, len(names) - 1)) for names in members]
