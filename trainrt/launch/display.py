"""What people see of a run while it lasts: the terminal, status.json, workers' logs, verdicts, the live page; then a summary."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from trainrt.config import JobConfig
from trainrt.diagnostics.verdict import Diagnosis
from trainrt.launch.dashboard import Dashboard
from trainrt.launch.inspection import Inspector
from trainrt.launch.logs import LogMonitor
from trainrt.launch.machine import Final, Running, State, published
from trainrt.launch.publish import Status
from trainrt.launch.terminal import Terminal, next_command
from trainrt.run_dir import RunDir

if TYPE_CHECKING:
    from trainrt.training.planning import Preflight


class Display:
    """Shows what the driver says. Logs are followed from `begin` on, verdicts and the page from the first step on."""

    def __init__(self, run_dir: RunDir, config: JobConfig, *, status: Status, terminal: Terminal) -> None:
        self._run_dir, self._config, self._status, self._terminal = run_dir, config, status, terminal
        self._entropy: float | None = None
        self._last_metrics: dict[str, Any] | None = None
        self._logs: LogMonitor | None = None
        self._inspector: Inspector | None = None
        self._dashboard: Dashboard | None = None

    def line(self, text: str, style: str | None = None) -> None:
        """One line on the terminal."""
        self._terminal.line(text, style)

    # Coming up.

    def plan(self, preflight: Preflight) -> None:
        """The plan as a table; workers are next."""
        self._entropy = preflight.unigram_entropy
        rows = list(preflight.plan.table())
        if self._entropy is not None:
            rows.append(("unigram entropy", f"{self._entropy:.4f} nats: what a model knows that only counts bytes"))
        self._status.set(message="starting the workers", unigram_entropy=self._entropy)
        self._terminal.plan(f"run {self._config.run.name} in {self._run_dir}", rows)

    def begin(self, *, step: int, node_of: Callable[[int], str | None]) -> None:
        """Progress from a step on, and what the workers print. node_of: where a rank is."""
        self._terminal.begin_progress(step=step, steps=self._config.run.steps)
        self._logs = LogMonitor(self._run_dir.logs, write=self._terminal.line, node_of=node_of)

    # While it runs.

    def state(self, state: State) -> None:
        """A state was entered. How a run ends is told when everything of it has ended."""
        if not isinstance(state, Final):
            message = "" if isinstance(state, Running) else self._status.fields["message"]
            self._status.set(state=published(state), message=message)
            self._terminal.state(published(state))

    def stepping(self) -> None:
        """Steps are being completed (again): from the first of them on there is something to diagnose and to look at."""
        if self._inspector is None:
            self._inspector = Inspector(self._run_dir, tell=self._terminal.line)
        if self._dashboard is None and self._config.diagnostics.dashboard:
            self._dashboard = Dashboard(self._run_dir, port=self._config.diagnostics.port)
            self._terminal.line(f"live page: {self._dashboard.address}")
            self._status.set(dashboard=self._dashboard.address)

    def metrics(self, line: dict[str, Any], *, effective_time: float | None) -> None:
        self._last_metrics = line
        self._status.fields["effective_time"] = effective_time
        self._terminal.metrics(line, steps=self._config.run.steps)

    def reading(self, reading: dict[str, int]) -> None:
        """The state came from a checkpoint; see `Reading`."""
        self._status.set(restored_bytes=reading)
        read, stored = reading["read"] / 1e6, reading["stored"] / 1e6
        times = reading["read"] / max(1, reading["wanted"])
        self.line(f"state read from disk: {read:.1f} MB of {stored:.1f} MB, each wanted byte {times:.2f} times")

    def reported(self, error: str) -> None:
        """A worker's error is the driver's to show: its traceback stays in its log."""
        if self._logs is not None:
            self._logs.report(error)

    def incident(self, incident: dict[str, Any]) -> None:
        """An incident is over."""
        self._terminal.incident(incident)

    @property
    def diagnosis(self) -> Diagnosis | None:
        """The newest, of the run so far."""
        return None if self._inspector is None else self._inspector.newest

    # The end.

    def end_of_steps(self) -> None:
        """The last look at the steps; then the page goes."""
        if self._inspector is not None:
            self._inspector.close()
        self._close_page()

    def close(self) -> None:
        """All workers have ended: show their last lines."""
        if self._logs is not None:
            self._logs.close()
        self._terminal.end_progress()

    def leave(self) -> None:
        """This process is about to go, whatever still runs."""
        self._close_page()
        self._terminal.end_progress()

    def _close_page(self) -> None:
        if self._dashboard is not None:
            self._dashboard.close()

    def summary(
        self,
        outcome: tuple[str, str],
        *,
        checkpoint: str | None,
        effective_time: tuple[float, float] | None,
        command: str,
    ) -> None:
        """outcome: state and message. effective_time: measured, expected. command: what goes on with a run that is not over."""
        rows = [outcome]
        if self._last_metrics is not None:
            known = "" if self._entropy is None else f" (unigram entropy {self._entropy:.4f})"
            rows.append(("loss", f"{self._last_metrics['loss']:.4f}{known}"))
        if effective_time is not None:
            measured, expected = effective_time
            text = f"{measured:.1%} of the launch since its first step ({expected:.1%} expected)"
            rows.append(("effective time", text))
        if checkpoint is not None:
            rows.append(("checkpoint", checkpoint))
        rows.append(("metrics", str(self._run_dir.metrics)))
        if self._run_dir.incidents.exists():
            rows.append(("incidents", str(self._run_dir.incidents)))
        rows.append(("logs", str(self._run_dir.logs)))
        then = next_command(outcome[0], run_dir=str(self._run_dir), checkpoint=checkpoint, command=command)
        self._terminal.summary([*rows, ("next", then)])
