"""`/metrics`: aggregates and the slowest rank, in base units; never a series per rank."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from trainrt.diagnostics.reader import RunReader
from trainrt.diagnostics.summaries import heatmap

GAUGES = {
    "loss": ("trainrt_loss", "Mean loss of the last step, in nats"),
    "grad_norm": ("trainrt_gradient_norm", "Gradient norm of the last step before clipping"),
    "step_seconds": ("trainrt_step_seconds", "Seconds of the last step"),
    "tokens_per_second": ("trainrt_tokens_per_second", "Tokens a second of the last step"),
    "mfu": ("trainrt_model_flops_utilization_ratio", "Model flops utilization of the last step, 0 to 1"),
    "snapshot_stall_seconds": ("trainrt_snapshot_stall_seconds", "Seconds the last step waited for its snapshot"),
    "world_size": ("trainrt_world_size", "Ranks"),
    "step": ("trainrt_step", "Last optimizer step"),
    "incarnation": ("trainrt_incarnation", "Restarts so far, from 1"),
}


def exposition(reader: RunReader) -> bytes:
    """The text of one scrape."""
    registry = CollectorRegistry()
    status = reader.status()
    Gauge("trainrt_up", "1 while a driver holds the run", registry=registry).set(1 if status["live"] else 0)
    if reader.metrics:
        last = reader.metrics[max(reader.metrics)]
        for key, (name, text) in GAUGES.items():
            Gauge(name, text, registry=registry).set(last[key])
    incidents = Counter("trainrt_incidents", "Incidents by kind", ["kind"], registry=registry)
    for incident in reader.incidents:
        incidents.labels(incident["kind"]).inc()
    cells = heatmap(reader)["cells"]
    if cells:
        slowest = max(cells, key=lambda cell: cell["ratio"])
        labels = Gauge(
            "trainrt_slowest_rank_self_time_ratio", "Self time of the slowest rank over the median's", ["rank", "host"],
            registry=registry,
        )  # fmt: skip
        labels.labels(str(slowest["rank"]), slowest["host"]).set(slowest["ratio"])
    return generate_latest(registry)
