"""Ranks and hosts that are slow: persistently, in bursts, or more and more, at the same work as their peers.

A rank is compared with its peers, part by part, over windows of several lengths: a large difference shows in few steps, a small
one in many. What is usual is taken from the ranks themselves, so nothing is to be set: how far ranks lie apart anyhow, and how
much a rank varies from step to step. A difference counts where it lasts, since a single slow step is nobody's fault.

Legend: S steps, R ranks, N members: ranks or hosts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from trainrt.diagnostics.detectors.finding import Finding
from trainrt.diagnostics.detectors.levels import goes_on
from trainrt.diagnostics.detectors.window import LENGTHS, PARTS_OF, STOP_SECONDS, Window, sigma
from trainrt.diagnostics.table import Indices, Numbers

LASTING = {3: 1.0, 5: 0.8}
"""The share of these steps that must be slow; of longer windows"""
LASTING_LONG = 0.75
SCORE = 5.5
"""Standard deviations beyond the peers. With ten thousand ranks a normal one is there once in thousands of windows, and it must
last besides."""
LEAST = 0.03
"""Of the usual compute seconds: less is not worth a verdict."""
BURST, LEAST_BURST, FEWEST_BURSTS = 5.0, 0.05, 3
CHANCE = 1e-6
"""That a rank has its bursts by chance, as many as all have on average."""
FEW = 8
"""So few members do not say how far they lie apart; steps have to."""
TREND = 12
"""Steps that a trend takes."""
SHARED = 0.6
"""Of a host's ranks that must be slow for the host to be the culprit."""
STOPPED, MOST_OF_IT = "everywhere", 0.75
CAUSES = {
    "compute": ("slow_worker", "slow_host"),
    "data": ("slow_data", "slow_data"),
    "garbage_collection": ("garbage_collection", "garbage_collection"),
    "storage": ("slow_storage", "slow_storage"),
    "other": ("launch_skew", "launch_skew"),
    STOPPED: ("slow_worker", "slow_host"),
}
NAMES = {
    "compute": "computes", "data": "waits for data", "garbage_collection": "collects garbage", "storage": "writes snapshots",
    "other": "is busy between its parts", STOPPED: "stops, wherever it is, for",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Slow:
    """A member that is slow, by so many of the usual seconds of compute; score: of the statistic, over its threshold."""

    member: int
    effect: float
    score: float
    length: int
    how: str


def slow_members(window: Window) -> Iterator[Finding]:
    """Hosts first; then ranks of other hosts. Each by the part that makes most of it."""
    excess = {kind: window.excess(kind) / window.scale for kind in PARTS_OF}
    taken = np.zeros(window.roles.ranks, dtype=bool)
    for host, kind, slow in _slow_hosts(window, excess):
        ranks = np.flatnonzero(window.roles.host == host)
        if not taken[ranks].any():
            taken[ranks] = True
            yield _finding(window, excess, kind, slow, ranks, host=host)
    for kind, slow in _strongest(window, excess, window.heard & ~taken):
        taken[slow.member] = True
        yield _finding(window, excess, kind, slow, np.array([slow.member]), host=None)
    yield from _stopped(window, excess, window.heard & ~taken)


def _stopped(window: Window, excess: dict[str, Numbers], among: np.ndarray) -> Iterator[Finding]:
    """Ranks that are stopped now and then, wherever they are: in no part often enough, in all parts together."""
    everywhere = np.sum(list(excess.values()), axis=0)
    for slow in find_slow(everywhere, among, fewest=window.moment, stop=STOP_SECONDS / window.scale):
        if slow.how != "bursts":
            continue
        late = everywhere[:, slow.member] > slow.effect
        of_kind = {kind: float(np.maximum(values[late, slow.member], 0.0).sum()) for kind, values in excess.items()}
        most = max(of_kind, key=lambda kind: of_kind[kind])
        kinds = excess
        if of_kind[most] < MOST_OF_IT * sum(of_kind.values()):
            most, kinds = STOPPED, {STOPPED: everywhere}
        yield _finding(window, kinds, most, slow, np.array([slow.member]), host=None)


def _strongest(window: Window, excess: dict[str, Numbers], among: np.ndarray) -> list[tuple[str, Slow]]:
    """For each member that is slow, the part in which it is slowest."""
    best: dict[int, tuple[str, Slow]] = {}
    for kind, values in excess.items():
        for slow in find_slow(values, among, fewest=window.moment, stop=STOP_SECONDS / window.scale):
            known = best.get(slow.member)
            if known is None or slow.effect > known[1].effect:
                best[slow.member] = kind, slow
    return sorted(best.values(), key=lambda item: -item[1].effect)


def _slow_hosts(window: Window, excess: dict[str, Numbers]) -> list[tuple[int, str, Slow]]:
    """Hosts with several ranks, most of which are slow in the same part."""
    roles = window.roles
    hosts = [np.flatnonzero((roles.host == host) & window.heard) for host in range(len(roles.hosts))]
    if len(hosts) < 2 or max(map(len, hosts)) < 2:
        return []
    by_host = {
        kind: np.stack([np.median(values[:, ranks], 1) if len(ranks) else np.zeros(len(values)) for ranks in hosts], 1)
        for kind, values in excess.items()
    }
    found = []
    for kind, slow in _strongest(window, by_host, np.array([len(ranks) > 1 for ranks in hosts])):
        typical = np.median if slow.how == "lasting" else np.mean
        recent = typical(excess[kind][-slow.length :, hosts[slow.member]], axis=0)
        if np.mean(recent > slow.effect / 2) >= SHARED:
            found.append((slow.member, kind, slow))
    return found


def find_slow(
    excess: Numbers, among: np.ndarray, *, fewest: int, least: float = LEAST, chance: float = CHANCE, stop: float = 0.0
) -> list[Slow]:
    """Members whose excess (S, N) is `least` or more, lies beyond the others' and lasts, or comes in bursts.

    excess: in shares of the usual compute, or whatever `least` is in. fewest: steps that it must last. chance: that bursts are
    nobody's; stop: the shortest one. Of several windows that which says it most surely.
    """
    steps = len(excess)
    if not among.any():
        return []
    centred = excess[:, among] - np.median(excess[:, among], axis=0)
    varies = max(sigma(centred), 1e-4) * (1 + 4 / centred.size)
    found: dict[int, Slow] = {}
    for length in (length for length in LENGTHS if fewest <= length <= steps):
        for slow in _lasting(excess[-length:], among, varies, least):
            if slow.member not in found or slow.score > found[slow.member].score:
                found[slow.member] = slow
    for slow in _bursts(excess, among, max(BURST * varies, LEAST_BURST * least / LEAST, stop), least, chance, fewest):
        found.setdefault(slow.member, slow)
    return list(found.values())


def _lasting(recent: Numbers, among: np.ndarray, varies: float, least: float) -> Iterator[Slow]:
    length = len(recent)
    middle = np.median(recent, axis=0)
    apart = sigma(middle[among]) if among.sum() >= FEW else 0.0
    deviation = max(apart, 1.2533 * varies / np.sqrt(length))
    score = middle / deviation
    slow = recent > np.maximum(middle / 2, 2.5 * varies if length <= min(LENGTHS) else 0.0)
    lasts = slow.mean(0) >= LASTING.get(length, LASTING_LONG)
    for member in np.flatnonzero(among & (middle > least) & (score > SCORE) & lasts):
        yield Slow(int(member), float(middle[member]), float(score[member] / SCORE), length, "lasting")


def _bursts(excess: Numbers, among: np.ndarray, long: float, least: float, limit: float, fewest: int) -> Iterator[Slow]:
    """Members that are slow in single steps far more often than others are, and have not ceased to be."""
    from scipy.stats import binom

    steps = len(excess)
    burst = excess > long
    count = burst.sum(0)
    often = np.flatnonzero(among & (count >= FEWEST_BURSTS))
    for member in often:
        others = (burst[:, among].sum() - count[member] + 1) / (steps * max(among.sum() - 1, 1) + 1)
        chance = float(binom.sf(count[member] - 1, steps, min(others, 1.0))) * int(among.sum())
        effect = float(np.maximum(excess[:, member], 0.0).mean())
        if chance < limit and effect > least / 3 and goes_on(burst[:, member], fewest=fewest):
            yield Slow(int(member), effect, np.log(max(chance, 1e-300)) / np.log(limit), steps, "bursts")


def _finding(
    window: Window, excess: dict[str, Numbers], kind: str, slow: Slow, ranks: Indices, *, host: int | None
) -> Finding:
    roles = window.roles
    values = excess[kind][:, ranks].mean(1)
    all_kinds = np.sum([np.maximum(part[:, ranks], 0.0) for part in excess.values()], axis=0)
    cause, kind_of_culprit = CAUSES[kind][host is not None], "host" if host is not None else "rank"
    how = f"{slow.effect:+.1%} of the usual compute"
    drifting = kind == "compute" and slow.how == "lasting" and is_drift(np.maximum(values, 0.0))
    if drifting:
        cause = "drift"
    who = f"host {roles.hosts[host]}" if host is not None else f"rank {ranks[0]} on {roles.hosts[roles.host[ranks[0]]]}"
    said = {
        "lasting": f"over the last {slow.length} steps, {slow.score * SCORE:.1f} deviations of its peers",
        "bursts": "on average, in single steps that are slow far more often than others'",
    }[slow.how]
    evidence = [f"{who} {NAMES[kind]} longer than its peers: {how} {said}"]
    if drifting:
        evidence.append("it became so step by step, not at once")
    stage = roles.coordinates["pp"][ranks[0]] if "pp" in roles.coordinates else None
    return Finding(
        cause, kind_of_culprit, ranks.tolist(), [roles.hosts[index] for index in np.unique(roles.host[ranks])], slow.effect,
        slow.score, evidence, removed=all_kinds * window.scale, since=began(values, slow),
        stage=None if stage is None else int(stage),
    )  # fmt: skip


def is_drift(values: Numbers) -> bool:
    """Whether a line explains a rank's excess (S,) better than one step between two levels, and rises by a verdict's worth."""
    steps = len(values)
    if steps < TREND:
        return False
    at = np.arange(steps)
    line = np.polyfit(at, values, 1)
    of_line = float(np.square(values - np.polyval(line, at)).sum())
    of_step = min(
        float(np.square(part - part.mean()).sum() + np.square(rest - rest.mean()).sum())
        for part, rest in ((values[:k], values[k:]) for k in range(2, steps - 1))
    )
    flat = float(np.square(values - values.mean()).sum())
    return bool(line[0] * steps > LEAST and of_line < of_step and of_line < 0.5 * flat)


def began(values: Numbers, slow: Slow) -> int:
    """The index of the first step since which most steps were slow; of bursts, that of the first."""
    late = values > slow.effect / 2
    if slow.how == "bursts":
        return int(late.argmax())
    since = len(late) - slow.length
    for index in range(since, -1, -1):
        if late[index] and late[index:].mean() >= LASTING_LONG:
            since = index
    return since
