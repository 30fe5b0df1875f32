"""Transfers that are slow: of a link, of all links of a host, or of all hosts alike.

Seconds are compared between groups that send as much (the same axis and stage), and for pairs of hosts by what a byte takes.

Legend: S steps, G groups, P pairs of hosts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from trainrt.diagnostics.detectors.finding import Finding
from trainrt.diagnostics.detectors.levels import find_shift
from trainrt.diagnostics.detectors.window import Window, nan_median
from trainrt.diagnostics.detectors.workers import began, find_slow
from trainrt.diagnostics.table import Indices, Numbers

LEAST_SLOWER = 0.4
"""By which a byte must take longer over a pair than over the others, as a logarithm: links vary more than compute."""
MOST_PAIRS = 0.6
"""Of a host's pairs that are slow where its NIC is."""
LINK_CHANCE = 1e-4
FEWEST = 3
"""Steps in which something went over a pair."""
LEAST_SHARE = 0.01
CONGESTED = 1.3
FEW_GROUPS = 3


@dataclass(frozen=True, slots=True)
class Groups:
    """The transfers of one axis: seconds, (S, G), and for each group the ranks."""

    axis: str
    seconds: Numbers
    group: np.ndarray

    @property
    def number(self) -> int:
        return self.seconds.shape[1]


def slow_transfers(window: Window) -> Iterator[Finding]:
    """Links and NICs by what a byte takes between hosts; else hosts of slow groups; else congestion.

    Of a pipeline the waits of its bubble cannot be told from transfers: only links say something of it.
    """
    groups = [_groups(window, axis) for axis in window.accounting.transfer if axis != "pp"]
    found = [*(_slow_links(window, groups) if len(window.table.links.step) else _slow_groups(window, groups))]
    yield from found or _congestion(window, groups)


def _groups(window: Window, axis: str) -> Groups:
    """Where a member was not heard, its group may have waited for it: the step does not count."""
    group = window.roles.groups(axis)
    _, first = np.unique(group, return_index=True)
    seconds = window.accounting.transfer[axis][:, first]
    if not window.valid.all():
        silent = np.stack([np.bincount(group, weights=~heard, minlength=len(first)) for heard in window.valid]) > 0
        known = np.where(silent, np.nan, seconds)
        usual = np.where(silent.all(1), nan_median(known.reshape(-1), axis=0), nan_median(known, axis=1))
        seconds = np.where(silent, usual[:, None], seconds)
    return Groups(axis, np.nan_to_num(seconds), group)


def _slow_links(window: Window, groups: list[Groups]) -> Iterator[Finding]:
    """From the transfers that stores measured, both directions of a pair together."""
    links, hosts = window.table.links, window.roles.hosts
    ends = np.sort(np.stack((links.source, links.target)), axis=0)
    pairs, pair = np.unique(ends, axis=1, return_inverse=True)
    slower, enough = _by_pair(window, pair.reshape(-1), pairs.shape[1])
    slow = {
        found.member: found
        for found in find_slow(slower, enough, fewest=FEWEST, least=LEAST_SLOWER, chance=LINK_CHANCE)
    }
    met = {int(host): np.flatnonzero((pairs == host).any(0)).tolist() for host in np.unique(pairs)}
    for host in sorted(met, key=lambda host: -sum(p in slow for p in met[host])):
        bad = [p for p in met[host] if p in slow]
        if len(bad) < 2 or len(bad) < MOST_PAIRS * len(met[host]):
            continue
        effect = float(np.exp(np.median([slow[p].effect for p in bad])) - 1)
        since = min(began(slower[:, p], slow[p]) for p in bad)
        sure = max(slow.pop(p).score for p in bad)
        ranks = np.flatnonzero(window.roles.host == host)
        evidence = [
            f"a byte from or to {hosts[host]} takes {effect:+.0%} over {len(bad)} of its {len(met[host])} links"
        ]
        saved = _saved(window, groups, {host}, effect)
        yield Finding(
            "slow_nic", "host", ranks.tolist(), [hosts[host]], effect, sure, evidence, saved=saved, since=since
        )
    for p, found in slow.items():
        one, other = (int(end) for end in pairs[:, p])
        effect = float(np.exp(found.effect) - 1)
        evidence = [f"a byte between {hosts[one]} and {hosts[other]} takes {effect:+.0%} compared with other links"]
        if found.how == "bursts":
            evidence.append("on average: it comes and goes")
        saved = _saved(window, groups, {one, other}, effect)
        yield Finding(
            "slow_link", "link", [], [hosts[one], hosts[other]], effect, found.score, evidence, saved=saved,
            since=began(slower[:, p], found),
        )  # fmt: skip


def _by_pair(window: Window, pair: Indices, number: int) -> tuple[Numbers, np.ndarray]:
    """The logarithm of how much longer a byte takes over a pair than over the others, (S, P), and pairs that are known enough."""
    each = _of_bytes(window, pair, number)
    return np.nan_to_num(each - nan_median(each, axis=1)[:, None]), np.isfinite(each).sum(0) >= FEWEST


def _of_bytes(window: Window, pair: Indices, number: int) -> Numbers:
    """The logarithm of the seconds of a byte, (S, P), NaN where nothing was sent."""
    links, steps = window.table.links, window.table.steps
    row = np.searchsorted(steps, links.step).clip(0, len(steps) - 1)
    at = row * number + pair
    seconds, amount = (
        np.bincount(at, weights=values, minlength=len(steps) * number).reshape(len(steps), number)
        for values in (links.seconds, links.bytes)
    )
    return np.where(amount > 0, np.log(np.maximum(seconds, 1e-12) / np.maximum(amount, 1.0)), np.nan)


def _saved(window: Window, groups: list[Groups], hosts: set[int], effect: float) -> Numbers:
    """Seconds that steps would be shorter if transfers of the groups on these hosts took what others' do."""
    saved = np.zeros(len(window.seconds))
    on_host = np.isin(window.roles.host, list(hosts))
    for one in groups:
        crossing = [
            g for g in np.unique(one.group[on_host])
            if len(np.unique(window.roles.host[one.group == g])) > 1
        ]  # fmt: skip
        if not crossing:
            continue
        seconds = one.seconds[:, crossing].max(1)
        others = np.setdiff1d(np.arange(one.number), crossing)
        usual = np.median(one.seconds[:, others], 1) if len(others) >= FEW_GROUPS else seconds / (1 + effect)
        saved += np.maximum(seconds - usual, 0.0)
    return saved


def _slow_groups(window: Window, groups: list[Groups]) -> Iterator[Finding]:
    """Groups of an axis whose transfers take longer than those of others, and the hosts that only such groups are on."""
    roles = window.roles
    for one in groups:
        if one.number < FEW_GROUPS:
            continue
        excess = (one.seconds - np.median(one.seconds, 1)[:, None]) / window.scale
        slow = find_slow(excess, np.ones(one.number, dtype=bool), fewest=window.moment)
        if not slow:
            continue
        is_slow = np.isin(one.group, [found.member for found in slow])
        hosts = [h for h in np.unique(roles.host[is_slow]) if is_slow[roles.host == h].all()]
        names = [roles.hosts[h] for h in (hosts or np.unique(roles.host[is_slow]))]
        worst = max(slow, key=lambda found: found.effect)
        saved = np.maximum(excess[:, [found.member for found in slow]].max(1), 0.0) * window.scale
        evidence = [
            f"transfers over {one.axis} take {worst.effect:+.1%} of the usual compute in {len(slow)} of {one.number} groups",
            f"these groups are on {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}",
        ]
        cause, kind = ("slow_nic", "host") if len(hosts) == 1 else ("slow_link", "link")
        ranks = np.flatnonzero(roles.host == hosts[0]).tolist() if kind == "host" else []
        yield Finding(cause, kind, ranks, names[:8], worst.effect, worst.score, evidence, saved=saved)
        return


def _links_agree(window: Window, index: int) -> bool:
    """Whether a byte takes longer since a step, as far as stores measured it: they tell of every tenth step or so."""
    each = _of_bytes(window, np.zeros(len(window.table.links.step), dtype=np.int64), 1)[:, 0]
    known = np.isfinite(each)
    before, after = each[:index][known[:index]], each[index:][known[index:]]
    return not len(before) or not len(after) or bool(np.median(after) - np.median(before) > np.log(CONGESTED))


def _congestion(window: Window, groups: list[Groups]) -> Iterator[Finding]:
    """All groups of an axis became slower at once: nobody is the culprit. Where links are known, they say so, too."""
    saved, since, sure, said = np.zeros(len(window.seconds)), len(window.seconds), 0.0, []
    for one in groups:
        all_groups = np.median(one.seconds, 1)
        shift = find_shift(all_groups, least=CONGESTED, fewest=window.moment)
        if shift is None or (shift.after - shift.before) < LEAST_SHARE * float(np.median(window.seconds)):
            continue
        if not _links_agree(window, shift.index):
            continue
        saved += np.where(np.arange(len(saved)) >= shift.index, shift.after - shift.before, 0.0)
        since, sure = min(since, shift.index), max(sure, shift.sure)
        step = window.table.steps[shift.index]
        said.append(
            f"transfers over {one.axis} take {shift.ratio:.2f} times as long since step {step}, in all groups alike"
        )
    if said:
        effect = float(saved[since:].mean() / window.scale)
        yield Finding("congestion", "none", [], [], effect, sure, said, saved=saved, since=since)
