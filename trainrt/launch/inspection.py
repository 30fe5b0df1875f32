"""The run, diagnosed while it runs: in a thread of the driver, from the summaries of the ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

from trainrt.diagnostics.diagnose import examined
from trainrt.diagnostics.telemetry import Summaries
from trainrt.diagnostics.verdict import Diagnosis, Verdict
from trainrt.diagnostics.windows import Windows
from trainrt.run_dir import RunDir, write_json

EVERY_SECONDS = 2.0
"""Between the end of a look and the next one, which comes only where there are new steps."""
WINDOW = 64
SIGNIFICANT = 3


class Inspector:
    """Writes diagnosis.json, tells new verdicts, and keeps the newest diagnosis. A look that fails stops nothing."""

    def __init__(self, run_dir: RunDir, *, tell: Callable[[str], None]) -> None:
        self._run_dir, self._tell = run_dir, tell
        self._summaries, self._windows = Summaries(run_dir), Windows(run_dir)
        self._over = threading.Event()
        self._told: set[tuple[str, str]] = set()
        self._last_step = 0
        self.newest: Diagnosis | None = None
        self._thread = threading.Thread(target=self._run, name="inspection", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._over.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        failed = over = False
        while not over:
            # The last look is after the last step.
            over = self._over.wait(EVERY_SECONDS)
            try:
                self._look()
            except Exception as error:
                if not failed:
                    self._tell(f"diagnosis: {type(error).__name__}: {error}")
                failed = True

    def _look(self) -> None:
        if not self._summaries.refresh() or not self._summaries.steps or self._summaries.steps[-1] == self._last_step:
            return
        self._last_step = self._summaries.steps[-1]
        found = examined(self._summaries, self._windows, window=WINDOW)
        write_json(self._run_dir.diagnosis, rounded(found).to_json())
        self.newest = found
        for verdict in found.verdicts:
            known = verdict.cause, ",".join(sorted({c.host or "" for c in verdict.culprits}))
            if known not in self._told:
                self._told.add(known)
                self._tell(line_of(verdict))


def line_of(verdict: Verdict) -> str:
    """A verdict as a line to grep: key=value, then the sentence."""
    hosts = ",".join(dict.fromkeys(c.host for c in verdict.culprits if c.host)) or "-"
    ranks = ",".join(str(c.rank) for c in verdict.culprits[:8] if c.rank is not None) or "-"
    return (
        f"verdict cause={verdict.cause} hosts={hosts} ranks={ranks} share={verdict.share:.3f} "
        f"seconds_a_step={verdict.seconds_a_step:.3g} confidence={verdict.confidence:.2f} action={verdict.action} "
        f"since_step={verdict.since_step}: {verdict.sentence}"
    )


def rounded(found: Diagnosis) -> Diagnosis:
    """Without digits that say nothing, so that the file does not change for them."""
    verdicts = [
        replace(v, share=round(v.share, SIGNIFICANT + 1), seconds_a_step=round(v.seconds_a_step, 6))
        for v in found.verdicts
    ]
    return replace(found, verdicts=verdicts)
