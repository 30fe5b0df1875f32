"""What all ranks share: data that comes late, snapshots that stall, garbage collected out of turn, slower code."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from trainrt.diagnostics.detectors.finding import Finding
from trainrt.diagnostics.detectors.levels import find_shift
from trainrt.diagnostics.detectors.window import Window, nan_median

LEAST_SHARE = {"data": 0.10, "storage": 0.07}
"""Of a step, all ranks' alike; what became slower counts from a third of it on."""
LEAST_UNPLANNED = {"garbage_collection": 0.01, "other": 0.03}
"""Of a step: what ranks lose to each other because they stop at different times."""
FEWEST_STOPS = 3
LEAST_RISE = 1.03
DOUBLED = 2.0
AFTER = 5
"""Steps that a regression is watched before it is said."""
CAUSES = {"data": "slow_data", "storage": "slow_storage"}
WHAT = {"data": "waits for its data", "storage": "is stopped by snapshots and checkpoints"}


def shared_waits(window: Window) -> Iterator[Finding]:
    """Data or storage that holds up all ranks alike."""
    for kind, cause in CAUSES.items():
        own = nan_median(window.own(kind), axis=1)
        share = float(own.mean() / window.seconds.mean())
        shift = find_shift(own, least=DOUBLED)
        rose = shift is not None and (shift.after - shift.before) / float(window.seconds.mean()) > LEAST_SHARE[kind] / 3
        if share < LEAST_SHARE[kind] and not rose:
            continue
        evidence = [f"every rank {WHAT[kind]} for {share:.1%} of a step"]
        saved, since, sure = own, 0, share / LEAST_SHARE[kind]
        if shift is not None and rose:
            saved, since, sure = np.maximum(own - shift.before, 0.0), shift.index, max(sure, shift.sure)
            evidence.append(f"{shift.ratio:.1f} times as long since step {window.table.steps[shift.index]}")
        yield Finding(cause, "storage", [], [], share, sure, evidence, saved=saved, since=since)


def unplanned_stops(window: Window) -> Iterator[Finding]:
    """Ranks that stop at different steps, to collect garbage or to begin late: each time all others wait. At the same step it
    would cost its mean."""
    for kind, cause in (("garbage_collection", "garbage_collection"), ("other", "launch_skew")):
        own = np.nan_to_num(window.own(kind))
        saved = own.max(1) - own.mean(1)
        share = float(saved.mean() / window.seconds.mean())
        if share < LEAST_UNPLANNED[kind] or np.sum(saved > 0.1 * saved.max()) < FEWEST_STOPS:
            continue
        ranks, seconds = len(np.unique(own.argmax(1))), float(np.median(saved[saved > 0]))
        what = "collects garbage" if kind == "garbage_collection" else "is late between its parts"
        evidence = [
            f"some rank {what} for {seconds:.3g} s while the others wait",
            f"it is another rank from step to step ({ranks} in {len(saved)} steps)",
        ]
        sure = share / LEAST_UNPLANNED[kind]
        yield Finding(cause, "code", [], [], share, sure, evidence, saved=saved, since=0)


def regression(window: Window) -> Iterator[Finding]:
    """All ranks compute longer from one step on, for the same work: the code, or what it runs on, changed."""
    tokens = nan_median(window.table.work["tokens"], axis=1)
    compute = nan_median(window.compute, axis=1) * (
        np.median(tokens) / np.maximum(tokens, 1.0) if tokens.min() > 0 else 1.0
    )
    shift = find_shift(compute, least=LEAST_RISE)
    if shift is None or len(compute) - shift.index < AFTER:
        return
    saved = np.where(np.arange(len(compute)) >= shift.index, shift.after - shift.before, 0.0)
    evidence = [
        f"every rank computes {shift.ratio - 1:+.1%} since step {window.table.steps[shift.index]}, for the same work"
    ]
    yield Finding("regression", "code", [], [], shift.ratio - 1, shift.sure, evidence, saved=saved, since=shift.index)
