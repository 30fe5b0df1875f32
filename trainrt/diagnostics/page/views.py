"""The documents of the page's API, over one reader of the run directory. Each is made once per change of what it is made of."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from trainrt.diagnostics.page.health import health_document, plan_document
from trainrt.diagnostics.page.ledger import HEAT, Ledger
from trainrt.diagnostics.page.packed import packed
from trainrt.diagnostics.page.perfetto import perfetto
from trainrt.diagnostics.page.prometheus import exposition
from trainrt.diagnostics.page.reader import RunReader
from trainrt.diagnostics.page.timeline import timeline
from trainrt.run_dir import RunDir

POINTS = 2000
FRESH_SECONDS = 0.5
"""Requests that come closer together see the same state; the stream of an open page looks as often."""
MADE_KEPT = 64
UNKNOWN = {"state": "unknown", "verdicts": [], "notes": ["No diagnosis was written yet."]}
ALL = ("status", "metrics", "incidents", "summaries", "seats", "events", "plan", "diagnosis")


class Views:
    """Visitors share what was read and made. One of them at a time reads; meanwhile the others are shown what there was."""

    def __init__(self, directory: RunDir) -> None:
        self.reader = RunReader(directory)
        self.ledger = Ledger(self.reader.summaries)
        self._lock = threading.Lock()
        self._read_at = -FRESH_SECONDS
        self._revisions: dict[str, Hashable] = {}
        self._made: dict[str, tuple[Hashable, bytes]] = {}

    def changes(self) -> dict[str, Any]:
        """The status, and of each kind of document a number that is another when the document is."""
        with self._lock:
            self._refresh()
            # The next to ask is the page that hears of it.
            self.ledger.heat()
            told = {name: revision for name, revision in self._revisions.items() if name != "status"}
            return {"status": self.reader.status(), "revisions": told}

    def run(self) -> bytes:
        """Path, status, cluster."""

        def make() -> dict[str, Any]:
            reader = self.reader
            return {"path": str(reader.run_dir), "status": reader.status(), "cluster": reader.cluster.read() or {}}

        return self._document("run", ("status",), make)

    def metrics(self, after: int) -> bytes:
        """The lines of the steps after one, at most about POINTS."""

        def make() -> dict[str, Any]:
            held = self.reader.metrics
            return {"lines": _thin([held[step] for step in sorted(held) if step > after])}

        return self._document(f"metrics {after}", ("metrics",), make)

    def diagnosis(self) -> bytes:
        """diagnosis.json, and when it was written; without one, state unknown."""

        def make() -> dict[str, Any]:
            document = self.reader.diagnosis.read()
            return {**(document or UNKNOWN), "written": self.reader.diagnosis.time}

        return self._document("diagnosis", ("diagnosis",), make)

    def heatmap(self) -> bytes:
        """For each rank the medians over the last steps, packed: HEAT, and `ratio`, self time over the median of its role."""

        def make() -> dict[str, Any]:
            heat = self.ledger.heat()
            return {
                "incarnation": self.reader.summaries.incarnation,
                "world_size": self.reader.summaries.roles.ranks,
                "steps": self.ledger.heat_steps,
                "last_step": max(self.ledger.bands, default=None),
                **{name: packed(heat[name]) for name in (*HEAT, "ratio")},
            }

        return self._document("heatmap", ("summaries",), make)

    def accounting(self) -> bytes:
        """By step the mean over ranks of each part, seconds: `steps`, and `bands` by name, bottom first."""

        def make() -> dict[str, Any]:
            steps = _thin(sorted(self.ledger.bands))
            rows = [self.ledger.bands[step] for step in steps]
            names = sorted({name for row in rows for name in row}, key=_order)
            columns = np.array([[row.get(name, 0.0) for row in rows] for name in names])
            bands = {name: column.round(6).tolist() for name, column in zip(names, columns, strict=True)}
            return {"steps": steps, "bands": {name: _numbers(column) for name, column in bands.items()}}

        return self._document("accounting", ("summaries",), make)

    def timeline(self, step: int | None, rank: int | None) -> bytes:
        """The events of a step."""
        needs = ("events", "seats", "diagnosis")
        return self._document(f"timeline {step} {rank}", needs, lambda: timeline(self.reader, step, rank))

    def perfetto(self, step: int, rank: int | None) -> bytes:
        """The trace of a step."""
        needs = ("events", "seats", "diagnosis")
        return self._document(f"perfetto {step} {rank}", needs, lambda: perfetto(self.reader, step, rank))

    def incidents(self) -> bytes:
        """All incidents, oldest first."""
        return self._document("incidents", ("incidents",), lambda: {"incidents": self.reader.incidents})

    def plan(self) -> bytes:
        """Plan, seats, topology."""
        return self._document("plan", ("plan", "seats"), lambda: plan_document(self.reader))

    def health(self) -> bytes:
        """Snapshots and memory."""
        return self._document("health", ALL, lambda: health_document(self.reader))

    def exposition(self) -> bytes:
        """The text that Prometheus scrapes."""
        return self._bytes("exposition", ALL, lambda: exposition(self.reader, self.ledger))

    def _document(self, name: str, needs: Sequence[str], make: Callable[[], dict[str, Any]]) -> bytes:
        return self._bytes(name, needs, lambda: _json(make()))

    def _bytes(self, name: str, needs: Sequence[str], make: Callable[[], bytes]) -> bytes:
        held = self._made.get(name)
        if held and held[0] == self._key(needs) and (self._fresh() or self._lock.locked()):
            return held[1]
        with self._lock:
            if not self._fresh():
                self._refresh()
            held, key = self._made.get(name), self._key(needs)
            if not held or held[0] != key:
                if len(self._made) >= MADE_KEPT:
                    self._made.clear()
                held = self._made[name] = (key, make())
            return held[1]

    def _key(self, needs: Sequence[str]) -> Hashable:
        now = self._revisions
        return tuple(now.get(need) for need in needs)

    def _fresh(self) -> bool:
        return time.monotonic() - self._read_at < FRESH_SECONDS

    def _refresh(self) -> None:
        reader = self.reader
        reader.refresh()
        self.ledger.refresh()
        reader.plan.read()
        self._revisions = {
            "status": json.dumps([reader.status(), reader.cluster.read()]), "metrics": reader.metrics_revision,
            "incidents": len(reader.incidents), "summaries": reader.summaries.revision, "seats": reader.summaries.incarnation,
            "events": reader.windows.revision, "plan": reader.plan.revision, "diagnosis": reader.diagnosis.revision,
        }  # fmt: skip
        self._read_at = time.monotonic()


def _json(document: dict[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


def _numbers(column: list[float]) -> list[float | None]:
    """JSON has no NaN."""
    return [None if value != value else value for value in column]


def _order(band: str) -> tuple[int, str]:
    """Work below, then what travels, then what is waited for, then the rest."""
    known = ("compute", "transfer", "waiting", "data", "snapshot", "checkpoint", "other")
    return known.index(band.split()[0]), band


def _thin(lines: list[Any]) -> list[Any]:
    """At most POINTS, evenly chosen, the last one always."""
    every = max(1, -(-len(lines) // (POINTS - 1)))
    return [line for index, line in enumerate(lines) if index % every == 0 or index == len(lines) - 1]
