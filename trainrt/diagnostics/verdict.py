"""Verdicts: what a diagnosis says, in the form that `trainrt diagnose --json` prints (docs/reference)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

STATES = ("healthy", "straggling", "hung", "unknown")
CAUSES = (
    "slow_worker", "slow_host", "slow_link", "slow_nic", "congestion", "slow_data", "slow_storage", "garbage_collection",
    "sequence_imbalance", "stage_imbalance", "expert_imbalance", "launch_skew", "drift", "regression", "hang",
    "mismatched_collective",
)  # fmt: skip
ACTIONS = ("evict", "repartition", "rebalance", "plan_gc", "check_storage", "check_network", "wait", "none")
KINDS = ("rank", "host", "link", "stage", "storage", "workload", "code", "none")


@dataclass(frozen=True, slots=True)
class Culprit:
    """One to blame. Where a host, a link or a stage is, each of its ranks is named, or one with what is known."""

    rank: int | None
    host: str | None
    stage: int | None = None
    dp_rank: int | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """Who, why, what it costs, what to do.

    kind: what the culprit is. share: of a step's time. seconds_a_step: what a step would be shorter without it.
    sentence: all of it, for people.
    """

    cause: str
    kind: str
    culprits: Sequence[Culprit]
    victims: Sequence[int]
    share: float
    seconds_a_step: float
    cost_device_hours: float
    action: str
    confidence: float
    sentence: str
    evidence: Sequence[str]
    since_step: int | None = None


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The answer over one window of steps. M_W, M_S: the shares of the slowdown that go when the slowest 3 % of workers, or the
    last stage, are ideal (OSDI'25, "Understanding Stragglers in Large Model Training Using What-if Analysis", section 3)."""

    state: str
    step_seconds: float | None
    ideal_step_seconds: float | None
    slowdown: float | None
    metrics: dict[str, float | None]
    verdicts: Sequence[Verdict] = ()
    first_step: int | None = None
    last_step: int | None = None
    notes: Sequence[str] = field(default_factory=tuple)

    def to_json(self) -> dict[str, Any]:
        """The document, of lists and plain numbers."""
        document: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return document

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Diagnosis:
        verdicts = [
            Verdict(**{**verdict, "culprits": [Culprit(**culprit) for culprit in verdict["culprits"]]})
            for verdict in document["verdicts"]
        ]
        return cls(**{**document, "verdicts": verdicts})
