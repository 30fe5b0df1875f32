"""What all ranks share: data that comes late, snapshots that stall, garbage collected out of turn, slower code."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from trainrt.diagnostics.detectors.finding import Finding
from trainrt.diagnostics.detectors.levels import find_shift, goes_on
from trainrt.diagnostics.detectors.window import LENGTHS, Window, nan_median
from trainrt.diagnostics.table import Numbers

LEAST_SHARE, LEAST_SECONDS = {"data": 0.05, "storage": 0.04}, 0.05
"""Of a step, all ranks' alike, and on average at least so long; what became slower counts from a third of the share on."""
LEAST_UNPLANNED = {"garbage_collection": 0.01, "other": 0.03}
"""Of a step: what ranks lose to each other because they stop at different times."""
FEWEST_STOPS = 3
FEWEST_STEPS = {"data": 3, "storage": 10}
"""Snapshots and checkpoints come every so many steps: a share of fewer says nothing."""
LEAST_RISE = 1.03
DOUBLED = 2.0
AFTER = 5
"""Steps that a regression is watched before it is said."""
CAUSES = {"data": "slow_data", "storage": "slow_storage"}
WHAT = {"data": "waits for its data", "storage": "is stopped by snapshots and checkpoints"}


def shared_waits(window: Window) -> Iterator[Finding]:
    """Data or storage that holds up all ranks alike."""
    for kind, cause in CAUSES.items():
        own = window.of_all(window.own(kind))
        recent, share = _worst_of_late(own, window, fewest=FEWEST_STEPS[kind])
        shift = find_shift(own, least=DOUBLED, fewest=window.moment)
        rose = shift is not None and shift.after - shift.before > LEAST_SHARE[kind] / 3 * float(window.seconds.mean())
        if float(own[-recent:].mean()) < LEAST_SECONDS or (share < LEAST_SHARE[kind] and not rose):
            continue
        if not goes_on(own > own[-recent:].mean() / 2):
            continue
        evidence = [f"every rank {WHAT[kind]} for {share:.1%} of a step"]
        saved, since, sure = own, len(own) - recent, share / LEAST_SHARE[kind]
        if shift is not None and rose:
            saved, since, sure = np.maximum(own - shift.before, 0.0), shift.index, max(sure, shift.sure)
            evidence.append(f"{shift.ratio:.1f} times as long since step {window.table.steps[shift.index]}")
        yield Finding(cause, "storage", [], [], share, sure, evidence, saved=saved, since=since)


def _worst_of_late(seconds: Numbers, window: Window, *, fewest: int) -> tuple[int, float]:
    """Of the windows at the end, of at least so many steps, the one in which these seconds (S,) are most of a step."""
    fewest = max(fewest, window.moment)
    lengths = [n for n in (*LENGTHS, len(seconds)) if fewest <= n <= len(seconds)] or [len(seconds)]
    shares = {n: float(seconds[-n:].mean() / window.seconds[-n:].mean()) for n in lengths}
    longest = max(shares, key=lambda n: (shares[n], n))
    return longest, shares[longest]


def unplanned_stops(window: Window) -> Iterator[Finding]:
    """Ranks that stop at different steps, to collect garbage or to begin late: each time all others wait. At the same step it
    would cost its mean."""
    for kind, cause in (("garbage_collection", "garbage_collection"), ("other", "launch_skew")):
        own = np.nan_to_num(window.own(kind))
        saved = own.max(1) - own.mean(1)
        recent, share = _worst_of_late(saved, window, fewest=FEWEST_STOPS)
        late = saved[-recent:]
        stops = late >= LEAST_SECONDS
        if share < LEAST_UNPLANNED[kind] or stops.sum() < FEWEST_STOPS or not goes_on(stops):
            continue
        ranks, seconds = len(np.unique(own[-recent:][stops].argmax(1))), float(np.median(late[stops]))
        what = "collects garbage" if kind == "garbage_collection" else "is late between its parts"
        evidence = [
            f"some rank {what} for {seconds:.3g} s while the others wait",
            f"it does so in {stops.sum()} of {recent} steps, on {ranks} ranks",
        ]
        sure = share / LEAST_UNPLANNED[kind]
        yield Finding(cause, "code", [], [], share, sure, evidence, saved=saved, since=len(saved) - recent)


def regression(window: Window) -> Iterator[Finding]:
    """All ranks compute longer from one step on, for the same work: the code, or what it runs on, changed."""
    tokens = nan_median(window.table.work["tokens"], axis=1)
    seconds = window.of_all(window.compute)
    compute = seconds * (np.median(tokens) / np.maximum(tokens, 1.0) if tokens.min() > 0 else 1.0)
    shift = find_shift(compute, least=LEAST_RISE, fewest=max(AFTER, window.moment))
    # Where there is less work than before, a token may take longer and a step not.
    if shift is None or np.median(seconds[shift.index :]) < LEAST_RISE * np.median(seconds[: shift.index]):
        return
    saved = np.where(np.arange(len(compute)) >= shift.index, shift.after - shift.before, 0.0)
    evidence = [
        f"every rank computes {shift.ratio - 1:+.1%} since step {window.table.steps[shift.index]}, for the same work"
    ]
    yield Finding("regression", "code", [], [], shift.ratio - 1, shift.sure, evidence, saved=saved, since=shift.index)
