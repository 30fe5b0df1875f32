"""The diagnosis of a trace: what its steps would take without each suspected cause (`causes.py`), played again (`replay.py`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainrt.diagnostics.causes import Suspicion, causes_in_work
from trainrt.diagnostics.network_causes import causes_in_network
from trainrt.diagnostics.replay import Replay, WhatIf, what_if
from trainrt.diagnostics.trace import Trace, read_trace
from trainrt.diagnostics.verdict import Culprit, Diagnosis, Verdict
from trainrt.errors import NotEnoughData

FEWEST_STEPS = 3
STRAGGLING = 1.1
"""The slowdown from which on the study calls a job straggling."""
LEAST_SHARE = 0.02
"""What a cause must cost, of a step's time, to be a verdict."""
FAITHFUL = 0.05
"""A replay of the traced durations that misses the traced steps by more is not to be relied on."""


def diagnose_trace(path: str | Path) -> Diagnosis:
    """What slows down the job that a trace is of. Raises DiagnosticsError for a file that is no trace."""
    return diagnose(read_trace(path))


def diagnose(trace: Trace) -> Diagnosis:
    """The state is unknown with fewer than three whole steps or with operations missing, and says what is missing.

    step_seconds: of the trace played again as it was; against it stand ideal_step_seconds and all shares. The notes say how far
    it is from the traced step.
    """
    try:
        replay = Replay.of(trace)
    except NotEnoughData as missing:
        return Diagnosis("unknown", None, None, None, {"M_W": None, "M_S": None}, notes=(str(missing),))
    lanes = replay.lanes
    if len(lanes.steps) < FEWEST_STEPS:
        said = f"{trace.source}: {len(lanes.steps)} whole steps; a diagnosis needs {FEWEST_STEPS}"
        return Diagnosis("unknown", None, None, None, {"M_W": None, "M_S": None}, notes=(*lanes.notes, said))
    figures = what_if(replay)
    verdicts = _verdicts(replay, figures, trace.sizes["world_size"])
    straggling = bool(verdicts) or figures.slowdown >= STRAGGLING
    return Diagnosis(
        "straggling" if straggling else "healthy", float(figures.simulated.mean()), figures.ideal, figures.slowdown,
        {"M_W": figures.M_W, "M_S": figures.M_S}, verdicts, int(lanes.steps[0]), int(lanes.steps[-1]),
        (*lanes.notes, *_notes(figures, explained=bool(verdicts) or not straggling)),
    )  # fmt: skip


def _notes(figures: WhatIf, *, explained: bool) -> list[str]:
    notes = [
        f"the traced step is {figures.original.mean():.4g} s, played again {figures.simulated.mean():.4g} s "
        f"({figures.discrepancy:+.2%}): time between operations is left out"
    ]
    if abs(figures.discrepancy) > FAITHFUL:
        notes.append(
            f"that is more than {FAITHFUL:.0%}: much of the step is in nothing that was recorded, confidence is halved"
        )
    by_type = sorted(figures.by_type.items(), key=lambda item: -item[1])[:3]
    notes.append("slowdown by type of operation: " + ", ".join(f"{name} {value:.3f}" for name, value in by_type))
    if not explained:
        notes.append("no single cause explains the slowdown: durations vary without a pattern that lasts")
    return notes


def _verdicts(replay: Replay, figures: WhatIf, world_size: int) -> list[Verdict]:
    suspected = [*causes_in_work(replay), *causes_in_network(replay)]
    without = replay.scenarios(len(suspected), lambda one, some: _scaled(replay, suspected[one], some))
    faith = (0.5 if abs(figures.discrepancy) > FAITHFUL else 1.0) * max(0.0, 1 - abs(figures.discrepancy))
    found = []
    for suspicion, seconds in zip(suspected, without, strict=True):
        gain = figures.simulated - seconds
        if gain.mean() >= LEAST_SHARE * figures.simulated.mean():
            sure = 0.99 * suspicion.lasting * float((gain > 0).mean()) * faith
            found.append(_verdict(replay, figures, suspicion, float(gain.mean()), sure, world_size))
    return sorted(found, key=lambda verdict: -verdict.share)


def _scaled(replay: Replay, suspicion: Suspicion, some: slice) -> NDArray[np.float64]:
    return replay.traced[:, some] * np.broadcast_to(suspicion.scale, replay.traced.shape)[:, some]


def _verdict(
    replay: Replay, figures: WhatIf, suspicion: Suspicion, gain: float, confidence: float, world_size: int
) -> Verdict:
    lanes, whole = replay.lanes, float(figures.simulated.mean())
    culprits = [Culprit(int(lanes.ranks[place]), None, stage=place[0], dp_rank=place[1]) for place in suspicion.workers]
    blamed = {culprit.rank for culprit in culprits}
    victims = [rank for rank in sorted(lanes.ranks.reshape(-1).tolist()) if rank not in blamed]
    cost = gain * len(lanes.steps) * world_size / 3600
    evidence = [
        *suspicion.evidence,
        f"played again without it, the step takes {whole - gain:.4g} s instead of {whole:.4g} s (ideal: {figures.ideal:.4g} s)",
    ]
    what = suspicion.what[0].upper() + suspicion.what[1:]
    sentence = f"{what}: without, a step would be {gain:.3g} s ({gain / whole:.1%}) shorter."
    return Verdict(
        suspicion.cause, suspicion.kind, culprits, victims, gain / whole, gain, cost, suspicion.action, round(confidence, 2),
        sentence, evidence,
    )  # fmt: skip
