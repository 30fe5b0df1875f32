"""What a person sees of a run: the plan, one line of progress, incidents, a summary.

On a terminal rich draws it; elsewhere everything is plain lines, progress at most every few seconds.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from typing import Any, TextIO

PLAIN_PERIOD_SECONDS = 5.0
INCIDENT_TEXT = {"stop": "the run stops", "skip": "the update is left out"}


class Terminal:
    """Output of one run. Thread-safe: rich's console and single writes of lines are."""

    def __init__(self, stream: TextIO | None = None) -> None:
        from rich.console import Console

        self._console = Console(file=stream or sys.stdout, highlight=False, soft_wrap=True)
        self._rich = self._console.is_terminal
        self._progress: Any = None
        self._task: Any = None
        self._printed_at = 0.0

    def line(self, text: str, style: str | None = None) -> None:
        """One line above the progress."""
        self._console.print(text, style=style if self._rich else None, markup=False, emoji=False)

    def plan(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """The plan in one table."""
        from rich import box
        from rich.table import Table

        if not self._rich:
            width = max((len(name) for name, _ in rows), default=0)
            for text in [title, *(f"  {name:<{width}}  {value}" for name, value in rows)]:
                self.line(text)
            return
        table = Table(title=title, title_justify="left", box=box.ROUNDED, show_header=False)
        table.add_column(style="cyan")
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(name, value)
        self._console.print(table)

    def begin_progress(self, *, step: int, steps: int) -> None:
        if not self._rich:
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("step"), BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(compact=True), console=self._console, transient=True,
        )  # fmt: skip
        self._task = self._progress.add_task("steps", total=steps, completed=step, facts="")
        self._progress.start()

    def metrics(self, line: dict[str, Any], *, steps: int) -> None:
        """The progress line: loss, tokens/s, MFU, snapshot stall, world size."""
        facts = progress_facts(line)
        if self._progress is not None:
            self._progress.update(self._task, completed=line["step"], facts=facts)
        elif not self._rich:
            last = line["step"] >= steps
            if last or time.monotonic() - self._printed_at >= PLAIN_PERIOD_SECONDS:
                self._printed_at = time.monotonic()
                self.line(f"step {line['step']}/{steps}  {facts}")

    def state(self, text: str) -> None:
        """The progress line says what is going on while no step is done."""
        if self._progress is not None:
            self._progress.update(self._task, facts=text)

    def incident(self, incident: dict[str, Any]) -> None:
        """An incident that is over, and what became of it."""
        if incident["recovered_seconds"] is not None:
            ended = f"recovered in {incident['recovered_seconds']:.2f} s"
            if incident["kind"] != "store_loss":
                origin = {"none": "scratch"}.get(incident["restored_from"], incident["restored_from"])
                ended += f" from {origin}, {incident['steps_lost']} steps to redo ({incident['action']})"
        else:
            ended = INCIDENT_TEXT.get(incident["action"], incident["action"])
        self.line(f"incident {incident['kind']} at step {incident['step']}: {ended}", style="yellow")

    def end_progress(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def summary(self, rows: Sequence[tuple[str, str]]) -> None:
        self.end_progress()
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            self.line(f"{name:<{width}}  {value}")


def progress_facts(line: dict[str, Any]) -> str:
    return (
        f"loss {line['loss']:.4f}  {line['tokens_per_second']:,.0f} tokens/s  MFU {100 * line['mfu']:.1f}%  "
        f"snapshot {1000 * line['snapshot_stall_seconds']:.0f} ms  world {line['world_size']}"
    )


def next_command(state: str, *, run_dir: str, checkpoint: str | None, command: str) -> str:
    """What to try after a run of this outcome."""
    if state == "finished" and checkpoint is not None:
        return shlex.join(["trainrt", "checkpoint", "inspect", checkpoint])
    if state == "finished":
        return shlex.join(["trainrt", "status", run_dir])
    return command
