"""The driver's states, each with its own data, the events it hears, and the table of transitions.

`docs/launch.md` shows `transition_table()`; a test holds them against each other. What is done in a
state is the driver's; what may follow on what is said here and checked at every change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainrt.launch.symptoms import Symptoms

# Events.


@dataclass(frozen=True, slots=True)
class FromNode:
    """Something an agent tells: what a worker said, an exit, news of a store or zygote."""

    node: str
    what: dict[str, Any]
    at: float


@dataclass(frozen=True, slots=True)
class NodeLost:
    """An agent is gone for good, with all that ran below it. `silent_seconds`: since it was last heard of."""

    node: str
    message: str
    silent_seconds: float
    at: float


@dataclass(frozen=True, slots=True)
class StopAsked:
    """SIGTERM, Ctrl-C or `trainrt stop`: end with a checkpoint; a second one ends at once."""

    reason: str
    exit_code: int


@dataclass(frozen=True, slots=True)
class Tick:
    """Nothing was heard for a while."""


Event = FromNode | NodeLost | StopAsked | Tick

# States. Times are of `time.monotonic()`.


@dataclass(frozen=True, slots=True)
class Starting:
    """Cluster, agents and the first incarnation come up."""

    since: float


@dataclass(frozen=True, slots=True)
class Running:
    """Steps are being completed."""

    since: float


@dataclass(slots=True)
class Diagnosing:
    """Something failed. Symptoms are collected until every rank is accounted for; then the fault is judged:

    `failure` says why the run must stop, else it goes on at `resume_at`.
    """

    since: float
    symptoms: Symptoms
    killed: bool = False
    vetted: bool = False
    failure: str | None = None
    resume_at: float | None = None


@dataclass(frozen=True, slots=True)
class Recovering:
    """A new incarnation was ordered; its first completed step is awaited."""

    since: float


@dataclass(frozen=True, slots=True)
class Finished:
    """All steps are done, or were done before."""

    message: str
    exit_code: int = 0


@dataclass(frozen=True, slots=True)
class Interrupted:
    """Stopped because somebody asked; the same command goes on."""

    message: str
    exit_code: int


@dataclass(frozen=True, slots=True)
class Failed:
    """Stopped because going on makes no sense."""

    message: str
    exit_code: int = 1


State = Starting | Running | Diagnosing | Recovering | Finished | Interrupted | Failed
Final = (Finished, Interrupted, Failed)


@dataclass(frozen=True, slots=True)
class Transition:
    source: type
    target: type
    when: str


TRANSITIONS = (
    Transition(Starting, Running, "all ranks completed a step"),
    Transition(Starting, Diagnosing, "a worker ended, lost its peers, reported an error or hangs; a node was lost"),
    Transition(Starting, Finished, "all ranks finished without a step to do"),
    Transition(Starting, Interrupted, "asked to stop while there was nothing new to save, or asked twice"),
    Transition(Starting, Failed, "the job's input is wrong, or cluster, nodes or stores do not come up"),
    Transition(Running, Diagnosing, "a worker ended, lost its peers, reported an error or hangs; a node was lost"),
    Transition(Running, Finished, "all ranks finished"),
    Transition(Running, Recovering, "a node returned, all ranks stopped for it, and are seated anew"),
    Transition(Running, Interrupted, "all ranks finished as asked, with a checkpoint; or asked twice"),
    Transition(Diagnosing, Recovering, "every rank is accounted for, the fault may be survived, ranks have seats"),
    Transition(Diagnosing, Failed, "the error repeats itself, tries are used up, or too few nodes are left"),
    Transition(Diagnosing, Interrupted, "asked to stop twice"),
    Transition(Recovering, Running, "all ranks completed a step"),
    Transition(Recovering, Diagnosing, "another fault before the first step"),
    Transition(Recovering, Finished, "all ranks finished without a step to do"),
    Transition(Recovering, Interrupted, "all ranks finished as asked, with a checkpoint; or asked twice"),
    Transition(Recovering, Failed, "the new incarnation cannot be ordered"),
)

_ALLOWED = {(transition.source, transition.target) for transition in TRANSITIONS}


def published(state: State) -> str:
    """The state's name in status.json."""
    return type(state).__name__.lower()


def check(before: State, after: State) -> None:
    """Raises AssertionError where the table has no such transition: a bug of the driver's."""
    if type(before) is not type(after) and (type(before), type(after)) not in _ALLOWED:
        raise AssertionError(f"no transition from {published(before)} to {published(after)}")


def transition_table() -> str:
    """The table of docs/launch.md."""
    rows = [f"| {t.source.__name__.lower()} | {t.target.__name__.lower()} | {t.when} |" for t in TRANSITIONS]
    return "\n".join(["| from | to | when |", "|---|---|---|", *rows])
