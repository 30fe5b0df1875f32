"""The driver: one process that brings a run up, listens, decides and writes the run directory.

Its states and what may follow on what are `machine.py`'s. The driver turns events into the next state; everything else is
done by the parts it holds: `Inbox` (what is heard), `Ground` (cluster, agents, stores), `Incarnation` (who sits where, what
is completed), `Faults`, `Moves`, `Ledger` (incidents), `Display` (what people see), `Status` and `Processes` (files).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from trainrt.errors import ConfigError, TrainrtError, UserError
from trainrt.launch.display import Display
from trainrt.launch.eviction import Evictions
from trainrt.launch.faults import Faults
from trainrt.launch.ground import Code, Ground
from trainrt.launch.hangs import Watch
from trainrt.launch.head import HeadWatch, leave
from trainrt.launch.inbox import Inbox
from trainrt.launch.incarnation import Incarnation, Planner
from trainrt.launch.incidents import Incident, Ledger
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
from trainrt.launch.matching import calls_of
from trainrt.launch.moves import Moves
from trainrt.launch.protection import Protection
from trainrt.launch.publish import Phases, Processes, Status, append_metrics
from trainrt.launch.record import Folder, new_run_id
from trainrt.launch.reliability import Reliability
from trainrt.launch.request import Previous, Request, look_back, write_config
from trainrt.launch.stacks import Stack
from trainrt.launch.symptoms import Error, Exit, Symptoms
from trainrt.launch.telemetry import FLUSH_SECONDS, Telemetry
from trainrt.launch.terminal import Terminal
from trainrt.run_dir import now, write_json

TICK_SECONDS = 0.1


class Stopped(Exception):
    """Raised out of waiting, above all while the run comes up: somebody asked it to stop."""


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
        self.previous = previous
        self.began = time.monotonic()
        self.phases = Phases(self.began)
        self.run_id = previous.run_id if previous is not None else new_run_id()
        self.stop: StopAsked | None = None
        self.checkpoint: str | None = None
        self.tidied_at = 0.0
        self.head: HeadWatch | None = None
        self.now_running: Incarnation | None = None
        folder = Folder(self.run_dir)
        folder.create()
        self.inbox = Inbox(self.run_dir)
        self.status = Status(
            self.run_dir, run_id=self.run_id, steps=self.config.run.steps,
            step=previous.step if previous is not None else 0,
            incarnation=previous.incarnation if previous is not None else 0,
        )  # fmt: skip
        self.display = Display(self.run_dir, self.config, status=self.status, terminal=terminal)
        self.processes, self.telemetry = Processes(self.run_dir), Telemetry(self.run_dir)
        self.reliability = Reliability(self.run_dir, self.config)
        self.ledger = Ledger(self.run_dir, folder.open_incidents, tell=self._tell)
        self.protection = Protection(self.config, self.ledger)
        self.planner = Planner(self.config)
        code = Code(request.entry, request.preload, request.runtime_env())
        self.ground = Ground(self.run_dir, self.config, code, run_id=self.run_id, put=self.inbox.put)
        self.watch = Watch(least_seconds=self.config.diagnostics.hang_seconds)
        self.faults = Faults(
            self.ground, self.config, watch=self.watch, ledger=self.ledger, status=self.status, display=self.display
        )
        automatic = self.config.diagnostics.evict == "automatic"
        evictions = Evictions(self.run_dir, automatic=automatic, tell=self.display.line)
        self.moves = Moves(self.ground, evictions, self.ledger, tell=self.display.line)

    # From the first to the last state.

    def run(self) -> int:
        state: State = Starting(self.began)
        with self.inbox.signals():
            try:
                state = self._guarded(self._start, state)
                while not isinstance(state, Final):
                    event = self._next_event()
                    state = self._guarded(partial(self._handle, state, event), state)
                    if isinstance(state, (Starting, Running, Recovering)):
                        state = self._guarded(partial(self._look_for_hangs, state), state)
                    if isinstance(state, Running) and self.stop is None:
                        self.moves.look(self._running(), self.display.diagnosis)
                    if isinstance(state, Diagnosing):
                        state = self._guarded(partial(self._diagnose, state), state)
            finally:
                self._close(state)
        return self._report(state)

    def _guarded(self, step: Callable[[], State], before: State) -> State:
        """The next state, checked and published; errors with a message become the state Failed."""
        try:
            after = step()
        except Stopped:
            assert self.stop is not None
            after = Interrupted(f"{self.stop.reason}: stopped before the first step", self.stop.exit_code)
        except TrainrtError as error:
            after = Failed(str(error), error.exit_code)
        check(before, after)
        if type(after) is not type(before):
            if isinstance(after, Running):
                self._recovered()
            self.display.state(after)
        return after

    # Coming up.

    def _start(self) -> State:
        """Cluster and plan at the same time; then agents, then the first incarnation."""
        self.status.set(state="starting", message="starting the cluster")
        adopted = self.ground.begin(self.previous.record if self.previous is not None else None)
        self.planner.begin()
        try:
            self.ground.connect(check=self._check)
            self.head = HeadWatch(self.ground.cluster.address, lost=self._on_head_lost)
            # Ray puts a handler of its own on SIGTERM.
            self.inbox.listen()
            names = self.ground.come_up(adopt=adopted, check=self._check, phase=self.phases.done)
        finally:
            preflight = self.planner.result(check=self._check)
        self.phases.done("plan")
        unfit = self.faults.unfit(names)
        self.phases.done("selfcheck")
        names = self.faults.leave_out(unfit, names, at=self.began)
        if self.previous is not None:
            self.status.fields["step"] = max(self.status.fields["step"], self.run_dir.take_journal())
        write_json(self.run_dir.plan, preflight.plan.to_json())
        self.display.plan(preflight)
        self.display.begin(step=self.status.fields["step"], node_of=self._node_of)
        if self.previous is not None and self.previous.cut_off and not self.request.handed_over:
            self.faults.driver_lost(self.previous, adopted=adopted, at=self.began)
        self.now_running = Incarnation(
            self.ground, self.config, self.planner, names=names, number=self.status.fields["incarnation"],
            run_id=self.run_id, completed=self.status.fields["step"], reliability=self.reliability,
        )  # fmt: skip
        self._order()
        return Starting(self.began)

    def _on_head_lost(self, silent_seconds: float) -> None:
        """Called from the watch's thread, while this one may be stuck in Ray."""
        at, step = time.monotonic(), self.status.fields["step"]
        message = f"the Ray head at {self.ground.cluster.address} is lost"
        self.ledger.open(Incident("node_loss", message, at, step=step, detected_seconds=silent_seconds))
        embedded = self.ground.record.embedded
        leave(self.request, message, embedded=embedded, status=self.status, display=self.display)

    def _check(self) -> None:
        """While something is waited for: hear whoever asks to stop, and errors of the plan as soon as they are known."""
        self._housekeeping()
        self.planner.check()
        self.stop = self.inbox.take_stop() or self.stop
        if self.stop is not None:
            raise Stopped

    # Events.

    def _next_event(self) -> Event:
        if time.monotonic() - self.tidied_at > TICK_SECONDS:
            self._housekeeping()
        return self.inbox.next(seconds=TICK_SECONDS)

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
        self.display.line(f"{event.reason}: a checkpoint, then the end (again: at once)")
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
            self.display.line(f"spare node {event.node} is lost: {event.message}")
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
                self.phases.slowest("imports", what["seconds"])
            case "zygote_ended":
                if isinstance(state, Starting) and what["message"].strip():
                    raise TrainrtError(f"node {event.node}: workers cannot be made:\n{what['message'].strip()}")
            case "stopped" if what["rank"] is not None:
                self.watch.stopped(what["rank"], what["stopped"], event.at)
            case "stopped":
                if self.watch.store_stopped(event.node, what["stopped"]):
                    self.display.line(f"the store of node {event.node} is stopped, and is ended")
                    self.ground.fleet.tell("kill_store", {event.node: ()})
            case "stacks":
                taken = {rank: Stack.from_json(stack) for rank, stack in what["ranks"].items()}
                self.watch.stacks(
                    what["number"], taken, calls_of(what["calls"], incarnation=self.status.fields["incarnation"])
                )
            case "store_ended":
                self.ground.store_changed(event.node, None)
                self.protection.store_lost(event.node, at=event.at, step=self._running().completed)
                self.display.line(f"the store of node {event.node} died and is started again")
            case "store_started":
                self.ground.store_changed(event.node, what["store"])
                self._running().configure_stores()
            case "link":
                self.telemetry.link(event.node, what["link"])
            case "store_failed":
                self.display.line(f"the store of node {event.node} does not come back: {what['message']}")
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
                self.phases.slowest(message["name"], message["seconds"])
                if message["name"] == "restore":
                    self.ledger.has_read(message["seconds"])
            case "read":
                self.display.reading({key: message[key] for key in ("read", "wanted", "stored")})
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
                self.display.reported(message["message"])
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
        self.status.step(self._running().completed)
        if isinstance(state, Starting):
            self.phases.done("total")
            self.status.set(start=self.phases.seconds)
        return Running(time.monotonic()) if isinstance(state, (Starting, Recovering)) else state

    def _recovered(self) -> None:
        """Steps are being completed (again)."""
        self.ledger.stepped()
        self.display.stepping()
        if self.stop is not None:
            self.ground.fleet.call_all("stop")

    def _on_metrics(self, line: dict[str, Any]) -> None:
        append_metrics(self.run_dir, line)
        self.reliability.line(line)
        self.display.metrics(line, effective_time=self.reliability.effective_time())

    def _tell(self, incident: dict[str, Any]) -> None:
        """An incident is over."""
        self.reliability.seen(incident)
        self.display.incident(incident)

    def _all_finished(self, step: int) -> State:
        self.ledger.stepped()
        self.status.step(step)
        outcomes = set(self._running().finished.values())
        if outcomes == {"finished"} or self.stop is not None:
            self.ground.fleet.call_all("end_workers", at_once=False)
        if outcomes == {"finished"}:
            return Finished(f"finished at step {step}")
        if self.stop is None:
            self.moves.move(self._running(), check=self._check)
            return self._go_on()
        return Interrupted(f"{self.stop.reason}: stopped at step {step} with a checkpoint", self.stop.exit_code)

    # Faults.

    def _look_for_hangs(self, state: State) -> State:
        at = time.monotonic()
        symptoms = self.faults.find_hang(self._running(), at)
        return state if symptoms is None else Diagnosing(at, symptoms)

    def _symptom(self, state: State, at: float) -> Diagnosing:
        if isinstance(state, Diagnosing):
            return state
        return Diagnosing(at, Symptoms(self._running().seats))

    def _diagnose(self, state: Diagnosing) -> State:
        """Wait until it is known what happened; judge it, once; and go on when it is time to."""
        running, waited = self._running(), time.monotonic() - state.since
        if not self.faults.understood(state, running, waited=waited):
            return state
        if state.resume_at is None:
            self.faults.judge(state, running)
        if state.failure is not None:
            return Failed(state.failure)
        if not self.faults.may_resume(state, running, waited=waited):
            return state
        self.faults.reseat(state, running, check=self._check)
        return self._go_on()

    # Incarnations.

    def _go_on(self) -> Recovering:
        """The ranks have seats: with all that is known of their steps, order the next incarnation."""
        self.run_dir.take_journal()
        self._order()
        return Recovering(time.monotonic())

    def _order(self) -> None:
        """Order the next incarnation from the newest state there is."""
        running = self._running()
        self.moves.over()
        try:
            origin, steps_lost = running.order(self.telemetry)
        except TrainrtError:
            self.ledger.cannot_restore()
            raise
        self.watch.begin(running.seats, time.monotonic())
        self.ledger.restored(origin.kind, steps_lost=steps_lost, find_seconds=running.find_seconds)
        self.protection.ordered(running)
        self.status.set(incarnation=running.number, world_size=running.world_size, step=running.completed)

    def _running(self) -> Incarnation:
        assert self.now_running is not None
        return self.now_running

    def _node_of(self, rank: int) -> str | None:
        return None if self.now_running is None else self.now_running.seats.get(rank)

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
        if self.stop is None:
            self.inbox.look_for_request()
        if self.now_running is not None:
            self.status.set(protection=self.protection.level(self.now_running))

    # The end.

    def _close(self, state: State) -> None:
        """End everything of this run, then say so in the files."""
        if self.head is not None:
            self.head.close()
        self.status.set(message="ending")
        self.ledger.end()
        self.telemetry.flush()
        self.display.end_of_steps()
        self.ground.close()
        self.display.close()
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
        effective = self.reliability.effective_time()
        self.display.summary(
            (published(state), state.message), checkpoint=self.checkpoint, command=self.request.command,
            effective_time=None if effective is None else (effective, self._running().plan.recovery["effective_time"]),
        )  # fmt: skip
        return state.exit_code
