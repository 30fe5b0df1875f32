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
By = Callable[[Call], tuple[str, ...]]
"""What is compared of calls."""


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
        _mismatch(table, by=_signature, confidence=CERTAIN)
        or _waits(table, stopped=stopped)
        or _mismatch(table, by=_with_shape, confidence=PERHAPS)
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

    def awaited(self, rank: int, call: Call, key: Key) -> list[int]:
        """Who has not made their part of a call: members of a collective, the peer of a message."""
        if call.collective:
            return self.missing(key, call.number)
        there, back = ("send", "to") if call.kind == "recv" else ("recv", "from")
        peer = key[1][int(call.detail.split()[1])]
        if peer not in self.calls:
            return []
        part = (key[0], there, f"{back} {key[1].index(rank)}")
        done = [one.number for one in self.calls[peer].calls if (one.group, one.kind, one.detail) == part]
        return [peer] if max(done, default=0) < call.number else []

    def history(self, key: Key, rank: int, number: int) -> list[Call]:
        """The calls of a rank in a group before this one, as far as its log goes."""
        return [ranks[rank] for one, ranks in sorted(self.made[key].items()) if one < number and rank in ranks]

    def key(self, rank: int, call: Call) -> Key:
        return call.group, self.calls[rank].groups[call.group].members


# Calls that differ.


def _mismatch(table: _Table, *, by: By, confidence: float) -> Finding | None:
    """The first call, by its number in its group and then by time, that not all members make alike."""
    firsts = []
    for key, numbers in table.made.items():
        for number in sorted(numbers):
            ranks = numbers[number]
            if len({by(call) for call in ranks.values()}) > 1:
                firsts.append((min(call.entered for call in ranks.values()), key, number))
                break
    if not firsts:
        return None
    _, key, number = min(firsts)
    return _odd_ones(table, key, number, by=by, confidence=confidence)


def _signature(call: Call) -> tuple[str, str, str, str]:
    """Type, root, dtype and size: what must be equal on all members for data to pass. The parts of an exchange may differ."""
    if call.kind == "all_to_all" and call.detail:
        return call.kind, "uneven", call.dtypes, ""
    return call.kind, call.detail, call.dtypes, _elements(call.shapes)


def _with_shape(call: Call) -> tuple[str, ...]:
    """The same and the shape: of equal size data does pass."""
    return *_signature(call), "" if call.kind == "all_to_all" else call.shapes


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


def _odd_ones(table: _Table, key: Key, number: int, *, by: By, confidence: float) -> Finding:
    """Those whose call is not what most call, or, of as many, not what they called here before; else all."""
    ranks = table.made[key][number]
    kinds: dict[tuple[str, ...], list[int]] = {}
    for rank, call in sorted(ranks.items()):
        kinds.setdefault(by(call), []).append(rank)
    histories = {rank: table.history(key, rank, number) for rank in ranks}
    weights = {side[0]: (len(side), _as_before(histories[side[0]], ranks[side[0]])) for side in kinds.values()}
    usual, *others = sorted(kinds.values(), key=lambda side: weights[side[0]], reverse=True)
    decided = weights[usual[0]] > weights[others[0][0]]
    odd = tuple(sorted(rank for side in others for rank in side)) if decided else tuple(sorted(ranks))
    made = tuple(Made(side[0], ranks[side[0]], table.groups[key].name) for side in (usual, *others))
    left_out = None
    if decided and len(others) == 1 and _followed(histories[usual[0]], ranks[usual[0]], ranks[odd[0]]):
        left_out = ranks[usual[0]]
    victims = tuple(rank for rank in key[1] if rank not in odd)
    return Finding("mismatch", odd, victims, made, confidence, left_out=left_out)


def _as_before(history: Sequence[Call], call: Call) -> int:
    """Whether a rank made this call after its last one before: 1 yes, -1 always others, 0 there was no before."""
    if not history:
        return 0
    after = [after for before, after in pairwise(history) if _alike(before, history[-1])]
    return (1 if any(_alike(one, call) for one in after) else -1) if after else 0


def _followed(history: Sequence[Call], call: Call, odd: Call) -> bool:
    """Whether the odd call came after this one before: then who makes it now has left this one out."""
    return any(_alike(before, call) and _alike(after, odd) for before, after in pairwise(history))


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
    """The calls in which ranks wait for others that have not made theirs.

    On an accelerator the calls are queued, and the one who queues them waits elsewhere: then the first one counts that
    somebody has not made.
    """
    for rank, log in table.calls.items():
        inside = [call for call in log.inside() if call.group in log.groups]
        queued = [call for call in log.calls if call.collective and call.group in log.groups]
        waits = [
            _Wait(rank, call, key, tuple(missing))
            for call in inside or queued
            if (missing := table.awaited(rank, call, key := table.key(rank, call)))
        ]
        yield from waits if inside else waits[:1]


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
    """Whether a rank made a call after one that was always followed by others before."""
    return _as_before([one for one in log.calls if one.order < call.order], call) < 0


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
