"""The driver: one process that brings a run up, listens, decides and writes the run directory.

Its states and what may follow on what are `machine.py`'s. The driver turns events into the next state;
everything else is done by the parts it holds: `Ground` (cluster, agents, stores), `Incarnation` (who
sits where, what is completed), `Ledger` (incidents), `Status` and `Processes` (files), `Terminal`.
"""

from __future__ import annotations

import dataclasses
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from trainrt.diagnostics import verdict as diagnostics
from trainrt.diagnostics.hang import verdict_of
from trainrt.errors import ConfigError, PlanError, TrainrtError, UserError
from trainrt.launch.dashboard import Dashboard
from trainrt.launch.eviction import Eviction, Evictions
from trainrt.launch.ground import Code, Ground
from trainrt.launch.hangs import Ask, Verdict, Watch
from trainrt.launch.head import HeadWatch, succeed
from trainrt.launch.incarnation import Incarnation, Planner
from trainrt.launch.incidents import Incident, Ledger
from trainrt.launch.inspection import Inspector
from trainrt.launch.logs import LogMonitor
from trainrt.launch.machine import (
    Diagnosing,
    Event,
    Failed,
    Final,
    Finished,
    FromNode,
    Interrupted,
    NodeLost,
    Recovering,
    Running,
    Starting,
    State,
    StopAsked,
    Tick,
    check,
    published,
)
from trainrt.launch.matching import calls_of, diagnosis, may_be_mismatched, mismatch, signature
from trainrt.launch.protection import Protection
from trainrt.launch.publish import Processes, Status, append_metrics
from trainrt.launch.record import Folder
from trainrt.launch.recovery import Patience, last_compared
from trainrt.launch.reliability import Reliability
from trainrt.launch.request import Previous, Request, look_back, write_config
from trainrt.launch.stacks import Stack, render
from trainrt.launch.symptoms import Error, Exit, Fault, Mismatch, Symptoms
from trainrt.launch.telemetry import FLUSH_SECONDS, Telemetry
from trainrt.launch.terminal import Terminal, next_command
from trainrt.run_dir import now, replace, write_json

TICK_SECONDS = 0.1
RELEASE_SECONDS = 0.15
"""Ranks that have not parked by then may be waiting for a commit that never comes; the stores let them go."""
PARK_SECONDS = 2.0
"""How long ranks may take to notice that a peer is gone before they are ended: a new one costs a fork."""
EXPLAIN_SECONDS = 3.0
"""How long to wait for the cause (a node's death takes Ray a second) when ranks only say that peers are gone."""
GIVE_UP_SECONDS = 30.0
NODES_SECONDS = 2.0
STORES_SECONDS = 5.0
"""How long a recovery waits for stores that died with their ranks and are started again: those take in what is decoded."""
TERMINATED, CTRL_C = 75, 130
SIGNALS = {signal.SIGTERM: StopAsked("SIGTERM", TERMINATED), signal.SIGINT: StopAsked("Ctrl-C", CTRL_C)}


class Stopped(Exception):
    """Raised out of waiting while the run comes up: somebody asked it to stop."""


def run(request: Request) -> int:
    """Run a job to its end. Returns the exit code; raises UserErrors for wrong input, before anything starts."""
    request.run_dir.create()
    request.run_dir.lock()
    try:
        previous = look_back(request)
        terminal = Terminal()
        if previous is not None and previous.state == "finished" and request.config.run.steps <= previous.step:
            terminal.line(f"{request.run_dir}: finished at step {previous.step}; run.steps = more goes on")
            return 0
        request.run_dir.stop_request.unlink(missing_ok=True)
        write_config(request)
        return Driver(request, previous, terminal).run()
    finally:
        request.run_dir.unlock()


class Driver:
    """One launch, from nothing to a final state."""

    def __init__(self, request: Request, previous: Previous | None, terminal: Terminal) -> None:
        self.request, self.config, self.run_dir = request, request.config, request.run_dir
        self.previous, self.terminal = previous, terminal
        self.began = time.monotonic()
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.run_id = previous.run_id if previous is not None else new_run_id()
        self.phases: dict[str, float] = {}
        self.tidied_at = 0.0
        self.status = Status(
            self.run_dir, run_id=self.run_id, steps=self.config.run.steps,
            step=previous.step if previous is not None else 0,
            incarnation=previous.incarnation if previous is not None else 0,
        )  # fmt: skip
        self.processes = Processes(self.run_dir)
        self.telemetry = Telemetry(self.run_dir)
        self.patience = Patience()
        self.watch = Watch(least_seconds=self.config.diagnostics.hang_seconds)
        self.stop: StopAsked | None = None
        self.growing = False
        self.leaving: Eviction | None = None
        self.looked_for_nodes = 0.0
        self.checkpoint: str | None = None
        self.entropy: float | None = None
        self.last_metrics: dict[str, Any] | None = None
        self.dashboard: Dashboard | None = None
        self.logs: LogMonitor | None = None
        self.inspector: Inspector | None = None
        self.evictions = Evictions(
            self.run_dir, automatic=self.config.diagnostics.evict == "automatic", tell=terminal.line
        )
        self.head: HeadWatch | None = None
        self.now_running: Incarnation | None = None
        folder = Folder(self.run_dir)
        folder.create()
        self.reliability = Reliability(self.run_dir, self.config)
        self.ledger = Ledger(self.run_dir, folder.open_incidents, tell=self._tell)
        self.protection = Protection(self.config, self.ledger)
        code = Code(request.entry, request.preload, request.runtime_env())
        self.ground = Ground(self.run_dir, self.config, code, run_id=self.run_id, put=self.events.put)
        self.planner = Planner(self.config)

    # From the first to the last state.

    def run(self) -> int:
        state: State = Starting(self.began)
        with self._signals():
            try:
                state = self._guarded(self._start, state)
                while not isinstance(state, Final):
                    event = self._next_event()
                    state = self._guarded(lambda event=event, state=state: self._handle(state, event), state)
                    if isinstance(state, (Starting, Running, Recovering)):
                        state = self._guarded(lambda state=state: self._look_for_hangs(state), state)
                    self._look_for_nodes(state)
                    self._look_for_evictions(state)
                    if isinstance(state, Diagnosing):
                        state = self._guarded(lambda state=state: self._diagnose(state), state)
            finally:
                self._close(state)
        return self._report(state)

    def _guarded(self, step: Any, before: State) -> State:
        """The next state, checked and published; errors with a message become the state Failed."""
        try:
            after: State = step()
        except Stopped:
            assert self.stop is not None
            after = Interrupted(f"{self.stop.reason}: stopped before the first step", self.stop.exit_code)
        except TrainrtError as error:
            after = Failed(str(error), error.exit_code)
        check(before, after)
        if type(after) is not type(before):
            self._enter(after)
        return after

    def _enter(self, state: State) -> None:
        if isinstance(state, Running):
            self._recovered()
        if not isinstance(state, Final):
            message = "" if isinstance(state, Running) else self.status.fields["message"]
            self.status.set(state=published(state), message=message)
            self.terminal.state(published(state))

    # Coming up.

    def _start(self) -> State:
        """Cluster and plan at the same time; then agents, then the first incarnation."""
        self.status.set(state="starting", message="starting the cluster")
        adopted = self.ground.begin(self.previous.record if self.previous is not None else None)
        self.planner.begin()
        try:
            self.ground.connect(check=self._check_start)
            self.head = HeadWatch(self.ground.cluster.address, lost=self._on_head_lost)
            # Ray puts a handler of its own on SIGTERM.
            self._listen()
            names = self.ground.come_up(adopt=adopted, check=self._check_start, phase=self._phase)
        finally:
            preflight = self.planner.result(check=self._check_start)
        self._phase("plan")
        names = self._without_unfit(names)
        if self.previous is not None:
            self.status.fields["step"] = max(self.status.fields["step"], self.run_dir.take_journal())
        self.entropy = preflight.unigram_entropy
        self.status.set(message="starting the workers", unigram_entropy=self.entropy)
        self.terminal.plan(f"run {self.config.run.name} in {self.run_dir}", self._plan_rows(preflight.plan))
        self.terminal.begin_progress(step=self.status.fields["step"], steps=self.config.run.steps)
        self.logs = LogMonitor(self.run_dir.logs, write=self.terminal.line, node_of=self._node_of)
        if self.previous is not None and self.previous.cut_off and not self.request.handed_over:
            self._driver_loss(self.previous, adopted=adopted)
        self.now_running = Incarnation(
            self.ground, self.config, self.planner, names=names, number=self.status.fields["incarnation"],
            run_id=self.run_id, completed=self.status.fields["step"], reliability=self.reliability,
        )  # fmt: skip
        self._order()
        return Starting(self.began)

    def _without_unfit(self, names: list[str]) -> list[str]:
        """The nodes that pass their self-checks; the others are lost before they had a rank."""
        unfit = self._unfit(names)
        self._phase("selfcheck")
        spare = len(names) - self.config.cluster.nodes
        for node, why in unfit.items():
            self.ground.lose(node)
            message, step = f"node {node} is left out: {why}", self.status.fields["step"]
            action = "replace" if len(unfit) <= spare else "shrink"
            self.ledger.open(Incident("node_loss", message, self.began, nodes=[node], step=step, action=action))
        return [name for name in names if name not in unfit]

    def _unfit(self, nodes: list[str]) -> dict[str, str]:
        vetted = self.ground.vetting.result(nodes)
        for text in [*(f"node {node} is left out: {why}" for node, why in vetted.unfit.items()), vetted.remark]:
            if text:
                self.terminal.line(text, style="yellow")
        return vetted.unfit

    def _plan_rows(self, plan: Any) -> list[tuple[str, str]]:
        write_json(self.run_dir.plan, plan.to_json())
        rows = list(plan.table())
        if self.entropy is not None:
            rows.append(("unigram entropy", f"{self.entropy:.4f} nats: what a model knows that only counts bytes"))
        return rows

    def _driver_loss(self, previous: Previous, *, adopted: bool) -> None:
        what = "agents and stores were taken over" if adopted else "no cluster was left to take over"
        message = f"the driver of incarnation {previous.incarnation} ended without a word; {what}"
        age = max(0.0, now() - previous.time)
        step = self.status.fields["step"]
        self.ledger.open(Incident("driver_loss", message, self.began, step=step, detected_seconds=age))

    def _on_head_lost(self, silent_seconds: float) -> None:
        """Called from the watch's thread, while this one may be stuck in Ray: hand over, or end with the state in memory."""
        address, at = self.ground.cluster.address, time.monotonic()
        message = f"the Ray head at {address} is lost"
        step = self.status.fields["step"]
        self.ledger.open(Incident("node_loss", message, at, step=step, detected_seconds=silent_seconds))
        if self.dashboard is not None:
            self.dashboard.close()
        self.terminal.end_progress()
        if self.request.own_process and self.ground.record.embedded:
            self.terminal.line(f"node_loss: {message}; a new cluster is started, and the stores keep step {step}")
            self.status.set(state="recovering", message=message)
            succeed(self.request)
        grace = self.config.cluster.driver_grace_seconds
        message += (
            f"; the stores keep step {step} for {grace:.0f} s: within them, {self.request.command} goes on from memory, on a "
            "cluster of the same hosts; later, from the newest checkpoint"
        )
        self.status.set(state="failed", message=message)
        print(f"trainrt: {message}", file=sys.stderr, flush=True)
        # Ray would end this process too, later and without a word.
        os._exit(TrainrtError.exit_code)

    def _check_start(self) -> None:
        """While the run comes up: hear the signals, and errors of the plan as soon as they are known."""
        self._housekeeping()
        self.planner.check()
        kept = []
        while not self.events.empty():
            event = self.events.get()
            if isinstance(event, StopAsked):
                self.stop = event
            else:
                kept.append(event)
        for event in kept:
            self.events.put(event)
        if self.stop is not None:
            raise Stopped

    def _phase(self, name: str) -> None:
        self.phases[name] = round(time.monotonic() - self.began, 3)

    # Events.

    def _next_event(self) -> Event:
        if time.monotonic() - self.tidied_at > TICK_SECONDS:
            self._housekeeping()
        try:
            return self.events.get(timeout=TICK_SECONDS)
        except queue.Empty:
            return Tick()

    def _handle(self, state: State, event: Event) -> State:
        match event:
            case StopAsked():
                return self._on_stop(state, event)
            case NodeLost():
                return self._on_node_lost(state, event)
            case FromNode():
                return self._on_news(state, event)
            case Tick():
                return state

    def _on_stop(self, state: State, event: StopAsked) -> State:
        first, self.stop = self.stop is None, event
        if not first:
            return Interrupted(f"{event.reason}: stopped at once", event.exit_code)
        running = self._running()
        self.terminal.line(f"{event.reason}: a checkpoint, then the end (again: at once)")
        self.status.set(message=f"{event.reason}: stopping with a checkpoint")
        if isinstance(state, Starting) and running.origin.kind not in ("memory", "parity"):
            return Interrupted(f"{event.reason}: stopped before the first step", event.exit_code)
        if isinstance(state, Running):
            self.ground.fleet.call_all("stop")
        return state

    def _on_node_lost(self, state: State, event: NodeLost) -> State:
        running = self._running()
        if event.node not in self.ground.fleet.nodes:
            return state
        if event.node not in running.seats.values():
            self.ground.lose(event.node)
            running.drop_spare(event.node)
            self.terminal.line(f"spare node {event.node} is lost: {event.message}")
            return state
        diagnosing = self._symptom(state, event.at)
        diagnosing.symptoms.nodes[event.node] = (event.message, event.silent_seconds)
        return diagnosing

    def _on_news(self, state: State, event: FromNode) -> State:
        what = event.what
        match what["type"]:
            case "said":
                return self._on_said(state, event, what["rank"], what["message"])
            case "exited" if what["incarnation"] == self.status.fields["incarnation"]:
                diagnosing = self._symptom(state, event.at)
                age = max(0.0, now() - what["time"])
                diagnosing.symptoms.exits[what["rank"]] = Exit(what["code"], age, what["why"])
                return diagnosing
            case "zygote":
                self.phases["imports"] = max(self.phases.get("imports", 0.0), round(what["seconds"], 3))
            case "zygote_ended":
                if isinstance(state, Starting) and what["message"].strip():
                    raise TrainrtError(f"node {event.node}: workers cannot be made:\n{what['message'].strip()}")
            case "stopped" if what["rank"] is not None:
                self.watch.stopped(what["rank"], what["stopped"], event.at)
            case "stopped":
                if self.watch.store_stopped(event.node, what["stopped"]):
                    self.terminal.line(f"the store of node {event.node} is stopped, and is ended")
                    self.ground.fleet.tell("kill_store", {event.node: ()})
            case "stacks":
                taken = {rank: Stack.from_json(stack) for rank, stack in what["ranks"].items()}
                self.watch.stacks(
                    what["number"], taken, calls_of(what["calls"], incarnation=self.status.fields["incarnation"])
                )
            case "store_ended":
                self.ground.store_changed(event.node, None)
                self.protection.store_lost(event.node, at=event.at, step=self._running().completed)
                self.terminal.line(f"the store of node {event.node} died and is started again")
            case "store_started":
                self.ground.store_changed(event.node, what["store"])
                self._running().configure_stores()
            case "link":
                self.telemetry.link(event.node, what["link"])
            case "store_failed":
                self.terminal.line(f"the store of node {event.node} does not come back: {what['message']}")
        return state

    def _on_said(self, state: State, event: FromNode, rank: int, message: dict[str, Any]) -> State:
        running = self._running()
        match message["op"]:
            case "metrics":
                self._on_metrics(message["line"])
            case "incident":
                self.ledger.write({**message["incident"], "time": now()})
            case "step":
                self.telemetry.summary(message["summary"])
        if message["incarnation"] != self.status.fields["incarnation"]:
            return state
        self.watch.heard(rank, message, time.monotonic())
        match message["op"]:
            case "step":
                if running.progress.step(rank, message["step"]):
                    return self._stepped(state)
            case "phase":
                self.phases[message["name"]] = max(self.phases.get(message["name"], 0.0), round(message["seconds"], 3))
                if message["name"] == "restore":
                    self.ledger.has_read(message["seconds"])
            case "read":
                self._on_read({key: message[key] for key in ("read", "wanted", "stored")})
            case "lost":
                diagnosing = self._symptom(state, event.at)
                diagnosing.symptoms.parked[rank] = message["message"]
                return diagnosing
            case "error":
                diagnosing = self._symptom(state, event.at)
                diagnosing.symptoms.errors[rank] = Error(
                    message["kind"], message["message"], message["traceback"],
                    rollback=message.get("rollback", False), ranks=tuple(message.get("ranks", ())),
                )  # fmt: skip
                if self.logs is not None:
                    self.logs.report(message["message"])
                return diagnosing
            case "finished":
                self.checkpoint = message["checkpoint"] or self.checkpoint
                running.finished[rank] = message["outcome"]
                if len(running.finished) == running.world_size and not isinstance(state, Diagnosing):
                    return self._all_finished(message["step"])
        return state

    # Steps.

    def _stepped(self, state: State) -> State:
        """All ranks completed one more step."""
        running = self._running()
        self.status.step(running.completed)
        if isinstance(state, Starting):
            self._phase("total")
            self.status.set(start=self.phases)
            return Running(time.monotonic())
        return Running(time.monotonic()) if isinstance(state, Recovering) else state

    def _recovered(self) -> None:
        """Steps are being completed (again)."""
        self.ledger.stepped()
        if self.inspector is None:
            self.inspector = Inspector(self.run_dir, tell=self.terminal.line)
        if self.dashboard is None and self.config.diagnostics.dashboard:
            self.dashboard = Dashboard(self.run_dir, port=self.config.diagnostics.port)
            self.terminal.line(f"live page: {self.dashboard.address}")
            self.status.set(dashboard=self.dashboard.address)
        if self.stop is not None:
            self.ground.fleet.call_all("stop")

    def _on_metrics(self, line: dict[str, Any]) -> None:
        append_metrics(self.run_dir, line)
        self.last_metrics = line
        self.reliability.line(line)
        self.status.fields["effective_time"] = self.reliability.effective_time()
        self.terminal.metrics(line, steps=self.config.run.steps)

    def _on_read(self, reading: dict[str, int]) -> None:
        """The state came from a checkpoint; see `Reading`."""
        self.status.set(restored_bytes=reading)
        read, stored = reading["read"] / 1e6, reading["stored"] / 1e6
        times = reading["read"] / max(1, reading["wanted"])
        self.terminal.line(
            f"state read from disk: {read:.1f} MB of {stored:.1f} MB, each wanted byte {times:.2f} times"
        )

    def _tell(self, incident: dict[str, Any]) -> None:
        """An incident is over."""
        self.reliability.seen(incident)
        self.terminal.incident(incident)

    def _all_finished(self, step: int) -> State:
        self.ledger.stepped()
        self.status.step(step)
        outcomes = set(self._running().finished.values())
        if outcomes == {"finished"} or self.stop is not None:
            self.ground.fleet.call_all("end_workers", at_once=False)
        if outcomes == {"finished"}:
            return Finished(f"finished at step {step}")
        if self.stop is None:
            return self._grow() if self.leaving is None else self._evict(self.leaving)
        return Interrupted(f"{self.stop.reason}: stopped at step {step} with a checkpoint", self.stop.exit_code)

    # Growing again.

    def _look_for_nodes(self, state: State) -> None:
        """Where nodes were lost and one has come (back): all ranks stop after their step, and are seated anew."""
        at = time.monotonic()
        if not isinstance(state, Running) or self.stop is not None or self.growing or not self._running().incomplete:
            return
        if at - self.looked_for_nodes > NODES_SECONDS:
            self.looked_for_nodes = at
            if self.ground.waiting():
                self.growing = True
                self.terminal.line("a node has come: all ranks stop after this step, and go on with it")
                self.ground.fleet.call_all("stop")

    def _grow(self) -> State:
        """All ranks stopped, their state is in memory and on disk: go on with the nodes that are there now."""
        running, at = self._running(), time.monotonic()
        nodes = running.grow(check=self._check_start)
        message = f"went on with {', '.join(nodes) or 'the same nodes'}"
        self.ledger.open(Incident("node_loss", message, at, nodes=nodes, step=running.completed, action="grow"))
        write_json(self.run_dir.plan, running.plan.to_json())
        self.run_dir.take_journal()
        self._order()
        return Recovering(at)

    # Evictions.

    def _look_for_evictions(self, state: State) -> None:
        """Where a host is to leave: all ranks stop after their step, and are seated anew."""
        if not isinstance(state, Running) or self.stop is not None or self.growing or self.leaving is not None:
            return
        newest = None if self.inspector is None else self.inspector.newest
        self.leaving = self.evictions.wanted(newest, hosts=self.ground.fleet.nodes, now=time.monotonic())
        if self.leaving is not None:
            self.terminal.line(f"evict host={self.leaving.host}: all ranks stop after this step, and go on without it")
            self.ground.fleet.call_all("stop")

    def _evict(self, leaving: Eviction) -> State:
        """All ranks stopped, their state is in memory and on disk: go on without a host."""
        running, at = self._running(), time.monotonic()
        incident = Incident(
            "node_loss", f"{leaving.host} was evicted: {leaving.why}", at, ranks=list(leaving.ranks), nodes=[leaving.host],
            step=running.completed,
        )  # fmt: skip
        try:
            incident.action = running.evict(leaving.host, check=self._check_start)
            write_json(self.run_dir.plan, running.plan.to_json())
        except PlanError as error:
            incident.action, incident.message = (
                "skip",
                f"{leaving.host} was not evicted, the mesh cannot shrink: {error}",
            )
        self.evictions.done(at)
        self.ledger.open(incident)
        self.run_dir.take_journal()
        self._order()
        return Recovering(at)

    # Faults.

    def _look_for_hangs(self, state: State) -> State:
        """A rank that is silent for too long: look at all stacks, then end whoever keeps the others waiting."""
        running = self._running()
        nodes = set(running.seats.values())
        at = time.monotonic()
        found = self.watch.look(at, completed=running.completed, agents_answer=self.ground.fleet.answers(nodes))
        match found:
            case Ask():
                self.ground.fleet.tell("take_stacks", dict.fromkeys(nodes, (found.number,)))
            case Verdict():
                return self._hung(found, at)
        return state

    def _hung(self, found: Verdict, at: float) -> State:
        """Keep the stacks, and end the culprits: that frees the others."""
        hang, path = found.hang, self.run_dir.stacks(self._running().number)
        replace(path, render(f"incarnation {self._running().number}: {hang.message}", found.finding))
        self._write_diagnosis(found.verdict(self._running().seats, step=self._running().completed))
        ranks: dict[str, list[int]] = {}
        for rank in hang.ranks:
            ranks.setdefault(self._running().seats[rank], []).append(rank)
        self.ground.fleet.tell("kill", {node: (those,) for node, those in ranks.items()})
        symptoms = Symptoms(self._running().seats)
        symptoms.hang = dataclasses.replace(hang, message=f"{hang.message}; stacks: {path}")
        return Diagnosing(at, symptoms)

    def _match_calls(self, symptoms: Symptoms) -> None:
        """Look whether a mismatched call can have led to this."""
        seats = self._running().seats
        answers = self.ground.fleet.call("last_calls", dict.fromkeys(set(seats.values()), ()))
        ranks = {rank: log for answer in answers.values() for rank, log in answer.items() if rank in seats}
        incarnation = self.status.fields["incarnation"]
        found = mismatch(calls_of(ranks, incarnation=incarnation))
        if found is not None:
            verdict = verdict_of(found, hosts=seats, since_step=self._running().completed)
            symptoms.mismatch = Mismatch(found.culprits, verdict.sentence, signature(found))
            self._write_diagnosis(verdict)

    def _write_diagnosis(self, verdict: diagnostics.Verdict) -> None:
        write_json(self.run_dir.diagnosis, diagnosis(verdict).to_json())

    def _symptom(self, state: State, at: float) -> Diagnosing:
        if isinstance(state, Diagnosing):
            return state
        return Diagnosing(at, Symptoms(self._running().seats))

    def _diagnose(self, state: Diagnosing) -> State:
        """Wait until every rank is accounted for and the cause is known, or known to stay unknown."""
        symptoms, waited = state.symptoms, time.monotonic() - state.since
        unaccounted = symptoms.unaccounted()
        if symptoms.concerns_nodes and not state.vetted:
            state.vetted = True
            self.ground.vetting.begin_again(node for node in self._running().nodes if node not in symptoms.nodes)
        if unaccounted:
            if waited > RELEASE_SECONDS:
                self._running().abandon(lost=symptoms.nodes)
            if waited > PARK_SECONDS and not state.killed:
                state.killed = True
                symptoms.ended_by_us.update(unaccounted)
                self.ground.fleet.tell("kill", {self._node_of(rank) or "": (unaccounted,) for rank in unaccounted})
            if waited > GIVE_UP_SECONDS:
                raise TrainrtError(f"ranks {unaccounted} can neither be reached nor ended")
            return state
        if not symptoms.explained and not symptoms.ended_by_us and waited < EXPLAIN_SECONDS:
            return state
        if state.resume_at is None:
            if may_be_mismatched(symptoms):
                self._match_calls(symptoms)
            self._judge(state)
        if state.failure is not None:
            return Failed(state.failure)
        if state.resume_at is None or time.monotonic() < state.resume_at:
            return state
        if waited < STORES_SECONDS and self._running().stores_absent(but=symptoms.nodes):
            return state
        return self._resume(state)

    def _judge(self, state: Diagnosing) -> None:
        """Name the fault, and decide whether to try again, and when."""
        running, fault = self._running(), state.symptoms.fault()
        incident = Incident(
            fault.kind, fault.message, state.since, ranks=list(fault.ranks), nodes=list(fault.nodes),
            step=running.completed, detected_seconds=fault.detected_seconds, action=fault.action,
        )  # fmt: skip
        if fault.kind == "silent_corruption":
            believed = last_compared(self.config, completed=running.completed)
            self.ground.stores.distrust(incarnation=self.status.fields["incarnation"], above=believed)
        running.doubted = running.doubted or fault.kind == "storage"
        self.status.set(message=fault.message)
        state.failure = self.patience.fault(fault, completed=running.completed)
        state.resume_at = time.monotonic() + self.patience.delay_seconds
        if state.failure is None:
            self.ledger.open(incident)
            self.terminal.line(first_words(fault, step=running.completed))
        else:
            self.ledger.stop(incident)
            if fault.kind == "user_error":
                state.failure += f"; traceback: {self.run_dir.log(fault.ranks[0])}"

    def _resume(self, state: Diagnosing) -> State:
        """Give the ranks seats and order the next incarnation."""
        running = self._running()
        incident = self.ledger.last()
        lost = list(state.symptoms.nodes)
        unfit = self._unfit([node for node in running.nodes if node not in lost]) if state.vetted else {}
        if unfit:
            incident.nodes = sorted({*incident.nodes, *unfit})
            incident.message += "".join(f"; node {node} is left out: {why}" for node, why in unfit.items())
        if lost or unfit:
            try:
                incident.action = running.replace(lost, unfit=unfit, check=self._check_start)
            except PlanError as error:
                incident.action = "stop"
                return Failed(f"{incident.message}; no spare is left and the mesh cannot shrink: {error}")
            write_json(self.run_dir.plan, running.plan.to_json())
        self.run_dir.take_journal()
        self._order()
        return Recovering(time.monotonic())

    def _order(self) -> None:
        """Order the next incarnation from the newest state there is."""
        running = self._running()
        self.growing, self.leaving = False, None
        try:
            origin, steps_lost = running.order(self.telemetry)
        except TrainrtError:
            self.ledger.cannot_restore()
            raise
        self.watch.begin(running.seats, time.monotonic())
        self.ledger.restored(origin.kind, steps_lost=steps_lost, find_seconds=running.find_seconds)
        self.protection.ordered(running)
        self.status.set(incarnation=running.number, world_size=running.world_size, step=running.completed)

    # What is done all the time.

    def _housekeeping(self) -> None:
        """Lease, stop request, cluster.json, protection."""
        self.tidied_at = time.monotonic()
        self.telemetry.flush(after=FLUSH_SECONDS)
        ground = self.ground
        if hasattr(ground, "cluster"):
            ground.folder.renew_lease()
            self.processes.update(
                incarnation=self.status.fields["incarnation"],
                agents={node: ground.fleet.processes[node] for node in list(ground.fleet.processes)},
                raylets=ground.cluster.raylets(),
            )  # fmt: skip
        if self.stop is None and self.run_dir.stop_request.exists():
            self.events.put(StopAsked("trainrt stop", TERMINATED))
            self.run_dir.stop_request.unlink(missing_ok=True)
        if self.now_running is not None:
            self.status.set(protection=self.protection.level(self.now_running))

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C become events; not possible outside of the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        self._listen()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _listen(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, lambda number, _: self.events.put(SIGNALS[signal.Signals(number)]))

    def _running(self) -> Incarnation:
        assert self.now_running is not None
        return self.now_running

    def _node_of(self, rank: int) -> str | None:
        return None if self.now_running is None else self.now_running.seats.get(rank)

    # The end.

    def _close(self, state: State) -> None:
        """End everything of this run, then say so in the files."""
        if self.head is not None:
            self.head.close()
        self.status.set(message="ending")
        self.ledger.end()
        self.telemetry.flush()
        if self.inspector is not None:
            self.inspector.close()
        if self.dashboard is not None:
            self.dashboard.close()
        self.ground.close()
        if self.logs is not None:
            self.logs.close()
        self.terminal.end_progress()
        self.processes.clear(incarnation=self.status.fields["incarnation"])
        self.run_dir.take_journal()
        self.run_dir.compact_metrics()
        self.run_dir.stop_request.unlink(missing_ok=True)
        self.run_dir.evict_request.unlink(missing_ok=True)
        if isinstance(state, Final):
            self.status.set(state=published(state), message=state.message)
        else:
            self.status.set(state="failed", message="the driver failed")

    def _report(self, state: State) -> int:
        """The summary; a failure is an exception with the message that the command shows."""
        assert isinstance(state, Final)
        if isinstance(state, Failed):
            if state.exit_code == UserError.exit_code:
                raise ConfigError(state.message)
            raise TrainrtError(state.message)
        rows = [(published(state), state.message)]
        if self.last_metrics is not None:
            loss = f"{self.last_metrics['loss']:.4f}"
            known = "" if self.entropy is None else f" (unigram entropy {self.entropy:.4f})"
            rows.append(("loss", f"{loss}{known}"))
        if (effective := self.reliability.effective_time()) is not None:
            expected = self._running().plan.recovery["effective_time"]
            rows.append(
                ("effective time", f"{effective:.1%} of the launch since its first step ({expected:.1%} expected)")
            )
        if self.checkpoint is not None:
            rows.append(("checkpoint", self.checkpoint))
        rows.append(("metrics", str(self.run_dir.metrics)))
        if self.run_dir.incidents.exists():
            rows.append(("incidents", str(self.run_dir.incidents)))
        rows.append(("logs", str(self.run_dir.logs)))
        command = next_command(
            published(state), run_dir=str(self.run_dir), checkpoint=self.checkpoint, command=self.request.command
        )
        self.terminal.summary([*rows, ("next", command)])
        return state.exit_code


def first_words(fault: Fault, *, step: int) -> str:
    """A fault on the terminal, as it happens. An exception of the user's is told once: when it comes again."""
    if fault.kind == "user_error":
        ranks = ", ".join(map(str, fault.ranks))
        return f"user_error: an exception on rank {ranks} after step {step}; one more try from the same state"
    return f"{fault.kind}: {fault.message}"


def new_run_id() -> str:
    """Short: it is part of the paths of sockets."""
    import secrets

    return secrets.token_hex(4)
