"""Hangs by matching collectives: who is missing from which call, whose call differs, or who waits for whom in a circle.

Pure: in go the last calls of every rank (`parallel/calls.py`) and what their stacks say, out comes a finding or nothing.
Calls are matched over their group by number. A mismatch is said before anything that may follow from it; a rank that is
missing from one call because it waits in another is not to blame, whoever is at the end of the chain is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod

from trainrt.diagnostics.verdict import Culprit, Verdict
from trainrt.parallel.calls import Call, Calls, Membership

SHOWN = 4
CERTAIN, LIKELY, PERHAPS = 0.95, 0.8, 0.5

Key = tuple[str, tuple[int, ...]]
"""A group: its name alone may be taken twice, by ranks that never meet."""
Differs = Callable[[Mapping[int, Call]], bool]


@dataclass(frozen=True, slots=True)
class Made:
    """A call and who made it. group: its name; awaits: of a deadlock, the rank that it waits for."""

    rank: int
    call: Call
    group: str
    awaits: int | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """Why ranks hang. kind: missing, mismatch or deadlock.

    culprits: missing from the call, or calling otherwise than most, or in the circle (all, where none is told from the
    others). victims: wait for them. made: the awaited call; or one call of each kind, the usual one first; or the waits of
    the circle, earliest first. left_out: the call that a rank with a mismatched one should have made before it, as it did
    earlier. inside: what culprits that are missing wait in. notes: what else is known, for the evidence.
    """

    kind: str
    culprits: tuple[int, ...]
    victims: tuple[int, ...]
    made: tuple[Made, ...]
    confidence: float
    left_out: Call | None = None
    inside: Mapping[int, Call] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def find(calls: Mapping[int, Calls], *, stopped: Collection[int] = ()) -> Finding | None:
    """What the calls of all ranks say; None where they say nothing. `stopped`: ranks whose processes the kernel stopped."""
    table = _Table(calls)
    return (
        _mismatch(table, differs=_differs, confidence=CERTAIN)
        or _waits(table, stopped=stopped)
        or _mismatch(table, differs=_differs_in_shape, confidence=PERHAPS)
    )


class _Table:
    """All calls by group and number."""

    def __init__(self, calls: Mapping[int, Calls]) -> None:
        self.calls = calls
        self.groups: dict[Key, Membership] = {}
        self.entered: dict[tuple[Key, int], int] = {}
        self.made: dict[Key, dict[int, dict[int, Call]]] = {}
        for rank, log in sorted(calls.items()):
            keys = {name: (name, one.members) for name, one in log.groups.items()}
            for name, one in log.groups.items():
                self.groups.setdefault(keys[name], one)
                self.entered[keys[name], rank] = one.entered
            for call in log.calls:
                if call.collective and call.group in keys:
                    self.made.setdefault(keys[call.group], {}).setdefault(call.number, {})[rank] = call

    def missing(self, key: Key, number: int) -> list[int]:
        """Members that have not made a call yet, as far as their logs are known."""
        return [rank for rank in key[1] if rank in self.calls and self.entered.get((key, rank), 0) < number]

    def key(self, rank: int, call: Call) -> Key:
        return call.group, self.calls[rank].groups[call.group].members


# Calls that differ.


def _mismatch(table: _Table, *, differs: Differs, confidence: float) -> Finding | None:
    """The first call, by its number in its group and then by time, that not all members make alike."""
    firsts = []
    for key, numbers in table.made.items():
        for number in sorted(numbers):
            ranks = numbers[number]
            if len(ranks) > 1 and differs(ranks):
                firsts.append((min(call.entered for call in ranks.values()), key, number))
                break
    if not firsts:
        return None
    _, key, number = min(firsts)
    return _odd_ones(table, key, table.made[key][number], confidence=confidence)


def _differs(ranks: Mapping[int, Call]) -> bool:
    """Whether data cannot pass as meant: another type, reduction, root, dtype or size."""
    return len({_signature(call) for call in ranks.values()}) > 1


def _differs_in_shape(ranks: Mapping[int, Call]) -> bool:
    return len({(_signature(call), _shapes(call)) for call in ranks.values()}) > 1


def _signature(call: Call) -> tuple[str, str, str, str]:
    """What must be equal on all members. The parts of an exchange may have any size."""
    if call.kind == "all_to_all" and call.detail:
        return call.kind, "uneven", call.dtypes, ""
    return call.kind, call.detail, call.dtypes, _elements(call.shapes)


def _shapes(call: Call) -> str:
    return "" if call.kind == "all_to_all" else call.shapes


def _elements(shapes: str) -> str:
    """Element counts, of "2*4x3" 2*12."""
    found = []
    for part in shapes.split(",") if shapes else ():
        count, _, shape = part.rpartition("*")
        sizes = shape.split("x")
        if not all(size.isdigit() for size in sizes):
            # Cut off in the log.
            return ""
        found.append(f"{count}*{prod(map(int, sizes))}")
    return ",".join(found)


def _odd_ones(table: _Table, key: Key, ranks: Mapping[int, Call], *, confidence: float) -> Finding:
    """Those whose call is not what most call; all, where no call is more usual than another."""
    kinds: dict[object, list[int]] = {}
    for rank, call in sorted(ranks.items()):
        kinds.setdefault((_signature(call), _shapes(call)) if confidence == PERHAPS else _signature(call), []).append(
            rank
        )
    sides = sorted(kinds.values(), key=lambda side: (-len(side), side))
    decided = len(sides[0]) > len(sides[1])
    odd = [rank for side in sides[1:] for rank in side] if decided else [rank for side in sides for rank in side]
    left_out = _left_out(table, key, usual=(sides[0][0], ranks[sides[0][0]]), odd=ranks[sides[1][0]])
    if left_out is None and not decided:
        # Either side may be the one that left something out.
        left_out = _left_out(table, key, usual=(sides[1][0], ranks[sides[1][0]]), odd=ranks[sides[0][0]])
        if left_out is not None:
            sides = [sides[1], sides[0], *sides[2:]]
    if left_out is not None:
        odd = sides[1]
    made = tuple(Made(side[0], ranks[side[0]], table.groups[key].name) for side in sides)
    victims = tuple(rank for rank in key[1] if rank not in odd)
    return Finding("mismatch", tuple(sorted(odd)), victims, made, confidence, left_out=left_out)


def _left_out(table: _Table, key: Key, *, usual: tuple[int, Call], odd: Call) -> Call | None:
    """The usual call, where it was followed by the odd one before: whoever makes the odd one now did not make it."""
    rank, call = usual
    history = [numbers[rank] for _, numbers in sorted(table.made[key].items()) if rank in numbers]
    for before, after in pairwise(history):
        if after.number < call.number and _alike(before, call) and _alike(after, odd):
            return call
    return None


def _alike(one: Call, other: Call) -> bool:
    """The same line of the program."""
    return (one.group, one.kind, one.site) == (other.group, other.kind, other.site)


# Calls that are not made.


@dataclass(frozen=True, slots=True)
class _Wait:
    rank: int
    call: Call
    key: Key
    missing: tuple[int, ...]


def _waits(table: _Table, *, stopped: Collection[int]) -> Finding | None:
    """Follow who waits for whom: to ranks that wait for nobody, or around a circle."""
    waits = sorted(_all_waits(table), key=lambda wait: (wait.call.entered, wait.rank))
    if not waits:
        return None
    by_rank: dict[int, _Wait] = {}
    for wait in waits:
        by_rank.setdefault(wait.rank, wait)
    inside = {rank: calls[-1] for rank, log in table.calls.items() if (calls := log.inside())}
    for wait in waits:
        roots = [rank for rank in wait.missing if rank not in by_rank and not _in_collective(inside.get(rank))]
        if roots:
            return _missing(table, wait, roots, waits, inside, stopped=stopped)
    return _circle(table, by_rank, inside)


def _all_waits(table: _Table) -> Iterable[_Wait]:
    """The calls in which ranks wait for members that have not made them.

    On an accelerator the calls are queued, and the one who queues them waits elsewhere: then the first one counts that
    somebody has not made.
    """
    for rank, log in table.calls.items():
        inside = log.inside()
        blocked = [call for call in inside if call.collective and call.group in log.groups]
        queued = [call for call in log.calls if call.collective and call.group in log.groups] if not inside else []
        for call in blocked or queued:
            key = table.key(rank, call)
            missing = table.missing(key, call.number)
            if missing:
                yield _Wait(rank, call, key, tuple(missing))
                if not blocked:
                    break


def _in_collective(call: Call | None) -> bool:
    return call is not None and call.collective


def _missing(
    table: _Table, wait: _Wait, roots: Sequence[int], waits: Sequence[_Wait], inside: Mapping[int, Call],
    *, stopped: Collection[int],
) -> Finding:  # fmt: skip
    """Ranks that wait for nobody are missing from a call. Where those are most, one that parted from them is to blame."""
    parted = _parted(table, wait.key)
    culprits = tuple(sorted(roots))
    waiting = [rank for rank in wait.key[1] if rank not in wait.missing]
    if parted is not None and len(roots) > len(waiting) and set(parted[0]) <= set(waiting):
        culprits = parted[0]
    victims = tuple(sorted({*waiting, *(other.rank for other in waits)} - set(culprits)))
    notes = [parted[1]] if parted is not None else []
    notes += [
        f"rank {other.rank} waits in {other.call} at {other.call.place} for ranks that wait themselves"
        for other in waits
        if other.key != wait.key and not set(other.missing) & set(roots)
    ][:SHOWN]
    confidence = CERTAIN if set(culprits) <= set(stopped) or parted is None else LIKELY
    return Finding(
        "missing", culprits, victims, (Made(wait.rank, wait.call, table.groups[wait.key].name),), confidence,
        inside={rank: inside[rank] for rank in culprits if rank in inside}, notes=tuple(notes),
    )  # fmt: skip


def _parted(table: _Table, key: Key) -> tuple[tuple[int, ...], str] | None:
    """The first call of a group that some ranks make at another line than most, after calls that all made at the same, and
    that they never made so before: sizes are equal, so data passed, to the wrong place.
    """
    together, seen = False, set()
    for _, ranks in sorted(table.made[key].items()):
        sites = Counter(call.site for call in ranks.values())
        if len(ranks) < 2:
            continue
        if len(sites) == 1:
            together = True
            continue
        pair = tuple(sorted(sites))
        (usual, most), (_, others) = sites.most_common(2)
        if together and most > others and pair not in seen:
            odd = {rank: call for rank, call in ranks.items() if call.site != usual}
            rank, call = min(odd.items())
            other = next(one for one in ranks.values() if one.site == usual)
            text = f"calls part at number {call.number}: rank {rank} at {call.place}, most others at {other.place}"
            return tuple(sorted(odd)), text
        seen.add(pair)
    return None


def _circle(table: _Table, by_rank: Mapping[int, _Wait], inside: Mapping[int, Call]) -> Finding | None:
    """Ranks that wait for each other. None where the chain ends inside of a call that all its members are in."""
    chain: list[int] = []
    at: int | None = min(by_rank.values(), key=lambda wait: wait.call.entered).rank
    while at is not None and at not in chain:
        chain.append(at)
        at = next((rank for rank in by_rank[at].missing if rank in by_rank), None)
    if at is None:
        return None
    circle = sorted((by_rank[rank] for rank in chain[chain.index(at) :]), key=lambda wait: wait.call.entered)
    ranks = tuple(sorted(wait.rank for wait in circle))
    strayed = tuple(rank for rank in ranks if _strays(table.calls[rank], by_rank[rank].call))
    culprits = strayed if 0 < len(strayed) < len(ranks) else ranks
    victims = tuple(sorted({*inside} - set(culprits)))
    made = tuple(
        Made(wait.rank, wait.call, table.groups[wait.key].name, next(rank for rank in wait.missing if rank in ranks))
        for wait in circle
    )
    return Finding("deadlock", culprits, victims, made, CERTAIN)


def _strays(log: Calls, call: Call) -> bool:
    """Whether a rank made a call after one that was followed by other calls whenever it was made before."""
    calls = [one for one in log.calls if one.collective]
    at = next(index for index, one in enumerate(calls) if one.order == call.order)
    if at == 0:
        return False
    followed = [after for before, after in pairwise(calls[:at]) if _alike(before, calls[at - 1])]
    return bool(followed) and not any(_alike(after, call) for after in followed)


# In words.


def verdict_of(
    finding: Finding,
    *,
    hosts: Mapping[int, str],
    places: Mapping[int, str] | None = None,
    since_step: int | None = None,
) -> Verdict:
    """The finding as a verdict. hosts: of each rank; places: the innermost frames of each rank's stack, in one line.

    Only a rank that is missing and waits in no call itself may be there because of its machine: it is to be evicted.
    """
    evict = finding.kind == "missing" and not finding.inside and finding.confidence == CERTAIN
    return Verdict(
        cause="mismatched_collective" if finding.kind == "mismatch" else "hang", kind="rank" if evict else "code",
        culprits=[Culprit(rank, hosts.get(rank)) for rank in finding.culprits], victims=list(finding.victims),
        share=1.0, seconds_a_step=0.0, cost_device_hours=0.0, action="evict" if evict else "none",
        confidence=finding.confidence, sentence=sentence(finding, hosts=hosts, places=places or {}),
        evidence=evidence(finding, places or {}), since_step=since_step,
    )  # fmt: skip


def sentence(finding: Finding, *, hosts: Mapping[int, str], places: Mapping[int, str]) -> str:
    """What was found, in one sentence."""
    match finding.kind:
        case "mismatch":
            return _say_mismatch(finding, hosts)
        case "deadlock":
            return _say_deadlock(finding, hosts)
    first = finding.made[0]
    call, which = first.call, f"call {first.call.number} of group {first.group}"
    who = _ranks(finding.culprits, hosts)
    if first.rank in finding.culprits:
        return f"{who} went on to {call} at {call.place}, {which}, which nobody else makes"
    said = f"{who} missing from {call}, {which}, where rank {first.rank} waits at {call.place}"
    culprit = finding.culprits[0]
    if culprit in finding.inside:
        return f"{said}; rank {culprit} is in {finding.inside[culprit]} at {finding.inside[culprit].place}"
    return f"{said}; rank {culprit} is in {places[culprit]}" if culprit in places else said


def _say_mismatch(finding: Finding, hosts: Mapping[int, str]) -> str:
    first = finding.made[0]
    calls = ", ".join(f"rank {one.rank} calls {one.call} at {one.call.place}" for one in finding.made[:SHOWN])
    said = f"call {first.call.number} of group {first.group} differs: {calls}"
    if finding.left_out is None:
        return said
    who = _ranks(finding.culprits, hosts)
    return f"{said}; {who} left out {finding.left_out.kind} at {finding.left_out.place}, which comes before it"


def _say_deadlock(finding: Finding, hosts: Mapping[int, str]) -> str:
    waits = ", ".join(
        f"rank {one.rank} waits for rank {one.awaits} in {one.call} at {one.call.place}, "
        f"call {one.call.number} of group {one.group}"
        for one in finding.made
    )
    said = f"deadlock, the first wait first: {waits}"
    if len(finding.culprits) == len(finding.made):
        return said
    return f"{said}; {_ranks(finding.culprits, hosts)} made another call here before"


def _ranks(ranks: Sequence[int], hosts: Mapping[int, str]) -> str:
    shown = ", ".join(f"{rank} ({hosts[rank]})" if rank in hosts else str(rank) for rank in ranks[:SHOWN])
    more = f" and {len(ranks) - SHOWN} more" if len(ranks) > SHOWN else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{more}"


def evidence(finding: Finding, places: Mapping[int, str]) -> list[str]:
    """Each call with its whole path, what else is known, and where the culprits are."""
    lines = [
        f"rank {one.rank}: {one.call}, number {one.call.number}, {one.call.state}, {one.call.site}"
        for one in finding.made
    ]
    lines += [f"rank {rank} is in {call}, {call.state}, {call.site}" for rank, call in finding.inside.items()]
    if finding.left_out is not None:
        lines.append(f"left out: {finding.left_out}, {finding.left_out.site}")
    return [*lines, *finding.notes, *(f"rank {rank}: {places[rank]}" for rank in finding.culprits if rank in places)]
