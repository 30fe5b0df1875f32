"""`/metrics`: aggregates, verdicts by cause and the three likeliest suspects, in base units; never a series per rank."""

from __future__ import annotations

from collections import Counter as Count
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from trainrt.diagnostics.page.ledger import Ledger
from trainrt.diagnostics.page.reader import RunReader
from trainrt.diagnostics.verdict import CAUSES, STATES

SUSPECTS = 3
GAUGES = {
    "loss": ("trainrt_loss", "Mean loss of the last step, in nats"),
    "grad_norm": ("trainrt_gradient_norm", "Gradient norm of the last step before clipping"),
    "step_seconds": ("trainrt_step_seconds", "Seconds of the last step"),
    "tokens_per_second": ("trainrt_tokens_per_second", "Tokens a second of the last step"),
    "mfu": ("trainrt_model_flops_utilization_ratio", "Model flops utilization of the last step, 0 to 1"),
    "snapshot_stall_seconds": ("trainrt_snapshot_stall_seconds", "Seconds the last step waited for its snapshot"),
    "snapshots_skipped": ("trainrt_snapshots_skipped", "Snapshots skipped since the start of the incarnation"),
    "world_size": ("trainrt_world_size", "Ranks"),
    "step": ("trainrt_step", "Last optimizer step"),
    "incarnation": ("trainrt_incarnation", "Restarts so far, from 1"),
}


def exposition(reader: RunReader, ledger: Ledger) -> bytes:
    """The text of one scrape."""
    registry = CollectorRegistry()
    Gauge("trainrt_up", "1 while a driver holds the run", registry=registry).set(1 if reader.status()["live"] else 0)
    if reader.metrics:
        last = reader.metrics[max(reader.metrics)]
        for key, (name, text) in GAUGES.items():
            if last.get(key) is not None:
                Gauge(name, text, registry=registry).set(last[key])
    incidents = Counter("trainrt_incidents", "Incidents by kind", ["kind"], registry=registry)
    for incident in reader.incidents:
        incidents.labels(incident["kind"]).inc()
    _accounting(registry, ledger)
    _diagnosis(registry, reader.diagnosis.read() or {})
    _suspects(registry, ledger)
    return generate_latest(registry)


def _accounting(registry: CollectorRegistry, ledger: Ledger) -> None:
    if not ledger.bands:
        return
    parts = Gauge(
        "trainrt_step_part_seconds",
        "Seconds of the last step by part, mean over ranks",
        ["part", "axis"],
        registry=registry,
    )
    for band, seconds in ledger.bands[max(ledger.bands)].items():
        part, _, axis = band.partition(" ")
        parts.labels(part, axis).set(seconds)


def _diagnosis(registry: CollectorRegistry, diagnosis: dict[str, Any]) -> None:
    """Every state and cause has a series at all times, so that an alert needs no `absent`."""
    state = Gauge("trainrt_diagnosis_state", "1 for the state of the last diagnosis", ["state"], registry=registry)
    for name in STATES:
        state.labels(name).set(float(diagnosis.get("state", "unknown") == name))
    if diagnosis.get("slowdown") is not None:
        text = "Seconds of a step over those without stragglers"
        Gauge("trainrt_slowdown_ratio", text, registry=registry).set(diagnosis["slowdown"])
    verdicts = Gauge("trainrt_verdicts", "Verdicts of the last diagnosis by cause", ["cause"], registry=registry)
    counts = Count(verdict["cause"] for verdict in diagnosis.get("verdicts", []))
    for cause in sorted({*CAUSES, *counts}):
        verdicts.labels(cause).set(counts[cause])


def _suspects(registry: CollectorRegistry, ledger: Ledger) -> None:
    """One family, three series: whom a page would name."""
    ratio = Gauge(
        "trainrt_suspect_self_time_ratio", "Self time over the median of the same role, of the ranks where it is largest",
        ["place", "rank", "host"], registry=registry,
    )  # fmt: skip
    for place, (rank, host, value) in enumerate(ledger.suspects(SUSPECTS), 1):
        ratio.labels(str(place), str(rank), host).set(value)
