"""Work that is unevenly spread over healthy hardware: long sequences, busy experts, a heavy stage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from trainrt.diagnostics.detectors.finding import Finding
from trainrt.diagnostics.detectors.window import LENGTHS, Window, nan_median
from trainrt.diagnostics.table import Numbers

LEAST_SHARE = 0.01
"""Of a step: what even work would save."""
LEAST_STAGE = 0.03
LASTING = 0.75
MOST_OF_IT = 0.5
"""Ranks that have so much of what is too much in the mean over steps are named."""
CHANCE = 3.0
"""Standard errors of that mean: what is drawn at random is not always the same ranks'."""
CAUSES = {
    "tokens": ("sequence_imbalance", "tokens"),
    "squares": ("sequence_imbalance", "squared sequence lengths"),
    "rows": ("expert_imbalance", "rows for its experts"),
}


def uneven_work(window: Window) -> Iterator[Finding]:
    """What differs between peers because their work does: it would go if the same work were spread evenly."""
    kinds: dict[str, list[str]] = {}
    for name in window.slopes:
        kinds.setdefault(CAUSES[name][0], []).append(name)
    for cause, names in kinds.items():
        more = np.sum([window.more_work(name) for name in names], axis=0)
        found = _uneven(window, more - more.mean(1, keepdims=True), cause, names)
        if found is not None:
            yield found


def _uneven(window: Window, uneven: Numbers, cause: str, names: Sequence[str]) -> Finding | None:
    """uneven: seconds beyond an even share, (S, R)."""
    recent = lasting(uneven.max(1) / window.seconds)
    if recent is None:
        return None
    uneven = np.concatenate((np.zeros_like(uneven[:-recent]), uneven[-recent:]))
    saved = uneven[-recent:].max(1)
    share = float(np.median(saved / window.seconds[-recent:]))
    always = uneven[-recent:].mean(0)
    by_chance = CHANCE * uneven[-recent:].std(0) / np.sqrt(recent)
    much = (always - by_chance > MOST_OF_IT * float(saved.mean())) & (always > always.max() / 2)
    named = np.flatnonzero(much).tolist()
    most = float(np.median(saved) / window.scale)
    evidence = [
        *(f"compute follows the {CAUSES[name][1]} of a rank: {window.slopes[name]:.3g} s for each" for name in names),
        f"the rank with most of it computes {most:.1%} longer than it would with an even share",
    ]
    if named:
        evidence.append(
            f"it is always the same ones: {', '.join(map(str, named[:8]))}{' ...' if len(named) > 8 else ''}"
        )
    return Finding(
        cause, "workload", named, [], most, share / LEAST_SHARE, evidence, removed=uneven, since=len(uneven) - recent
    )


def lasting(share: Numbers) -> int | None:
    """The longest window at the end of a series of shares (S,) in which most steps are worth a verdict, or None."""
    lengths = [length for length in (*LENGTHS, len(share)) if length <= len(share)]
    worth = [n for n in lengths if np.mean(share[-n:] > LEAST_SHARE) >= LASTING and np.median(share[-n:]) > LEAST_SHARE]
    return max(worth, default=None)


def heavy_stage(window: Window) -> Iterator[Finding]:
    """A stage of the pipeline that computes longer than the mean stage, in every replica alike."""
    stage = window.roles.coordinates.get("pp")
    if stage is None:
        return
    seconds = window.stage_seconds
    heaviest, mean = int(seconds.argmax()), float(seconds.mean())
    effect = float(seconds[heaviest] / mean - 1)
    by_step = np.stack([nan_median(window.compute[:, stage == index], axis=1) for index in range(len(seconds))], 1)
    lasts = np.mean(by_step[:, heaviest] > (1 + effect / 2) * by_step.mean(1)) >= LASTING
    if effect < LEAST_STAGE or not lasts:
        return
    ranks = np.flatnonzero(stage == heaviest)
    removed: Numbers = np.nan_to_num(window.compute[:, ranks]) * (1 - mean / seconds[heaviest])
    evidence = [
        f"stage {heaviest} of {len(seconds)} computes {seconds[heaviest]:.3g} s a step, the mean stage {mean:.3g} s",
        "it does so in every replica: the work is heavier, not the hardware slower",
    ]
    yield Finding(
        "stage_imbalance",
        "stage",
        ranks.tolist(),
        [],
        effect,
        effect / LEAST_STAGE,
        evidence,
        removed=removed,
        stage=heaviest,
    )
