"""A generation on one store: the state machine of the commit protocol (docs/recovery.md).

A generation is the state of one step over all ranks. A store holds the members of its own node's
ranks; it is usable when every rank's member is sealed in some live store.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from trainrt.errors import StoreError


class State(Enum):
    """COPYING: trainers write. SEALED: every local member is hashed. COMMITTED: so is every rank's elsewhere."""

    COPYING = "copying"
    SEALED = "sealed"
    COMMITTED = "committed"
    DROPPED = "dropped"


TRANSITIONS: dict[tuple[State, str], State] = {
    (State.COPYING, "members_sealed"): State.SEALED,
    (State.COPYING, "drop"): State.DROPPED,
    (State.SEALED, "commit"): State.COMMITTED,
    (State.SEALED, "drop"): State.DROPPED,
    (State.COMMITTED, "drop"): State.DROPPED,
}


@dataclass(slots=True)
class Member:
    """One rank's part: its slot, how its bytes are laid out, and (once sealed) their checksums."""

    rank: int
    slot: str
    bytes: int
    layout: list[dict[str, Any]]
    hashes: list[int] | None = None
    metadata: dict[str, Any] | None = None


@dataclass(slots=True)
class Generation:
    """`expected`: ranks of this node; `world_size`: of all. `pinned` while a checkpoint is written from it."""

    step: int
    incarnation: int
    world_size: int
    expected: frozenset[int]
    state: State = State.COPYING
    members: dict[int, Member] = field(default_factory=dict)
    checkpoint: bool = False
    pinned: bool = False
    abandoned: bool = False

    def advance(self, event: str) -> None:
        """Take a transition. Raises StoreError where the table has none."""
        target = TRANSITIONS.get((self.state, event))
        if target is None:
            raise StoreError(f"generation {self.step}: no {event} in state {self.state.value}")
        self.state = target

    def seal(self, rank: int, hashes: list[int], metadata: dict[str, Any] | None) -> bool:
        """A member is hashed. True if it was the last of this node."""
        member = self.members[rank]
        member.hashes, member.metadata = hashes, metadata
        if self.sealed_ranks() == self.expected:
            self.advance("members_sealed")
            return True
        return False

    def sealed_ranks(self) -> frozenset[int]:
        return frozenset(rank for rank, member in self.members.items() if member.hashes is not None)

    def summary(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "incarnation": self.incarnation,
            "world_size": self.world_size,
            "ranks": sorted(self.sealed_ranks()),
            "committed": self.state is State.COMMITTED,
        }


class Generations:
    """All generations of a store, and which slot of a rank may be written next."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, int], Generation] = {}

    def __iter__(self) -> Any:
        return iter(self._held.values())

    def get(self, step: int, incarnation: int) -> Generation | None:
        return self._held.get((step, incarnation))

    def find(self, step: int) -> Generation | None:
        """The newest incarnation's generation of a step that has a sealed member."""
        found = [g for g in self._held.values() if g.step == step and g.sealed_ranks()]
        return max(found, key=lambda g: g.incarnation, default=None)

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
        return any(
            g.incarnation == incarnation and g.state is State.SEALED and not g.abandoned for g in self._held.values()
        )

    def begin_incarnation(self, incarnation: int) -> None:
        """Drop what was never sealed; what was sealed stays readable until something newer commits."""
        for generation in list(self._held.values()):
            if generation.state is State.COPYING and generation.incarnation != incarnation:
                self.drop(generation)
            elif generation.state is State.SEALED:
                generation.abandoned = True

    def slots_in_use(self, rank: int) -> set[str]:
        return {g.members[rank].slot for g in self._held.values() if rank in g.members}
