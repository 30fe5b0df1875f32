"""`trainrt diagnose RUN_DIR|TRACE`: what is slow or broken, why, what it costs, what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from trainrt.diagnostics.detect import detect
from trainrt.diagnostics.table import StepTable
from trainrt.diagnostics.telemetry import Summaries
from trainrt.diagnostics.verdict import Diagnosis
from trainrt.errors import DiagnosticsError
from trainrt.run_dir import RunDir, read_json

WINDOW = 100
"""Steps that are looked at, the last ones."""
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
    summaries = Summaries(run_dir)
    summaries.refresh()
    return detect(settled(summaries))


def settled(summaries: Summaries, *, window: int = WINDOW) -> StepTable:
    """The last steps of the newest incarnation, without those that ranks may still report, and without the first ones."""
    table = summaries.table(window)
    first = summaries.seats.first_step if summaries.seats is not None else 0
    keep = table.steps >= first + WARM_UP
    if len(table.steps) and not np.isfinite(table.seconds[-1]).all():
        keep[-1] = False
    return table.only(keep)
