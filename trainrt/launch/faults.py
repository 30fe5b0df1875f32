"""Faults: from the first symptom to seats for all ranks again. What a step of this means for the run's state, the driver says.

A hang is found in silence, the other symptoms are told. Once every rank is accounted for they amount to one fault, which is
judged: an incident, and either the reason why the run must stop or the moment at which it goes on.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable

from trainrt.config import JobConfig
from trainrt.diagnostics import verdict as diagnostics
from trainrt.diagnostics.hang import verdict_of
from trainrt.errors import PlanError, TrainrtError
from trainrt.launch.display import Display
from trainrt.launch.ground import Ground
from trainrt.launch.hangs import Ask, Verdict, Watch
from trainrt.launch.incarnation import Incarnation
from trainrt.launch.incidents import Incident, Ledger
from trainrt.launch.machine import Diagnosing
from trainrt.launch.matching import calls_of, diagnosis, may_be_mismatched, mismatch, signature
from trainrt.launch.publish import Status
from trainrt.launch.recovery import Patience, last_compared
from trainrt.launch.request import Previous
from trainrt.launch.stacks import render
from trainrt.launch.symptoms import Fault, Mismatch, Symptoms
from trainrt.run_dir import now, replace, write_json

RELEASE_SECONDS = 0.15
"""Ranks that have not parked by then may be waiting for a commit that never comes; the stores let them go."""
PARK_SECONDS = 2.0
"""How long ranks may take to notice that a peer is gone before they are ended: a new one costs a fork."""
EXPLAIN_SECONDS = 3.0
"""How long to wait for the cause (a node's death takes Ray a second) when ranks only say that peers are gone."""
GIVE_UP_SECONDS = 30.0
STORES_SECONDS = 5.0
"""How long a recovery waits for stores that died with their ranks and are started again: those take in what is decoded."""


class Faults:
    """`find_hang` looks for a symptom that nobody tells; then come `understood`, `judge`, `may_resume` and `reseat`."""

    def __init__(
        self, ground: Ground, config: JobConfig, *, watch: Watch, ledger: Ledger, status: Status, display: Display
    ) -> None:
        self._ground, self._config, self._run_dir = ground, config, ground.run_dir
        self._watch, self._ledger, self._status, self._display = watch, ledger, status, display
        self._patience = Patience()

    # Before a start.

    def driver_lost(self, previous: Previous, *, adopted: bool, at: float) -> None:
        """adopted: agents and stores of the earlier driver were there."""
        what = "agents and stores were taken over" if adopted else "no cluster was left to take over"
        message = f"the driver of incarnation {previous.incarnation} ended without a word; {what}"
        step, age = self._status.fields["step"], max(0.0, now() - previous.time)
        self._ledger.open(Incident("driver_loss", message, at, step=step, detected_seconds=age))

    def unfit(self, nodes: Iterable[str]) -> dict[str, str]:
        """Which of the nodes get no ranks, and why."""
        vetted = self._ground.vetting.result(list(nodes))
        for text in [*(f"node {node} is left out: {why}" for node, why in vetted.unfit.items()), vetted.remark]:
            if text:
                self._display.line(text, style="yellow")
        return vetted.unfit

    def leave_out(self, unfit: dict[str, str], names: list[str], *, at: float) -> list[str]:
        """Unfit nodes are lost before they had a rank. Returns the other names."""
        spare = len(names) - self._config.cluster.nodes
        for node, why in unfit.items():
            self._ground.lose(node)
            message, step = f"node {node} is left out: {why}", self._status.fields["step"]
            action = "replace" if len(unfit) <= spare else "shrink"
            self._ledger.open(Incident("node_loss", message, at, nodes=[node], step=step, action=action))
        return [name for name in names if name not in unfit]

    # Hangs.

    def find_hang(self, running: Incarnation, at: float) -> Symptoms | None:
        """A rank that is silent for too long: look at all stacks, then end whoever keeps the others waiting."""
        nodes = set(running.seats.values())
        found = self._watch.look(at, completed=running.completed, agents_answer=self._ground.fleet.answers(nodes))
        match found:
            case Ask():
                self._ground.fleet.tell("take_stacks", dict.fromkeys(nodes, (found.number,)))
            case Verdict():
                return self._end_culprits(found, running)
        return None

    def _end_culprits(self, found: Verdict, running: Incarnation) -> Symptoms:
        """Keep the stacks, and end the culprits: that frees the others."""
        hang, path = found.hang, self._run_dir.stacks(running.number)
        replace(path, render(f"incarnation {running.number}: {hang.message}", found.finding))
        self._write_diagnosis(found.verdict(running.seats, step=running.completed))
        ranks: dict[str, list[int]] = {}
        for rank in hang.ranks:
            ranks.setdefault(running.seats[rank], []).append(rank)
        self._ground.fleet.tell("kill", {node: (those,) for node, those in ranks.items()})
        symptoms = Symptoms(running.seats)
        symptoms.hang = dataclasses.replace(hang, message=f"{hang.message}; stacks: {path}")
        return symptoms

    # From symptoms to a fault.

    def understood(self, state: Diagnosing, running: Incarnation, *, waited: float) -> bool:
        """Whether every rank is accounted for, and the cause is known, or known to stay unknown. Helps it along.

        Raises TrainrtError where ranks can neither be reached nor ended.
        """
        symptoms = state.symptoms
        unaccounted = symptoms.unaccounted()
        if symptoms.concerns_nodes and not state.vetted:
            state.vetted = True
            self._ground.vetting.begin_again(node for node in running.nodes if node not in symptoms.nodes)
        if unaccounted:
            if waited > RELEASE_SECONDS:
                running.abandon(lost=symptoms.nodes)
            if waited > PARK_SECONDS and not state.killed:
                state.killed = True
                symptoms.ended_by_us.update(unaccounted)
                self._ground.fleet.tell("kill", {running.seats[rank]: (unaccounted,) for rank in unaccounted})
            if waited > GIVE_UP_SECONDS:
                raise TrainrtError(f"ranks {unaccounted} can neither be reached nor ended")
            return False
        return symptoms.explained or bool(symptoms.ended_by_us) or waited >= EXPLAIN_SECONDS

    def judge(self, state: Diagnosing, running: Incarnation) -> None:
        """Name the fault, and decide whether to try again, and when."""
        if may_be_mismatched(state.symptoms):
            self._match_calls(state.symptoms, running)
        fault = state.symptoms.fault()
        incident = Incident(
            fault.kind, fault.message, state.since, ranks=list(fault.ranks), nodes=list(fault.nodes),
            step=running.completed, detected_seconds=fault.detected_seconds, action=fault.action,
        )  # fmt: skip
        if fault.kind == "silent_corruption":
            believed = last_compared(self._config, completed=running.completed)
            self._ground.stores.distrust(incarnation=self._status.fields["incarnation"], above=believed)
        running.doubted = running.doubted or fault.kind == "storage"
        self._status.set(message=fault.message)
        state.failure = self._patience.fault(fault, completed=running.completed)
        state.resume_at = time.monotonic() + self._patience.delay_seconds
        if state.failure is None:
            self._ledger.open(incident)
            self._display.line(first_words(fault, step=running.completed))
        else:
            self._ledger.stop(incident)
            if fault.kind == "user_error":
                state.failure += f"; traceback: {self._run_dir.log(fault.ranks[0])}"

    def _match_calls(self, symptoms: Symptoms, running: Incarnation) -> None:
        """Look whether a mismatched call can have led to this."""
        seats = running.seats
        answers = self._ground.fleet.call("last_calls", dict.fromkeys(set(seats.values()), ()))
        ranks = {rank: log for answer in answers.values() for rank, log in answer.items() if rank in seats}
        found = mismatch(calls_of(ranks, incarnation=self._status.fields["incarnation"]))
        if found is not None:
            verdict = verdict_of(found, hosts=seats, since_step=running.completed)
            symptoms.mismatch = Mismatch(found.culprits, verdict.sentence, signature(found))
            self._write_diagnosis(verdict)

    def _write_diagnosis(self, verdict: diagnostics.Verdict) -> None:
        write_json(self._run_dir.diagnosis, diagnosis(verdict).to_json())

    # Going on.

    def may_resume(self, state: Diagnosing, running: Incarnation, *, waited: float) -> bool:
        """Whether it is time to go on, and the stores are back, or have been waited for."""
        if state.resume_at is None or time.monotonic() < state.resume_at:
            return False
        return waited >= STORES_SECONDS or not running.stores_absent(but=state.symptoms.nodes)

    def reseat(self, state: Diagnosing, running: Incarnation, *, check: Callable[[], None]) -> None:
        """Give the ranks of lost and unfit nodes other seats. Raises TrainrtError where too few nodes are left."""
        incident = self._ledger.last()
        lost = list(state.symptoms.nodes)
        unfit = self.unfit(node for node in running.nodes if node not in lost) if state.vetted else {}
        if unfit:
            incident.nodes = sorted({*incident.nodes, *unfit})
            incident.message += "".join(f"; node {node} is left out: {why}" for node, why in unfit.items())
        if lost or unfit:
            try:
                incident.action = running.replace(lost, unfit=unfit, check=check)
            except PlanError as error:
                incident.action = "stop"
                message = f"{incident.message}; no spare is left and the mesh cannot shrink: {error}"
                raise TrainrtError(message) from error
            write_json(self._run_dir.plan, running.plan.to_json())


def first_words(fault: Fault, *, step: int) -> str:
    """A fault on the terminal, as it happens. An exception of the user's is told once: when it comes again."""
    if fault.kind == "user_error":
        ranks = ", ".join(map(str, fault.ranks))
        return f"user_error: an exception on rank {ranks} after step {step}; one more try from the same state"
    return f"{fault.kind}: {fault.message}"
