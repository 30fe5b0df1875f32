"""Answers beside the truth: what a method said of a simulated job, whether it found whom and why, and two rules of others.

Both rules are their formulas only, over the seconds that ranks spent by themselves:
- DLRover (node check): a node is a straggler where its time is above 2 x the median of all nodes.
- nvidia-resiliency-ext: a section's relative score is the least median over all ranks by the rank's own median; the score of the
  GPU is the average of its kernels' scores weighted by their time; below 0.75 it is a straggler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.simulated_faults import Truth
from trainrt.diagnostics.table import COMPUTE, Links, StepTable
from trainrt.diagnostics.verdict import Diagnosis

Array = NDArray[Any]
Detect = Callable[[StepTable], Diagnosis]

WORKLOAD = ("sequence_imbalance", "stage_imbalance", "expert_imbalance")
SECTIONS = ("forward", "backward", "optimizer", "data")


@dataclass(frozen=True, slots=True)
class Claim:
    """Whom a method blames, and for what; None where it does not say."""

    ranks: frozenset[int]
    hosts: frozenset[int]
    stages: frozenset[int]
    cause: str | None = None
    action: str | None = None


Answer = list[Claim]
"""First the worst; empty: no alarm."""


def told(diagnosis: Diagnosis, table: StepTable) -> Answer:
    """What a diagnosis claims where it says straggling or hung; where it says healthy, that the work is unbalanced."""
    alarm = diagnosis.state in ("straggling", "hung")
    claims = []
    for verdict in diagnosis.verdicts:
        if not alarm and (diagnosis.state != "healthy" or verdict.cause not in WORKLOAD):
            continue
        ranks = frozenset(culprit.rank for culprit in verdict.culprits if culprit.rank is not None)
        hosts = {culprit.host for culprit in verdict.culprits if culprit.host is not None}
        numbers = frozenset(table.roles.hosts.index(host) for host in hosts) | _hosts(ranks, table)
        stages = frozenset(culprit.stage for culprit in verdict.culprits if culprit.stage is not None)
        claims.append(Claim(ranks, numbers, stages or _stages(ranks, table), verdict.cause, verdict.action))
    return claims


def _hosts(ranks: frozenset[int], table: StepTable) -> frozenset[int]:
    return frozenset(int(table.roles.host[rank]) for rank in ranks)


def _stages(ranks: frozenset[int], table: StepTable) -> frozenset[int]:
    stage = table.roles.coordinates.get("pp")
    return frozenset() if stage is None else frozenset(int(stage[rank]) for rank in ranks)


def above_twice_the_median(table: StepTable) -> Answer:
    """DLRover's rule over mean own seconds of a step."""
    own = np.nanmean(sum(table.parts.values()), axis=0)
    return _blamed(own > 2 * np.nanmedian(own), table)


def below_three_quarters(table: StepTable) -> Answer:
    """nvidia-resiliency-ext's rule: any section's score, or the score over all compute, below 0.75."""
    scores, weights = {}, {}
    for name in SECTIONS:
        median = np.nanmedian(table.parts[name], axis=0)
        scores[name] = np.nanmin(median) / np.maximum(median, 1e-12)
        weights[name] = np.nansum(table.parts[name], axis=0)
    whole = sum(scores[name] * weights[name] for name in COMPUTE) / sum(weights[name] for name in COMPUTE)
    return _blamed(np.min([*scores.values(), whole], axis=0) < 0.75, table)


def _blamed(slow: Array, table: StepTable) -> Answer:
    ranks = frozenset(map(int, np.flatnonzero(slow)))
    return [Claim(ranks, _hosts(ranks, table), _stages(ranks, table))] if ranks else []


def between(table: StepTable, first: int, end: int) -> StepTable:
    """Rows from `first` to before `end`."""
    head = np.zeros(0, dtype=np.int64) if end <= first else table.steps[first:end]
    kept = (table.links.step >= head.min(initial=1 << 62)) & (table.links.step <= head.max(initial=-1))
    links = Links(*(getattr(table.links, name)[kept] for name in ("step", "source", "target", "bytes", "seconds")))
    parts, communication, work = (
        {name: rows[first:end] for name, rows in kind.items()}
        for kind in (table.parts, table.communication, table.work)
    )
    start, seconds = table.start[first:end], table.seconds[first:end]
    return StepTable(head, table.roles, start, seconds, parts, communication, work, links)


def placed(claim: Claim, truth: Truth) -> bool:
    """It names whom it should: some of the ranks and no other, the hosts, the stage.

    Where all are concerned nobody is wrong, but for a claim that says nothing but whom.
    """
    if truth.stage is not None:
        return claim.stages == {truth.stage}
    if truth.hosts:
        return claim.hosts == truth.hosts
    if truth.ranks:
        return bool(claim.ranks) and claim.ranks <= truth.ranks
    return claim.cause is not None


def explained(claim: Claim, truth: Truth) -> bool:
    return placed(claim, truth) and claim.cause in (None, *truth.causes)


@dataclass(frozen=True, slots=True)
class Score:
    """One answer to one instance. The first claim decides where, why and what to do; None where that was not to be said.

    all_found: each of the truths has its claim. wrong_claims: those that fit no truth.
    """

    alarm: bool
    where: bool | None
    why: bool | None
    action: bool | None
    cause: str
    all_found: bool
    wrong_claims: int

    @property
    def named(self) -> bool:
        return self.alarm and self.where is not False

    @property
    def right(self) -> bool:
        return self.named and self.why is not False


def score(answer: Answer, truths: Sequence[Truth]) -> Score:
    wrong = sum(not any(explained(claim, truth) for truth in truths) for claim in answer)
    found = all(any(explained(claim, truth) for claim in answer) for truth in truths)
    if not answer:
        return Score(False, None, None, None, "none", found, wrong)
    first = answer[0]
    cause = first.cause or "unsaid"
    if not truths:
        return Score(True, False, False, None, cause, found, wrong)
    named = [truth for truth in truths if first.cause in truth.causes]
    aims = [truth for truth in named or truths if placed(first, truth)]
    where = bool(aims) if first.cause is None or any(truth.placed for truth in named or truths) else None
    why = bool(named) if first.cause else None
    action = any(first.action in truth.actions for truth in aims or named) if first.action else None
    return Score(True, where, why, action, cause, found, wrong)


def noise_of(table: StepTable) -> float:
    """Standard deviation of log own compute of a step: over peers, less what a rank always is.

    By the median of absolute deviations.
    """
    own = np.log(table.parts["forward"] + table.parts["backward"])
    peers = table.roles.peers()
    for role in np.unique(peers):
        own[:, peers == role] -= np.nanmedian(own[:, peers == role], axis=1, keepdims=True)
    own -= np.nanmedian(own, axis=0)
    return float(1.4826 * np.nanmedian(np.abs(own)))


def strength(table: StepTable, twin: StepTable, since: int) -> tuple[float, float]:
    """What a fault does, beside the same job without: signal over noise, and its cost as a share of a step.

    The signal is the most that it adds to a rank's own seconds, over what is noise in those of a step when the work is known;
    where it adds nothing to anyone's own seconds, what it adds to a step over the noise of steps.
    """
    own, without = (sum(kind.values()) for kind in (table.parts, twin.parts))
    more = np.nanmax(np.abs(np.nanmean((own - without)[since:], axis=0)))
    steps, usual = (np.nanmedian(kind.seconds, axis=1) for kind in (table, twin))
    cost = float(np.nanmean(steps[since:]) / np.nanmean(usual[since:]) - 1)
    noise = noise_of(twin) * float(np.nanmedian(without))
    if more < 0.1 * noise:
        more, noise = cost * np.nanmean(usual), 1.4826 * np.median(np.abs(usual - np.median(usual)))
    return float(more / noise), cost
