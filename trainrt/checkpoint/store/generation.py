"""A generation on one store: the state machine of the commit protocol (docs/recovery.md).

A generation is the state of one step over all ranks. A store holds the members of its own node's
ranks, and parity of its group; it is usable when every rank's member is sealed in some live store, or
follows from those that are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from trainrt.checkpoint.store.group import Group
from trainrt.checkpoint.store.mirror import Mirror
from trainrt.errors import StoreError


class State(Enum):
    """COPYING: trainers write. SEALED: every local member is hashed. PROTECTED: this store's parity is complete too.

    COMMITTED: all stores said so. DROPPED: given up, or replaced by a newer one.
    """

    COPYING = "copying"
    SEALED = "sealed"
    PROTECTED = "protected"
    COMMITTED = "committed"
    DROPPED = "dropped"


TRANSITIONS: dict[tuple[State, str], State] = {
    (State.COPYING, "members_sealed"): State.SEALED,
    (State.COPYING, "drop"): State.DROPPED,
    (State.SEALED, "parity_over"): State.PROTECTED,
    (State.SEALED, "drop"): State.DROPPED,
    (State.PROTECTED, "commit"): State.COMMITTED,
    (State.PROTECTED, "drop"): State.DROPPED,
    (State.COMMITTED, "drop"): State.DROPPED,
}


@dataclass(slots=True)
class Member:
    """One rank's part: its slot, the digest of its layout, how much is copied, and the checksums of its blocks."""

    rank: int
    slot: str
    bytes: int
    layout: str
    copied: int = 0
    hashes: list[int] = field(default_factory=list)
    metadata: dict[str, Any] | None = None
    hashing: bool = False
    sealed: bool = False

    def facts(self) -> dict[str, Any]:
        """What a store that rebuilds this member must know."""
        return {"bytes": self.bytes, "layout": self.layout, "hashes": self.hashes, "metadata": self.metadata}


@dataclass(frozen=True, slots=True)
class Part:
    """One parity segment within a store's parity slot."""

    stripe: int
    row: int
    offset: int
    length: int


@dataclass(slots=True)
class Parity:
    """A store's parity of one generation, and the facts of every other node's members."""

    slot: str
    bytes: int
    parts: list[Part]
    facts: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    hashes: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Generation:
    """`seating`: all ranks to nodes; `node`: this store's. `pinned` while a checkpoint is written from it.

    `mirror`: what ranks of this node copy of other nodes' data, `mirrored` those that have done so.

    `abandoned`: it will not be committed, but what it holds stays readable.
    """

    step: int
    incarnation: int
    node: str
    seating: dict[int, str]
    groups: tuple[Group, ...] = ()
    state: State = State.COPYING
    members: dict[int, Member] = field(default_factory=dict)
    parity: Parity | None = None
    mirror: Mirror = field(default_factory=Mirror)
    mirrored: set[int] = field(default_factory=set)
    parity_over: bool = False
    checkpoint: bool = False
    pinned: bool = False
    abandoned: bool = False

    @property
    def world_size(self) -> int:
        return len(self.seating)

    @property
    def expected(self) -> frozenset[int]:
        """The ranks of this node."""
        return self.ranks_of(self.node)

    @property
    def group(self) -> Group | None:
        return next((group for group in self.groups if self.node in group.nodes), None)

    @property
    def over(self) -> bool:
        """Whether nothing more is to be done for it."""
        return self.abandoned or self.state is State.DROPPED

    def ranks_of(self, node: str) -> frozenset[int]:
        return frozenset(rank for rank, seat in self.seating.items() if seat == node)

    def advance(self, event: str) -> None:
        """Take a transition. Raises StoreError where the table has none."""
        target = TRANSITIONS.get((self.state, event))
        if target is None:
            raise StoreError(f"generation {self.step}: no {event} in state {self.state.value}")
        self.state = target

    def seal(self, rank: int) -> bool:
        """A member is hashed. True if it was the last of this node."""
        self.members[rank].sealed = True
        if self.state is State.COPYING and self.expected <= self.sealed_ranks():
            self.advance("members_sealed")
            return True
        return False

    def rebuilt(self) -> None:
        """A lost node's members were decoded into this store: readable, never to be committed here."""
        if self.state is State.COPYING:
            self.advance("members_sealed")
            self.abandoned = True

    def protect(self) -> bool:
        """Members are sealed and parity is over: true once, when both have come."""
        if self.state is State.SEALED and self.parity_over and not self.abandoned:
            self.advance("parity_over")
            return True
        return False

    def sealed_ranks(self) -> frozenset[int]:
        return frozenset(rank for rank, member in self.members.items() if member.sealed)

    def summary(self) -> dict[str, Any]:
        """What a driver must know of it: see `inventory`."""
        return {
            "step": self.step,
            "incarnation": self.incarnation,
            "seating": self.seating,
            "groups": [group.to_json() for group in self.groups],
            "ranks": sorted(self.sealed_ranks()),
            "parity": self.parity is not None and bool(self.parity.hashes),
            "committed": self.state is State.COMMITTED,
        }


class Generations:
    """All generations of a store, and which slot of a rank may be written next."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, int], Generation] = {}

    def __iter__(self) -> Iterator[Generation]:
        return iter(self._held.values())

    def get(self, step: int, incarnation: int) -> Generation | None:
        return self._held.get((step, incarnation))

    def open(self, generation: Generation) -> Generation:
        return self._held.setdefault((generation.step, generation.incarnation), generation)

    def drop(self, generation: Generation) -> None:
        generation.advance("drop")
        del self._held[generation.step, generation.incarnation]

    def commit(self, generation: Generation) -> None:
        """Commit, and drop everything that it replaces."""
        generation.advance("commit")
        for other in list(self._held.values()):
            replaced = other is not generation and (
                other.incarnation < generation.incarnation or other.step < generation.step
            )
            if replaced and not other.pinned:
                self.drop(other)

    def pending(self, incarnation: int) -> bool:
        """Whether a sealed generation of this incarnation still waits for its commit."""
        waiting = (State.SEALED, State.PROTECTED)
        return any(g.incarnation == incarnation and g.state in waiting and not g.abandoned for g in self._held.values())

    def begin_incarnation(self, incarnation: int) -> None:
        """Drop what was never sealed; what was sealed stays readable until something newer commits."""
        for generation in list(self._held.values()):
            if generation.state is State.COPYING and generation.incarnation != incarnation:
                self.drop(generation)
            elif generation.state in (State.SEALED, State.PROTECTED):
                generation.abandoned = True

    def slots_in_use(self) -> set[str]:
        """Slots of members and of parity."""
        members = {member.slot for g in self._held.values() for member in g.members.values()}
        return members | {g.parity.slot for g in self._held.values() if g.parity is not None}
