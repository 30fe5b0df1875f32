"""`trainrt diagnose RUN_DIR|TRACE`: what is slow or broken, why, what it costs, what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from trainrt.diagnostics.attribution import lateness, meetings, origins
from trainrt.diagnostics.detect import detect
from trainrt.diagnostics.table import Roles, StepTable
from trainrt.diagnostics.telemetry import Summaries
from trainrt.diagnostics.verdict import Diagnosis, Verdict
from trainrt.diagnostics.windows import Windows
from trainrt.errors import DiagnosticsError
from trainrt.run_dir import RunDir, read_json

WINDOW = 100
"""Steps that are looked at, the last ones."""
MOST_RANKS = 256
"""Of a run whose events are followed collective by collective."""
WORTH_SAYING = 0.1
OF_NETWORK = ("slow_link", "slow_nic", "congestion")
WARM_UP = 2
"""The first steps of an incarnation are left out: caches fill, code is compiled, files are opened."""


def diagnose(path: str | Path) -> dict[str, Any]:
    """The document of docs/reference/diagnose.schema.json, for a run directory or a trace. Raises DiagnosticsError."""
    where = Path(path)
    if not where.exists():
        raise DiagnosticsError(
            f"{where}: no such file or directory; allowed: a run directory, or a trace (.csv, .parquet)"
        )
    return (_of_run(RunDir(where)) if where.is_dir() else _of_trace(where)).to_json()


def _of_trace(path: Path) -> Diagnosis:
    from trainrt.diagnostics.replay.whatif import diagnose_trace

    return diagnose_trace(path)


def _of_run(run_dir: RunDir) -> Diagnosis:
    if run_dir.read_status() is None:
        raise DiagnosticsError(f"{run_dir}: no run is here (no status.json)")
    said = read_json(run_dir.diagnosis)
    if said is not None and said["state"] == "hung":
        # Nothing was said since: the run has not gone on.
        return Diagnosis.from_json(said)
    summaries, windows = Summaries(run_dir), Windows(run_dir)
    summaries.refresh()
    return examined(summaries, windows)


def examined(summaries: Summaries, windows: Windows, *, window: int = WINDOW) -> Diagnosis:
    """What the last steps say, with what the events of one of them add to it."""
    found = detect(settled(summaries, window=window))
    windows.refresh()
    steps = [step for step in windows.steps() if found.first_step is not None and step >= found.first_step]
    if not found.verdicts or not steps or summaries.roles.ranks > MOST_RANKS:
        return found
    return replace(found, verdicts=_with_origins(found.verdicts, windows.lines(steps[-1]), summaries.roles, steps[-1]))


def _with_origins(
    verdicts: Sequence[Verdict], lines: dict[int, dict[str, Any]], roles: Roles, step: int
) -> list[Verdict]:  # fmt: skip
    """Verdicts with what the collectives of a step say: whom its waiting goes back to, or that it was transfer."""
    if len(lines) < roles.ranks:
        return list(verdicts)
    met = meetings(lines, roles)
    share = origins(met, roles.ranks).share
    said = []
    for verdict in verdicts:
        ranks = [culprit.rank for culprit in verdict.culprits if culprit.rank is not None]
        blamed = float(share[ranks].sum()) if verdict.kind in ("rank", "host") and ranks else 0.0
        more = []
        if verdict.cause in OF_NETWORK:
            more = [
                f"of what collectives of step {step} took beyond the usual, {1 - lateness(met):.0%} was slow transfer"
            ]
        elif blamed > WORTH_SAYING:
            more = [
                f"{blamed:.0%} of all waiting of step {step} goes back to {'it' if len(ranks) == 1 else 'its ranks'}"
            ]
        said.append(replace(verdict, evidence=[*verdict.evidence, *more]))
    return said


def settled(summaries: Summaries, *, window: int = WINDOW) -> StepTable:
    """The last steps of the newest incarnation, without those that ranks may still report, and without the first ones."""
    table = summaries.table(window)
    first = summaries.seats.first_step if summaries.seats is not None else 0
    keep = table.steps >= first + WARM_UP
    if len(table.steps) and not np.isfinite(table.seconds[-1]).all():
        keep[-1] = False
    return table.only(keep)
