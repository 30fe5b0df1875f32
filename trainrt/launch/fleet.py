"""The agents, as the driver sees them: started or taken over, called together, polled for events."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from trainrt.errors import RunDirError, TrainrtError
from trainrt.launch.agent import Agent
from trainrt.launch.clocks import NodeClock
from trainrt.launch.cluster import Site
from trainrt.launch.machine import Event, FromNode, NodeLost
from trainrt.launch.orders import AgentOrders
from trainrt.launch.record import NAMESPACE

SETUP_SECONDS = 120.0
CALL_SECONDS = 15.0
POLL_TIMEOUT_SECONDS = 5.0
ANSWER_SECONDS = 2.5
"""An agent answers at least every second; what ranks do cannot be judged while it does not."""
SILENT_SECONDS = 15.0
"""An agent that does not answer for so long is given up, though Ray may still hold it for alive."""


class Fleet:
    """One agent per node. What they report goes to `put`, from one thread per agent."""

    def __init__(self, run_id: str, *, put: Callable[[Event], None]) -> None:
        self._run_id, self._put = run_id, put
        self._actors: dict[str, Any] = {}
        self._groups: dict[str, Any] = {}
        self.sites: dict[str, Site] = {}
        self.hosts: dict[str, str] = {}
        self.memory_bytes: dict[str, int] = {}
        self.processes: dict[str, list[dict[str, Any]]] = {}
        self._heard: dict[str, float] = {}
        self._over = threading.Event()

    @property
    def nodes(self) -> list[str]:
        return list(self._actors)

    def start(
        self, sites: Iterable[Site], orders: Callable[[Site], AgentOrders], *,
        resources: dict[str, float],
    ) -> None:  # fmt: skip
        """Ask for an agent on every site; `setup` waits for them."""
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        actor = ray.remote(Agent)
        for site in sites:
            name = self._name(site.name)
            group = placement_group(
                [resources], strategy="STRICT_PACK", name=name, lifetime="detached",
                bundle_label_selector=[{"ray.io/node-id": site.node_id}],
            )  # fmt: skip
            self._groups[site.name] = group
            self.sites[site.name] = site
            self._actors[site.name] = actor.options(
                name=name, namespace=NAMESPACE, lifetime="detached",
                num_cpus=resources.get("CPU", 0), num_gpus=resources.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, 0),
            ).remote(orders(site))  # fmt: skip

    def adopt(self, names: Iterable[str], sites: dict[str, Site]) -> list[str]:
        """Take over the agents of an earlier driver. Returns the names of those that are there."""
        import ray
        from ray.util.placement_group import get_placement_group

        for node in names:
            with suppress(ValueError):
                self._actors[node] = ray.get_actor(self._name(node), namespace=NAMESPACE)
                if node in sites:
                    self.sites[node] = sites[node]
            with suppress(ValueError):
                self._groups[node] = get_placement_group(self._name(node))
        return self.nodes

    def setup(
        self, nodes: Iterable[str], *, proof: str, check: Callable[[], None], lives: Callable[[str], bool],
    ) -> dict[str, dict[str, Any]]:  # fmt: skip
        """Wait until agents are up, and prove that they share the run directory; then listen to them.

        Returns what each says of its node. Agents that died are left out, and those whose node no longer `lives`: an
        agent dies a moment before its raylet, and Ray would wait for such a node for ever.
        """
        import ray

        waiting = {node: self._actors[node].setup.remote() for node in nodes}
        answers: dict[str, dict[str, Any]] = {}
        deadline = time.monotonic() + SETUP_SECONDS
        for node, reference in waiting.items():
            while True:
                check()
                try:
                    answers[node] = ray.get(reference, timeout=0.1)
                except ray.exceptions.GetTimeoutError:
                    if not lives(node):
                        self.forget(node)
                        break
                    if time.monotonic() < deadline:
                        continue
                    raise TrainrtError(
                        f"node {node} ({self.sites[node].host}): no agent after {SETUP_SECONDS:.0f} s; "
                        "is the node busy, or another job holding its CPUs?"
                    ) from None
                except ray.exceptions.RayActorError as error:
                    _raise_if_broken(node, error)
                    self.forget(node)
                break
        for node, answer in answers.items():
            if answer["proof"] != proof:
                raise RunDirError(
                    f"run.directory: node {node} ({answer['host']}) does not see this run directory; "
                    "it must be on storage that all nodes share, under the same path"
                )
            self.hosts[node] = answer["host"]
            self.memory_bytes[node] = answer["memory_bytes"]
            sequence = answer["sequence"]
            threading.Thread(target=self._poll, args=(node, sequence), name=f"poll-{node}", daemon=True).start()
        return answers

    def call(self, method: str, arguments: dict[str, tuple[Any, ...]], **options: Any) -> dict[str, Any]:
        """Call a method on several agents at once; those that are gone or silent are left out."""
        import ray

        references = {
            node: getattr(self._actors[node], method).remote(*given, **options)
            for node, given in arguments.items()
            if node in self._actors
        }
        answers: dict[str, Any] = {}
        deadline = time.monotonic() + CALL_SECONDS
        for node, reference in references.items():
            with suppress(ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
                answers[node] = ray.get(reference, timeout=max(0.1, deadline - time.monotonic()))
        return answers

    def call_all(self, method: str, **options: Any) -> dict[str, Any]:
        return self.call(method, dict.fromkeys(self._actors, ()), **options)

    def answers(self, nodes: Iterable[str]) -> bool:
        """Whether the agents of these nodes have all answered a moment ago."""
        at = time.monotonic()
        return all(at - self._heard.get(node, 0.0) < ANSWER_SECONDS for node in nodes)

    def tell(self, method: str, arguments: dict[str, tuple[Any, ...]]) -> None:
        """Call a method on several agents without waiting; what comes of it comes as events."""
        for node, given in arguments.items():
            if node in self._actors:
                getattr(self._actors[node], method).remote(*given)

    def ask(self, node: str, method: str, *given: Any) -> Any:
        """Call a method of one agent, which need not be up yet; Ray's reference to the answer. Raises KeyError without one."""
        return getattr(self._actors[node], method).remote(*given)

    def answer(self, reference: Any, *, seconds: float) -> Any:
        """What was asked for, or None where it has not come within so many seconds, or was no answer but an error."""
        import ray

        with suppress(Exception):
            return ray.get(reference, timeout=max(0.0, seconds))
        return None

    def forget(self, node: str) -> None:
        """An agent is gone: give back what was reserved for it."""
        import ray

        actor, group = self._actors.pop(node, None), self._groups.pop(node, None)
        self.processes.pop(node, None)
        with suppress(Exception):
            ray.kill(actor)
        with suppress(Exception):
            if group is not None:
                ray.util.remove_placement_group(group)

    def close(self) -> None:
        """End all agents with their workers and stores."""
        self._over.set()
        self.call_all("shutdown")
        for node in self.nodes:
            self.forget(node)

    def _poll(self, node: str, after: int) -> None:
        """Fetch an agent's events until it is gone. Runs in a thread."""
        import ray

        actor, clock = self._actors[node], NodeClock()
        heard, why = time.monotonic(), Exception()
        while not self._over.is_set() and self._serves(node, actor):
            try:
                answer: Any = ray.get(actor.poll.remote(after), timeout=POLL_TIMEOUT_SECONDS)
            except ray.exceptions.ActorUnavailableError as error:
                lost, why = time.monotonic() - heard > SILENT_SECONDS, error
                time.sleep(0.1)
            except ray.exceptions.RayActorError as error:
                lost, why = True, error
            except Exception as error:
                lost, why = time.monotonic() - heard > SILENT_SECONDS, error
                time.sleep(0.1)
            else:
                self._heard[node] = heard = time.monotonic()
                self.processes[node] = answer["processes"]
                for event in answer["events"]:
                    after = event["sequence"]
                    self._put(FromNode(node, event, heard))
                if clock.due:
                    _compare(actor, clock)
                continue
            if lost:
                if not self._over.is_set():
                    at = time.monotonic()
                    self._put(NodeLost(node, _reason(why), at - heard, at))
                return

    def _serves(self, node: str, actor: Any) -> bool:
        """Whether this is still the node's agent: a replaced one is heard no more."""
        return self._actors.get(node) is actor

    def _name(self, node: str) -> str:
        return f"{self._run_id}/{node}"


def _compare(actor: Any, clock: NodeClock) -> None:
    """Tell an agent the driver's time on its clock; that it is gone, the next poll says."""
    import ray

    def ask() -> float:
        return float(ray.get(actor.monotonic.remote(), timeout=POLL_TIMEOUT_SECONDS))

    with suppress(ray.exceptions.RayError):
        actor.follow_clock.remote(clock.measure(ask))


def _reason(error: Exception) -> str:
    """Why Ray says that an actor is gone, in one line."""
    text = str(error)
    if "node has died" in text or "marked dead" in text or "node is dead" in text.lower():
        return "Ray holds the node for dead"
    if "Timeout" in type(error).__name__:
        return f"its agent did not answer for {SILENT_SECONDS:.0f} s"
    return "its agent died"


def _raise_if_broken(node: str, error: Exception) -> None:
    """An agent that fails in its constructor fails everywhere: say why."""
    text = str(error)
    for line in reversed(text.splitlines()):
        if "ModuleNotFoundError" in line or "ImportError" in line:
            raise TrainrtError(f"node {node}: {line.strip()} (trainrt must be installed on every node)") from error
    if "runtime_env" in text.lower() or "runtime environment" in text.lower():
        reason = text.strip().splitlines()[-1]
        raise TrainrtError(f"node {node}: the user's module could not be sent: {reason}") from error
