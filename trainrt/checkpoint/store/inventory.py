"""What live stores hold together: which generations are whole, which can be decoded, and what is missing for the rest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from trainrt.checkpoint.store.group import Group


@dataclass(slots=True)
class Holding:
    """One generation over all stores. `data`: rank to the nodes that hold it; `parity`: nodes whose parity is complete."""

    step: int
    incarnation: int
    seating: dict[int, str]
    groups: tuple[Group, ...]
    data: dict[int, set[str]] = field(default_factory=lambda: defaultdict(set))
    parity: set[str] = field(default_factory=set)

    @property
    def protected(self) -> bool:
        """Whether parity is complete on every node of every group that has parity."""
        return all(set(group.nodes) <= self.parity for group in self.groups if group.m)

    @property
    def lost(self) -> list[str]:
        """The nodes of which some rank's data is in no store."""
        return sorted({node for rank, node in self.seating.items() if not self.data.get(rank)})

    @property
    def recoverable(self) -> bool:
        lost = set(self.lost)
        return all(
            group.decodable(data=set(group.nodes) - lost, parity=self.parity)
            for group in self.groups
            if lost & set(group.nodes)
        ) and lost <= {node for group in self.groups for node in group.nodes}

    def group_of(self, node: str) -> Group:
        return next(group for group in self.groups if node in group.nodes)

    def ranks_of(self, node: str) -> list[int]:
        return sorted(rank for rank, seat in self.seating.items() if seat == node)

    def where(self, node: str) -> str | None:
        """A store that holds all data of a node: itself, or one where it was rebuilt."""
        common = set.intersection(*(self.data.get(rank, set()) for rank in self.ranks_of(node)))
        return node if node in common else min(common, default=None)

    def missing(self) -> str:
        """For messages: what stands in the way of restoring this generation."""
        groups = [group for group in self.groups if set(self.lost) & set(group.nodes)]
        return "; ".join(
            f"generation {self.step}: lost {', '.join(sorted(set(self.lost) & set(group.nodes)))} of a group of "
            f"{group.k} + {group.m} with parity of {len(self.parity & set(group.nodes))} of {len(group.nodes)} nodes"
            for group in groups
        )


def take_inventory(statuses: Iterable[Mapping[str, Any]]) -> list[Holding]:
    """All generations that the stores of these statuses know of, the newest first.

    Whether a generation was committed makes no difference: what is sealed everywhere is whole, and the commit says
    only that its parity is complete too. One of a later incarnation is newer than one of the same step before it.
    """
    found: dict[tuple[int, int], Holding] = {}
    for status in statuses:
        for held in status["generations"]:
            key = (held["step"], held["incarnation"])
            if key not in found:
                seating = {int(rank): node for rank, node in held["seating"].items()}
                found[key] = Holding(*key, seating, tuple(map(Group.from_json, held["groups"])))
            for rank in held["ranks"]:
                found[key].data[rank].add(status["node"])
            if held["parity"]:
                found[key].parity.add(status["node"])
    return [found[key] for key in sorted(found, reverse=True)]
