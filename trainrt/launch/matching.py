"""What the calls of all ranks add to a fault: read by agents, matched by `diagnostics.hang`, said in messages and written down.

Calls explain hangs, and faults that are no hang but come of a mismatched call: gloo ends a process with SIGABRT where more
bytes arrive than it expects, and its peers only lose a connection.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from typing import Any

from trainrt.diagnostics import hang
from trainrt.diagnostics.verdict import Culprit, Diagnosis, Verdict
from trainrt.launch.symptoms import Symptoms
from trainrt.parallel.calls import Calls


def calls_of(ranks: Mapping[int, Mapping[str, Any]], *, incarnation: int) -> dict[int, Calls]:
    """An agent's answer, without what is left of other incarnations."""
    found = {rank: Calls.from_json(document) for rank, document in ranks.items()}
    return {rank: calls for rank, calls in found.items() if calls.incarnation == incarnation}


def may_be_mismatched(symptoms: Symptoms) -> bool:
    """Whether these symptoms can come of a mismatched call: an exception, a crash, or peers lost by all and for no reason."""
    if symptoms.nodes or symptoms.hang is not None or symptoms.ended_by_us:
        return False
    crashes = [how for how in symptoms.exits.values() if how.code not in (None, -signal.SIGKILL) and how.why is None]
    errors = [error for error in symptoms.errors.values() if error.kind == "user_error"]
    return bool(crashes or errors or not symptoms.explained)


def mismatch(calls: Mapping[int, Calls]) -> hang.Finding | None:
    """A call that differs for certain; that ranks are missing from calls follows from any fault."""
    found = hang.find(calls)
    return found if found is not None and found.kind == "mismatch" and found.confidence == hang.CERTAIN else None


def signature(found: hang.Finding) -> str:
    """Equal where the same calls of the program are in the same relation."""
    return f"{found.kind} {[(one.call.kind, one.group, one.call.site) for one in found.made]}"


def diagnosis(verdict: Verdict) -> Diagnosis:
    """What is written at the moment of a hang: no step goes on, so that there is nothing to measure."""
    return Diagnosis("hung", None, None, None, {}, [verdict], last_step=verdict.since_step)


def verdict_by_stacks(
    culprits: tuple[int, ...],
    victims: tuple[int, ...],
    message: str,
    *,
    hosts: Mapping[int, str],
    stopped: bool,
    step: int,
) -> Verdict:
    """A hang of which the calls say nothing: who it is was told from the stacks."""
    return Verdict(
        cause="hang", kind="rank", culprits=[Culprit(rank, hosts.get(rank)) for rank in culprits], victims=list(victims),
        share=1.0, seconds_a_step=0.0, cost_device_hours=0.0, action="evict" if stopped else "none",
        confidence=hang.CERTAIN if stopped else hang.PERHAPS, sentence=message, evidence=[], since_step=step,
    )  # fmt: skip
