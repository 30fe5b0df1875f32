"""How fast hosts send each other what protects the state: what stores measure anyway, a line for ten steps and each pair."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STEPS = 10


class LinkReports:
    """Turns what a store has measured since it began (node to step, bytes, seconds) into what is new of every `STEPS` steps."""

    def __init__(self) -> None:
        self._told: dict[str, list[float]] = {}

    def since(self, measured: Mapping[str, list[float]]) -> list[dict[str, Any]]:
        """{"step", "from", "bytes", "seconds"} of each node whose data came over STEPS steps or more since its last report."""
        found = []
        for node, (step, bytes, seconds) in measured.items():
            known = self._told.get(node, [0.0, 0.0, 0.0])
            if bytes < known[1]:
                # Another store has taken the place of the one that measured before.
                known = [0.0, 0.0, 0.0]
            if abs(step - known[0]) >= STEPS and bytes > known[1]:
                self._told[node] = [step, bytes, seconds]
                found.append(
                    {"step": int(step), "from": node, "bytes": int(bytes - known[1]), "seconds": seconds - known[2]}
                )
        return found
