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
from trainrt.diagnostics.detectors.workers import find_slow
from trainrt.diagnostics.table import Numbers

LEAST_SLOWER = 0.4
"""By which a byte must take longer over a pair than over the others, as a logarithm: links vary more than compute."""
MOST_PAIRS = 0.6
"""Of a host's pairs that are slow where its NIC is."""
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
    """Links and NICs by what a byte takes between hosts; else hosts of slow groups; else congestion."""
    groups = [_groups(window, axis) for axis in window.accounting.transfer]
    found = [*_slow_links(window, groups)] or [*_slow_groups(window, groups)]
    yield from found or _congestion(window, groups)


def _groups(window: Window, axis: str) -> Groups:
    group = window.roles.groups(axis)
    _, first = np.unique(group, return_index=True)
    return Groups(axis, np.nan_to_num(window.accounting.transfer[axis][:, first]), group)


def _slow_links(window: Window, groups: list[Groups]) -> Iterator[Finding]:
    """From the transfers that stores measured."""
    links, steps, hosts = window.table.links, window.table.steps, window.roles.hosts
    if not len(links.step):
        return
    pairs, pair = np.unique(np.stack((links.source, links.target)), axis=1, return_inverse=True)
    row = np.searchsorted(steps, links.step).clip(0, len(steps) - 1)
    each = np.full((len(steps), pairs.shape[1]), np.nan)
    each[row, pair.reshape(-1)] = np.log(np.maximum(links.seconds, 1e-9) / np.maximum(links.bytes, 1.0))
    slower = np.nan_to_num(each - nan_median(each, axis=1)[:, None])
    enough = np.isfinite(each).sum(0) >= 3
    slow = {found.member: found for found in find_slow(slower, enough, least=LEAST_SLOWER)}
    for host in range(len(hosts)):
        own = [p for p in range(pairs.shape[1]) if host in pairs[:, p]]
        bad = [p for p in own if p in slow]
        if len(own) > 1 and len(bad) > 1 and len(bad) >= MOST_PAIRS * len(own):
            effect = float(np.exp(np.median([slow[p].effect for p in bad])) - 1)
            sure = max(slow[p].score for p in bad)
            ranks = np.flatnonzero(window.roles.host == host)
            evidence = [f"a byte from or to {hosts[host]} takes {effect:+.0%} over {len(bad)} of its {len(own)} links"]
            saved = _saved(window, groups, {host}, effect)
            yield Finding("slow_nic", "host", ranks.tolist(), [hosts[host]], effect, sure, evidence, saved=saved)
            for p in bad:
                del slow[p]
    for p, found in slow.items():
        ends = [int(end) for end in pairs[:, p]]
        effect = float(np.exp(found.effect) - 1)
        evidence = [f"a byte from {hosts[ends[0]]} to {hosts[ends[1]]} takes {effect:+.0%} compared with other links"]
        if found.how == "bursts":
            evidence.append("on average: it comes and goes")
        saved = _saved(window, groups, set(ends), effect)
        yield Finding("slow_link", "link", [], [hosts[e] for e in ends], effect, found.score, evidence, saved=saved)


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
        slow = find_slow(excess, np.ones(one.number, dtype=bool))
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


def _congestion(window: Window, groups: list[Groups]) -> Iterator[Finding]:
    """All groups of an axis became slower at once: nobody is the culprit."""
    saved, since, sure, said = np.zeros(len(window.seconds)), len(window.seconds), 0.0, []
    for one in groups:
        all_groups = np.median(one.seconds, 1)
        shift = find_shift(all_groups, least=CONGESTED)
        if shift is None or (shift.after - shift.before) < LEAST_SHARE * float(np.median(window.seconds)):
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
