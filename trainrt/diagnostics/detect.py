"""From the summaries of a window of steps to a diagnosis: findings of all detectors, weighed, and said in words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainrt.diagnostics.costs import last_stage, savings, slowest_workers
from trainrt.diagnostics.detectors.common import regression, shared_waits, unplanned_stops
from trainrt.diagnostics.detectors.finding import Finding
from trainrt.diagnostics.detectors.network import slow_transfers
from trainrt.diagnostics.detectors.window import Window, nan_median
from trainrt.diagnostics.detectors.work import heavy_stage, uneven_work
from trainrt.diagnostics.detectors.workers import slow_members
from trainrt.diagnostics.table import StepTable
from trainrt.diagnostics.verdict import Culprit, Diagnosis, Verdict

FEWEST_STEPS = 3
LEAST_HEARD = 0.5
"""Of the ranks, more in every step of the window: of one of two there is nothing to compare with."""
LEAST_SHARE = 0.005
"""Of a step: what costs less is no verdict."""
WORTH_EVICTING = 0.02
MOST_VICTIMS = 64
SAME_MOMENT = 3
"""Steps within which two things begin together."""
STOPS = {"garbage_collection", "launch_skew"}
ACTIONS = {
    "slow_worker": "evict", "slow_host": "evict", "slow_link": "check_network", "slow_nic": "evict", "congestion": "wait",
    "slow_data": "check_storage", "slow_storage": "check_storage", "garbage_collection": "plan_gc",
    "sequence_imbalance": "rebalance", "stage_imbalance": "repartition", "expert_imbalance": "rebalance",
    "launch_skew": "wait", "drift": "evict", "regression": "none",
}  # fmt: skip
NAMES = {
    "slow_worker": "is slow", "slow_host": "is slow", "slow_link": "is slow", "slow_nic": "has a slow network interface",
    "slow_data": "gets its data late", "slow_storage": "is held up by storage", "garbage_collection": "collects garbage often",
    "launch_skew": "is late between its parts", "drift": "becomes slower and slower",
}  # fmt: skip
SHARED = {
    "congestion": "The network is congested for all ranks alike: no host is the culprit",
    "slow_data": "All ranks wait for data", "slow_storage": "Snapshots and checkpoints hold up all ranks",
    "garbage_collection": "Ranks collect garbage out of turn, and the others wait",
    "sequence_imbalance": "Healthy hardware, unbalanced work: sequences are unevenly spread over ranks",
    "expert_imbalance": "Healthy hardware, unbalanced work: experts get unequal numbers of rows",
    "regression": "All ranks became slower at once, for the same work",
    "launch_skew": "Ranks begin their parts at different times, and wait for each other",
}  # fmt: skip
ADVICE = {
    "evict": "replace the host", "repartition": "move layers to other stages", "rebalance": "spread the work evenly",
    "plan_gc": "collect garbage on all ranks at the same step", "check_storage": "look at the storage behind it",
    "check_network": "look at the network between them", "wait": "wait; look again if it stays", "none": "find what changed",
}  # fmt: skip


def detect(table: StepTable) -> Diagnosis:
    """Diagnose the steps of one incarnation."""
    heard = np.isfinite(table.seconds)
    table = table.only(heard.mean(1) > LEAST_HEARD)
    if len(table.steps) < FEWEST_STEPS:
        return _unknown(table, f"{len(table.steps)} steps of which most ranks said something; it takes {FEWEST_STEPS}")
    window = Window.of(table)
    members = [*slow_members(window), *uneven_work(window), *heavy_stage(window)]
    shared = [*shared_waits(window), *unplanned_stops(window), *regression(window), *slow_transfers(window)]
    findings = _consistent(window, members, shared)
    saved = savings(findings, window)
    verdicts = [
        _verdict(window, *pair) for pair in zip(findings, saved, strict=True)
        if pair[1] >= LEAST_SHARE * _since(window, pair[0])
    ]  # fmt: skip
    verdicts.sort(key=lambda verdict: -verdict.share)
    seconds = float(np.median(window.seconds))
    ideal = max(seconds - sum(saved), 0.0)
    notes = (
        [] if window.heard.all() else [f"no telemetry of {int((~window.heard).sum())} of {window.roles.ranks} ranks"]
    )
    return Diagnosis(
        "straggling" if verdicts else "healthy", seconds, ideal, seconds / ideal if ideal else None,
        {"M_W": slowest_workers(window), "M_S": last_stage(window)}, verdicts,
        int(table.steps[0]), int(table.steps[-1]), notes,
    )  # fmt: skip


def _consistent(window: Window, members: Sequence[Finding], shared: Sequence[Finding]) -> list[Finding]:
    """Without those that others explain: where all are concerned by a cause, single ranks are not its culprits, or the other way
    round, whatever costs more; and what waits add up to is no congestion."""
    of_members, of_all = savings(members, window), savings(shared, window)
    kept = []
    for finding, seconds in zip(shared, of_all, strict=True):
        alike = sum(s for other, s in zip(members, of_members, strict=True) if other.cause == finding.cause)
        if seconds > alike:
            kept.append(finding)
    causes = {finding.cause for finding in kept}
    members = [finding for finding in members if finding.cause not in causes]
    begins = {finding.since or 0 for finding in [*members, *kept] if finding.cause != "congestion"}
    return members + [
        finding for finding in kept
        if finding.cause != "congestion" or not (causes & STOPS or _near(finding.since or 0, begins))
    ]  # fmt: skip


def _near(step: int, others: set[int]) -> bool:
    return any(abs(step - other) <= SAME_MOMENT for other in others)


def _unknown(table: StepTable, why: str) -> Diagnosis:
    seconds = float(np.median(nan_median(table.seconds, axis=1))) if len(table.steps) else None
    return Diagnosis("unknown", seconds, None, None, {"M_W": None, "M_S": None}, notes=[f"not enough data: {why}"])


def _since(window: Window, finding: Finding) -> float:
    """Median seconds of the steps since a finding began."""
    return float(np.median(window.seconds[min(finding.since or 0, len(window.seconds) - 1) :]))


def _verdict(window: Window, finding: Finding, saved: float) -> Verdict:
    steps = window.table.steps[min(finding.since or 0, len(window.seconds) - 1) :]
    share = min(saved / _since(window, finding), 1.0)
    action = finding.action or ACTIONS[finding.cause]
    if action == "evict" and share < WORTH_EVICTING:
        action = "wait"
    coverage = float(window.valid.mean())
    return Verdict(
        finding.cause, finding.kind, _culprits(window, finding), _victims(window, finding, saved), share, saved,
        saved * len(steps) * window.roles.ranks / 3600, action, _confidence(finding.sure, coverage),
        _sentence(finding, share, saved, action), finding.evidence, int(steps[0]),
    )  # fmt: skip


def _confidence(sure: float, coverage: float) -> float:
    """From how far evidence is beyond its threshold: a half there, 0.93 at twice it."""
    return round(float(min(0.999, coverage * (1 - 0.5 * np.exp(-2 * (max(sure, 1.0) - 1))))), 3)


def _culprits(window: Window, finding: Finding) -> Sequence[Culprit]:
    roles = window.roles
    if finding.kind == "stage":
        return [Culprit(None, None, finding.stage)]
    if finding.kind == "link":
        return [Culprit(None, host) for host in finding.hosts]
    stage, replica = roles.coordinates.get("pp"), roles.coordinates.get("dp", roles.coordinates.get("fsdp"))
    return [
        Culprit(
            rank, roles.hosts[roles.host[rank]], None if stage is None else int(stage[rank]),
            None if replica is None else int(replica[rank]),
        )
        for rank in finding.ranks
    ]  # fmt: skip


def _victims(window: Window, finding: Finding, saved: float) -> list[int]:
    """Ranks that wait at least half of what the finding costs, those that wait most first."""
    waiting = np.sum([np.nan_to_num(w).mean(0) for w in window.accounting.waiting.values()] or [0.0], axis=0)
    if np.ndim(waiting) == 0:
        return []
    order = np.argsort(-waiting)[: MOST_VICTIMS + len(finding.ranks)]
    culprits = set(finding.ranks) if finding.kind != "stage" else set()
    return [int(r) for r in order if waiting[r] > saved / 2 and int(r) not in culprits][:MOST_VICTIMS]


def _sentence(finding: Finding, share: float, saved: float, action: str) -> str:
    if finding.kind == "rank":
        who = f"Rank {finding.ranks[0]} on {finding.hosts[0]} {NAMES[finding.cause]}"
    elif finding.kind == "host":
        who = f"Host {finding.hosts[0]} {NAMES[finding.cause]}"
    elif finding.kind == "link":
        who = f"The link between {' and '.join(finding.hosts[:2])} {NAMES[finding.cause]}"
    elif finding.kind == "stage":
        who = f"Healthy hardware, unbalanced work: stage {finding.stage} is the heaviest"
    else:
        who = SHARED[finding.cause]
        if finding.ranks:
            who += f", most of it on rank {finding.ranks[0]}"
    return f"{who}. It costs {saved:.3g} s a step ({share:.1%}). What to do: {ADVICE[action]}."
