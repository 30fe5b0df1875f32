"""Hangs: ranks that neither end nor go on. Decided from what the driver hears of them, not by the ranks.

`Watch` is pure: what was heard and the time go in; out come the request to look at all stacks, and then the hang, or
nothing. What a silence means depends on what the rank is at: a step is held against the steps before it, the first
step of an incarnation, an evaluation and the wait for a checkpoint have limits of their own, and a process that the
kernel calls stopped is a hang wherever it stands. Only time in which this process ran and all agents answered counts,
so that a paused machine or a busy one is not taken for a hang.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from trainrt.diagnostics import hang as matching
from trainrt.diagnostics import verdict as diagnostics
from trainrt.launch.matching import verdict_by_stacks
from trainrt.launch.stacks import Finding, Stack, find_culprits
from trainrt.launch.symptoms import Hang, names
from trainrt.parallel.calls import Calls

STEPS = 3.0
"""A step may take so many times the 99th percentile of those before it."""
WINDOW = 256
FEW = 10
"""With fewer steps than this the first one counts, too: it is the longest."""
STARTING_SECONDS = 600.0
"""For each phase of coming up (a first corpus is tokenized, a checkpoint read), and for a first step of which nothing
is known. gloo gives up a rendezvous after 300 s by itself."""
FIRST_STEP_SECONDS = 10.0
FIRST_STEPS = 5.0
STORE_SECONDS = 90.0
"""A trainer waits at most 60 s for a commit; then it goes on without."""
LOOK_SECONDS, JUDGE_SECONDS = 1.2, 0.3
"""So long before the limit the stacks are taken; and, if they are there, the hang is declared."""
SHORT = 0.4
"""At most this share of a short limit goes by before and after the look."""
LOOK_EVERY_SECONDS = 0.05
LONGEST_LOOK_SECONDS = 0.5
"""What counts of the time between two looks: if there was more, it was this process that stood still."""


@dataclass(frozen=True, slots=True)
class Ask:
    """The stacks of all ranks are wanted; the answer carries the number."""

    number: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """A hang, what the stacks of all ranks say, and what their calls do (None: nothing)."""

    hang: Hang
    finding: Finding
    matched: matching.Finding | None = None

    def verdict(self, hosts: Mapping[int, str], *, step: int) -> diagnostics.Verdict:
        """In the words of diagnoses, after `step`."""
        found, hang = self.finding, self.hang
        if self.matched is not None:
            return matching.verdict_of(self.matched, hosts=hosts, places=found.places(), since_step=step)
        victims = tuple(rank for one in found.groups for rank in one.ranks if rank not in hang.ranks)
        return verdict_by_stacks(
            hang.ranks, victims, hang.message, hosts=hosts, stopped=found.cause == "stopped", step=step
        )


@dataclass(slots=True)
class _Rank:
    """What is known of a rank. `heard_at` and `stopped_at` are of the watch's own clock, the others of `time.monotonic()`."""

    heard_at: float
    heard: float
    phase: str = "starting"
    worth: float = 1.0
    stopped_at: float | None = None
    stopped: float = 0.0

    @property
    def alive(self) -> float:
        """Its last sign of life. In a phase that says nothing for long, that it was not stopped yet was one."""
        long_silence = self.stopped_at is not None and self.phase != "step"
        return max(self.heard, self.stopped) if long_silence else self.heard


@dataclass(slots=True)
class _Suspicion:
    number: int
    stacks: dict[int, Stack] = field(default_factory=dict)
    calls: dict[int, Calls] = field(default_factory=dict)


class Watch:
    """`least_seconds`: no silence shorter than this is a hang; 0: nothing is."""

    def __init__(self, *, least_seconds: float) -> None:
        self._least = least_seconds
        self._steps: deque[float] = deque(maxlen=WINDOW)
        self._slow = self._first = 0.0
        self._ranks: dict[int, _Rank] = {}
        self._stores: dict[str, float] = {}
        self._seats: Mapping[int, str] = {}
        self._clock = self._looked = self._last_step = 0.0
        self._extra = 0.0
        self._numbers = 0
        self._suspicion: _Suspicion | None = None

    def begin(self, seats: Mapping[int, str], now: float) -> None:
        """An incarnation was ordered. What is known of steps holds for the same number of ranks only."""
        if len(seats) != len(self._seats):
            self._steps.clear()
            self._slow = self._first = 0.0
        self._seats = dict(seats)
        self._looked = now
        self._extra, self._suspicion = 0.0, None
        self._ranks = {rank: _Rank(self._clock, now) for rank in seats}

    # What is heard.

    def heard(self, rank: int, message: Mapping[str, Any], now: float) -> None:
        """A rank said something: a sign of life, and perhaps a change of what it is at."""
        held = self._ranks.get(rank)
        if held is None:
            return
        held.heard_at, held.heard = self._clock, now
        match message["op"]:
            case "phase" if message["name"] == "restore":
                held.phase = "first_step"
            case "phase" if message["name"] == "first_step":
                self._first = max(self._first, message["seconds"])
            case "busy":
                held.phase, held.worth = message["name"], message["worth"]
            case "step":
                self._extra = 0.0
                if rank == 0:
                    self._stepped(usual=held.phase == "step")
                held.phase, held.worth = "step", 1.0
            case "finished" | "lost" | "error":
                held.phase = "done"

    def _stepped(self, *, usual: bool) -> None:
        """By the watch's own clock: a step is not slow because the machine was paused in it."""
        if usual:
            self._steps.append(self._clock - self._last_step)
            self._slow = slow(self._steps)
        self._last_step = self._clock

    def stopped(self, rank: int, stopped: bool, now: float) -> None:
        """The kernel says that a rank's process is stopped (SIGSTOP), or goes on."""
        held = self._ranks.get(rank)
        if held is not None and (held.stopped_at is None) is stopped:
            held.stopped_at, held.stopped = self._clock if stopped else None, now

    def store_stopped(self, node: str, stopped: bool) -> bool:
        """The same of a store; whether it has been stopped for so long that it counts as dead."""
        if not stopped:
            self._stores.pop(node, None)
            return False
        since = self._stores.setdefault(node, self._clock)
        if not self._least or self._clock - since < self._least - JUDGE_SECONDS:
            return False
        del self._stores[node]
        return True

    def stacks(self, number: int, stacks: Mapping[int, Stack], calls: Mapping[int, Calls] | None = None) -> None:
        """An agent's answer to a request. `calls`: the last collective calls of the same ranks."""
        if self._suspicion is not None and self._suspicion.number == number:
            self._suspicion.stacks.update(stacks)
            self._suspicion.calls.update(calls or {})

    # What follows from it.

    def limit(self) -> float:
        """Seconds of silence that the slowest phase of any rank allows now."""
        return max((self._limit(held) for held in self._ranks.values()), default=math.inf) + self._extra

    def _limit(self, held: _Rank) -> float:
        match held.phase:
            case "starting":
                return STARTING_SECONDS
            case "first_step":
                return max(FIRST_STEP_SECONDS, FIRST_STEPS * self._first) if self._first else STARTING_SECONDS
            case "checkpoint":
                return math.inf
            case "done":
                return 0.0
        step = self._slow if len(self._steps) >= FEW else max(self._slow, self._first)
        return max(self._least, STEPS * step * held.worth)

    def look(self, now: float, *, completed: int, agents_answer: bool) -> Ask | Verdict | None:
        """What is to be done now. To be called often; `completed` steps are named in the message."""
        if now - self._looked < LOOK_EVERY_SECONDS:
            return None
        if agents_answer:
            self._clock += min(now - self._looked, LONGEST_LOOK_SECONDS)
        self._looked = now
        if not self._least:
            return None
        left, limit = self._left()
        ahead = min(1.0, SHORT * limit / LOOK_SECONDS)
        if left > LOOK_SECONDS * ahead:
            self._suspicion = None
            return None
        if self._suspicion is None:
            self._numbers += 1
            self._suspicion = _Suspicion(self._numbers)
            return Ask(self._numbers)
        complete = self._suspicion.stacks.keys() >= self._ranks.keys()
        if left > (JUDGE_SECONDS * ahead if complete else 0.0):
            return None
        return self._judge(self._suspicion, now, completed=completed)

    def _left(self) -> tuple[float, float]:
        """Seconds until the first limit is reached, and that limit."""
        active = [held for held in self._ranks.values() if held.phase != "done"]
        limit = self.limit()
        lefts = [(limit - (self._clock - held.heard_at), limit) for held in active]
        stops = [held.stopped_at for held in active if held.stopped_at is not None]
        lefts += [(self._least - (self._clock - since), self._least) for since in stops]
        return min(lefts, default=(math.inf, math.inf))

    def _judge(self, suspicion: _Suspicion, now: float, *, completed: int) -> Verdict | None:
        active = {rank: held for rank, held in self._ranks.items() if held.phase != "done"}
        found = find_culprits({rank: suspicion.stacks.get(rank, Stack("")) for rank in active})
        if found.cause == "store" and not self._extra:
            self._extra, self._suspicion = STORE_SECONDS, None
            return None
        matched = _match(found, suspicion.calls, active)
        ranks = matched.culprits if matched is not None else found.culprits or tuple(active)
        if matched is not None and set(ranks) != set(found.culprits or active):
            found = replace(found, culprits=ranks, cause="matched")
        seconds = max(now - active[rank].alive for rank in ranks)
        message = _message(found, ranks, self._seats, seconds=seconds, completed=completed)
        if matched is not None:
            message += f"; {matching.sentence(matched, hosts=self._seats, places=found.places())}"
        first = next(one.stack for one in found.groups if set(one.ranks) & set(ranks))
        signature = None if found.cause == "stopped" else f"worker_hang {ranks} {first.top()}"
        return Verdict(Hang(ranks, message, seconds, signature), found, matched)


def _match(found: Finding, calls: Mapping[int, Calls], active: Collection[int]) -> matching.Finding | None:
    """What the calls say; nothing where they accuse others than a stopped process, or ranks that are done."""
    stopped = found.culprits if found.cause == "stopped" else ()
    matched = matching.find(calls, stopped=stopped)
    if (
        matched is None
        or (stopped and set(matched.culprits) != set(stopped))
        or not set(matched.culprits) <= set(active)
    ):
        return None
    return matched


def slow(steps: Sequence[float]) -> float:
    """The 99th percentile of steps' seconds."""
    return sorted(steps)[math.ceil(0.99 * len(steps)) - 1]


def _message(
    found: Finding, ranks: tuple[int, ...], seats: Mapping[int, str], *, seconds: float, completed: int
) -> str:
    """Who hangs, since when, in what; and where the others wait."""
    doing = {
        "stopped": "stopped (SIGSTOP) in",
        "elsewhere": "in",
        "minority": "alone in",
        "alike": "deadlocked, none differs from the others, in",
        "store": "waiting for the store in",
        "matched": "in",
    }[found.cause]
    blamed = [one for one in found.groups if set(one.ranks) & set(ranks)]
    where = "; ".join(f"{doing} {one.stack.top()}" for one in blamed[:3])
    message = f"{names(ranks, seats)} made no progress for {seconds:.1f} s after step {completed}: {where}"
    waiting = [one for one in found.groups if not set(one.ranks) & set(ranks)]
    if waiting:
        count = sum(len(one.ranks) for one in waiting)
        message += f"; {count} rank{'s wait' if count > 1 else ' waits'} in {waiting[0].stack.top(1)}"
    return message
