"""What findings cost: seconds that a step would be shorter without them.

Ranks meet in every step, so a step takes what the slowest of them takes by itself, and what travels. Without a finding its ranks
take what their peers take. Where several findings hide each other, each is given the mean of what goes when it is removed first
and when it is removed last (for two, the Shapley value).

Legend: S steps, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainrt.diagnostics.detectors.finding import Finding
from trainrt.diagnostics.detectors.window import Window
from trainrt.diagnostics.table import Numbers

WORKERS = 0.03
"""The share of ranks, the slowest, that M_W makes ideal."""


def own_seconds(window: Window) -> Numbers:
    """What each rank takes by itself, without its noise about its own median excess, (S, R)."""
    return np.nan_to_num(np.sum(list(window.table.parts.values()), axis=0))


def savings(findings: Sequence[Finding], window: Window) -> list[float]:
    """Mean seconds a step for each finding, over the steps since it began."""
    own = own_seconds(window)
    by_rank = [finding.removed is not None for finding in findings]
    everything = own.copy()
    for finding in findings:
        _remove(everything, finding)
    found = []
    for finding, slowest in zip(findings, by_rank, strict=True):
        since = slice(min(finding.since or 0, len(own) - 1), None)
        if not slowest:
            assert finding.saved is not None
            found.append(float(finding.saved[since].mean()))
            continue
        first, last = own.copy(), everything.copy()
        _remove(first, finding)
        _remove(last, finding, sign=-1.0)
        alone = own.max(1) - first.max(1)
        at_last = last.max(1) - everything.max(1)
        found.append(float(np.maximum((alone + at_last) / 2, 0.0)[since].mean()))
    return found


def _remove(own: Numbers, finding: Finding, *, sign: float = 1.0) -> None:
    if finding.removed is None:
        return
    if finding.removed.shape == own.shape:
        own -= sign * finding.removed
    else:
        own[:, finding.where] -= sign * finding.removed


def slowest_workers(window: Window) -> float | None:
    """M_W: the share of what even ranks would save that goes when the slowest 3 % are as their peers (OSDI'25, section 3.3)."""
    own = own_seconds(window)
    ideal = np.median(own, axis=1)
    whole = float((own.max(1) - ideal).mean())
    number = max(1, round(WORKERS * own.shape[1]))
    slowest = np.argsort(-own.mean(0))[:number]
    without = own.copy()
    without[:, slowest] = np.minimum(without[:, slowest], ideal[:, None])
    return float((own.max(1) - without.max(1)).mean()) / whole if whole > 0 else None


def last_stage(window: Window) -> float | None:
    """M_S: the same for the last stage of a pipeline."""
    stage = window.roles.coordinates.get("pp")
    if stage is None:
        return None
    own = own_seconds(window)
    ideal = np.median(own, axis=1)
    whole = float((own.max(1) - ideal).mean())
    without = own.copy()
    last = stage == stage.max()
    without[:, last] = np.minimum(without[:, last], ideal[:, None])
    return float((own.max(1) - without.max(1)).mean()) / whole if whole > 0 else None
