"""A diagnosis in words, for a terminal: verdicts first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

STATES = {
    "healthy": "Healthy: no rank, host or link keeps the others waiting.",
    "straggling": "Straggling.",
    "hung": "Hung.",
    "unknown": "Not enough data for a diagnosis.",
}


def lines(document: dict[str, Any]) -> Iterator[str]:
    """What `trainrt diagnose` prints without --json."""
    yield STATES[document["state"]]
    if document["verdicts"] and document["ideal_step_seconds"]:
        yield (
            f"A step takes {document['step_seconds']:.3g} s. Without what is named below it would take "
            f"{document['ideal_step_seconds']:.3g} s ({document['slowdown']:.2f} times as fast)."
        )
    for number, verdict in enumerate(document["verdicts"], 1):
        yield ""
        yield f"{number}. {verdict['sentence']}"
        yield (
            f"   cause {verdict['cause']}, action {verdict['action']}, confidence {verdict['confidence']:.2f}, "
            f"{verdict['cost_device_hours']:.3g} device-hours so far"
        )
        yield from (f"   - {text}" for text in verdict["evidence"])
    yield from document["notes"]
