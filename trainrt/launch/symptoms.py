"""From symptoms to a fault: which ranks ended, erred or lost their peers, and what that amounts to.

Pure: no process, no file, no clock of its own. One fault comes out of many symptoms, because a death
is heard of from everybody who talked to the dead.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

SURVIVABLE = ("worker_exit", "worker_hang", "node_loss", "network", "user_error", "storage")
FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')
ADDRESSES = re.compile(r"0x[0-9a-f]+|:\d{4,5}\b")


@dataclass(frozen=True, slots=True)
class Error:
    """What a worker reported before it parked. `rollback`: the step is to be done again from what is believed; `ranks`
    are to blame, where that is not who reported it.
    """

    kind: str
    message: str
    traceback: str = ""
    rollback: bool = False
    ranks: tuple[int, ...] = ()

    @property
    def where(self) -> str:
        """The innermost frame, " (file.py:12 in name)", or nothing."""
        frames = FRAME.findall(self.traceback)
        if not frames:
            return ""
        path, line, name = frames[-1]
        return f" ({path.rpartition('/')[2]}:{line} in {name})"


@dataclass(frozen=True, slots=True)
class Exit:
    """How a worker's process ended. `code` is negative for a signal, None where nobody saw it; `why`: if it is known."""

    code: int | None
    age_seconds: float
    why: str | None = None

    def __str__(self) -> str:
        if self.why is not None:
            return self.why
        if self.code is None:
            return "ended"
        if self.code < 0:
            return f"was killed by {signal.Signals(-self.code).name}"
        return f"exited with code {self.code}"


@dataclass(frozen=True, slots=True)
class Fault:
    """What went wrong. `signature` is equal for a fault that repeats itself, None where that says nothing."""

    kind: str
    message: str
    ranks: tuple[int, ...]
    nodes: tuple[str, ...]
    signature: str | None
    detected_seconds: float
    action: str = "restart"

    @property
    def survivable(self) -> bool:
        return self.kind in SURVIVABLE or self.action == "rollback"


@dataclass(frozen=True, slots=True)
class Hang:
    """Ranks that are ended because they neither end nor go on. `signature` is None where it came from outside (SIGSTOP);
    `seconds` since their last sign of life.
    """

    ranks: tuple[int, ...]
    message: str
    seconds: float
    signature: str | None


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A collective call that ranks made differently, as their logs of calls say: what a crash or an error came of."""

    ranks: tuple[int, ...]
    sentence: str
    signature: str


@dataclass(slots=True)
class Symptoms:
    """What is known since the first sign of a fault. `seats` are the nodes of the ranks."""

    seats: Mapping[int, str]
    exits: dict[int, Exit] = field(default_factory=dict)
    errors: dict[int, Error] = field(default_factory=dict)
    parked: dict[int, str] = field(default_factory=dict)
    nodes: dict[str, tuple[str, float]] = field(default_factory=dict)
    ended_by_us: set[int] = field(default_factory=set)
    hang: Hang | None = None
    mismatch: Mismatch | None = None

    def unaccounted(self) -> list[int]:
        """Ranks that nothing is known of, still at work or stuck, and those whose end was ordered and has not come."""
        said = (self.errors.keys() | self.parked.keys()) - self.ended_by_us
        return [
            rank for rank, node in self.seats.items()
            if rank not in self.exits and rank not in said and node not in self.nodes
        ]  # fmt: skip

    @property
    def explained(self) -> bool:
        """Whether something is known that can be the cause, not only that peers were lost."""
        return bool(self.hang or self.errors or self.nodes or set(self.exits) - self.ended_by_us)

    @property
    def concerns_nodes(self) -> bool:
        """Whether it may well be a node that is at fault, not only what ran on it."""
        only_lost_peers = bool(self.parked) and not self.explained and not self.unaccounted()
        return bool(self.nodes or self.hang or self.ended_by_us) or only_lost_peers

    def fault(self) -> Fault:
        """The cause, from the strongest symptom to the weakest; and a mismatched call, which may have led to it."""
        fault, found = self._fault(), self.mismatch
        if found is None:
            return fault
        # Whoever lost a connection lost it to a crash, or to the mismatch itself.
        kind = "user_error" if fault.kind == "network" else fault.kind
        message, nodes = f"{fault.message}; {found.sentence}", self._nodes_of(found.ranks)
        return replace(fault, kind=kind, message=message, ranks=found.ranks, nodes=nodes, signature=found.signature)

    def _fault(self) -> Fault:
        if self.nodes:
            return self._node_loss()
        if self.hang is not None:
            hang = self.hang
            nodes = self._nodes_of(hang.ranks)
            return Fault("worker_hang", hang.message, hang.ranks, nodes, hang.signature, hang.seconds)
        if self.errors:
            return self._error()
        exits = {rank: how for rank, how in sorted(self.exits.items()) if rank not in self.ended_by_us}
        if exits:
            return self._exit(exits)
        hung = tuple(sorted(self.ended_by_us))
        if hung:
            message = f"{self._names(hung)} answered no more while peers timed out, and was ended"
            return Fault("worker_hang", message, hung, self._nodes_of(hung), None, 0.0)
        first = min(self.parked, default=0)
        message = f"{self._names((first,))} lost its peers: {self.parked.get(first, '')}"
        return Fault("network", message, tuple(sorted(self.parked)), self._nodes_of(self.parked), None, 0.0)

    def _node_loss(self) -> Fault:
        nodes = tuple(sorted(self.nodes))
        ranks = tuple(rank for rank, node in sorted(self.seats.items()) if node in self.nodes)
        why, age = self.nodes[nodes[0]]
        return Fault("node_loss", f"node {', '.join(nodes)} is lost: {why}", ranks, nodes, None, age)

    def _error(self) -> Fault:
        first = min(self.errors)
        error = self.errors[first]
        same = tuple(sorted(rank for rank, other in self.errors.items() if other.message == error.message))
        kind = {"runtime": "storage"}.get(error.kind, error.kind)
        signature = ADDRESSES.sub("", f"{kind} {error.message}")
        ranks = error.ranks or same
        message = f"{self._names(ranks)}: {error.message}{error.where}"
        action = "rollback" if error.rollback else "restart"
        return Fault(kind, message, ranks, self._nodes_of(ranks), signature, 0.0, action)

    def _exit(self, exits: dict[int, Exit]) -> Fault:
        ranks = tuple(exits)
        how = exits[ranks[0]]
        # SIGKILL comes from outside; whatever else ends a process may well come from what it computes.
        signature = None if how.code in (None, -signal.SIGKILL) else f"worker_exit {ranks[0]} {how.code}"
        age = max(exit.age_seconds for exit in exits.values())
        return Fault("worker_exit", f"{self._names(ranks)} {how}", ranks, self._nodes_of(ranks), signature, age)

    def _nodes_of(self, ranks: Mapping[int, str] | tuple[int, ...]) -> tuple[str, ...]:
        return tuple(sorted({self.seats[rank] for rank in ranks}))

    def _names(self, ranks: tuple[int, ...]) -> str:
        return names(ranks, self.seats)


def names(ranks: tuple[int, ...], seats: Mapping[int, str]) -> str:
    """Ranks with their nodes, for messages."""
    shown = ", ".join(f"{rank} ({seats[rank]})" for rank in ranks[:4])
    more = f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{more}"
