"""The diagnosis of a trace: what its steps would take without each suspected cause (`causes.py`), played again (`replay.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainrt.diagnostics.replay.causes import Suspicion, causes_in_work
from trainrt.diagnostics.replay.network_causes import causes_in_network
from trainrt.diagnostics.replay.replay import Replay, WhatIf, what_if
from trainrt.diagnostics.replay.trace import Trace, read_trace
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

    step_seconds: of the trace played again as it ran; against it stand ideal_step_seconds and all shares. The notes say how far
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
        (*lanes.notes, *_notes(replay, figures, explained=bool(verdicts) or not straggling)),
    )  # fmt: skip


def _notes(replay: Replay, figures: WhatIf, *, explained: bool) -> list[str]:
    notes = [
        f"the traced step is {figures.original.mean():.4g} s, played again {figures.simulated.mean():.4g} s "
        f"({figures.discrepancy:+.2%}): time between operations is left out"
    ]
    if abs(figures.discrepancy) > FAITHFUL:
        notes.append(
            f"that is more than {FAITHFUL:.0%}: much of the step is in nothing that was recorded, confidence is halved"
        )
    wrong = replay.dependencies.out_of_order(replay.lanes)
    if wrong:
        notes.append(
            f"in {wrong:.0%} of steps and replicas a stage computed in another order than in most; played again in the usual one"
        )
    by_type = sorted(figures.by_type.items(), key=lambda item: -item[1])[:3]
    notes.append("slowdown by type of operation: " + ", ".join(f"{name} {value:.3f}" for name, value in by_type))
    if not explained:
        notes.append("no single cause explains the slowdown: durations vary without a pattern that lasts")
    return notes


@dataclass(frozen=True, slots=True)
class _Cost:
    """Seconds of each step that a suspicion costs, (S,): against the step as it is, or hidden, with all other suspicions gone."""

    suspicion: Suspicion
    gain: NDArray[np.float64]
    hidden: bool


def _costs(replay: Replay, figures: WhatIf) -> list[_Cost]:
    """What each suspicion costs alone; where that is next to nothing, what it costs once all others are gone.

    A step waits for its longest path: of two causes on different paths, neither may show while the other is there.
    """
    suspected = [*causes_in_work(replay), *causes_in_network(replay)]
    number = len(suspected)
    # Each alone gone, each alone left, all gone.
    gone = [[one] for one in range(number)] + [
        [other for other in range(number) if other != one] for one in range(number)
    ]
    gone.append(list(range(number)))

    def durations(scenario: int, some: slice) -> NDArray[np.float64]:
        made = replay.traced[:, some]
        for one in gone[scenario]:
            made = made * np.broadcast_to(suspected[one].scale, replay.traced.shape)[:, some]
        return made

    seconds = replay.scenarios(len(gone), durations)
    found = []
    for one, suspicion in enumerate(suspected):
        alone, left = figures.simulated - seconds[one], seconds[number + one] - seconds[-1]
        hidden = alone.mean() < LEAST_SHARE * figures.simulated.mean()
        found.append(_Cost(suspicion, left if hidden else alone, hidden))
    return found


def _verdicts(replay: Replay, figures: WhatIf, world_size: int) -> list[Verdict]:
    faith = (0.5 if abs(figures.discrepancy) > FAITHFUL else 1.0) * max(0.0, 1 - abs(figures.discrepancy))
    found = [
        _verdict(replay, figures, cost, faith, world_size)
        for cost in _costs(replay, figures)
        if cost.gain.mean() >= LEAST_SHARE * figures.simulated.mean()
    ]
    return sorted(found, key=lambda verdict: -verdict.share)


def _verdict(replay: Replay, figures: WhatIf, cost: _Cost, faith: float, world_size: int) -> Verdict:
    lanes, suspicion = replay.lanes, cost.suspicion
    whole, gain = float(figures.simulated.mean()), float(cost.gain.mean())
    culprits = [Culprit(int(lanes.ranks[place]), None, stage=place[0], dp_rank=place[1]) for place in suspicion.workers]
    blamed = {culprit.rank for culprit in culprits}
    victims = [rank for rank in sorted(lanes.ranks.reshape(-1).tolist()) if rank not in blamed]
    what = suspicion.what[0].upper() + suspicion.what[1:]
    if cost.hidden:
        played = f"it is hidden behind the other causes: once they are gone it costs {gain:.4g} s a step"
        sentence = f"{what}: once the other causes are gone, a step would be {gain:.3g} s ({gain / whole:.1%}) shorter without."
    else:
        took = f"{whole - gain:.4g} s instead of {whole:.4g} s (ideal: {figures.ideal:.4g} s)"
        played = f"played again without it, the step takes {took}"
        sentence = f"{what}: without, a step would be {gain:.3g} s ({gain / whole:.1%}) shorter."
    sure = 0.99 * suspicion.lasting * float((cost.gain > 0).mean()) * faith
    return Verdict(
        suspicion.cause, suspicion.kind, culprits, victims, gain / whole, gain,
        gain * len(lanes.steps) * world_size / 3600, suspicion.action, round(sure, 2), sentence, [*suspicion.evidence, played],
    )  # fmt: skip
