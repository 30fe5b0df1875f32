"""The measuring part of `trainrt doctor`: every node by itself, those of one host one after the other; then pairs of nodes in
rounds in which no node is measured twice; then collectives over real groups, inside the nodes and between neighbours.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from trainrt.diagnostics.collective_speed import Order
from trainrt.diagnostics.outliers import HOST, Link, best_of_nodes, judge, judge_links
from trainrt.errors import TrainrtError
from trainrt.launch.cluster import Site
from trainrt.launch.examiner import Examiner
from trainrt.launch.rounds import Pair, neighbours, pair_rounds

RANKS_ON_CPU = {"all_to_all": 2, "all_reduce": 1}
"""Of a node without GPUs, in the groups that are timed."""
ACTOR_SECONDS = 60.0
CALL_SECONDS = 30.0
CLOCK_SAMPLES = 5


@dataclass(frozen=True, slots=True)
class Examined:
    """What was measured. hosts: the names that the hosts of nodes give themselves, of those that answered. notes: what was
    not measured, and why.
    """

    hosts: Mapping[str, str]
    measured: Mapping[str, Mapping[str, float | None]]
    links: Sequence[Link]
    notes: Sequence[str]


class Examination:
    """One look at the nodes of a cluster that this process is connected to."""

    def __init__(self, sites: Sequence[Site], *, gpus: Mapping[str, int]) -> None:
        self._sites = {site.name: site for site in sites}
        self._gpus = gpus
        self._device = "cuda" if all(gpus.values()) else "cpu"
        self._actors: dict[str, Any] = {}
        self._hosts: dict[str, str] = {}
        self._measured: dict[str, dict[str, float | None]] = {}
        self._notes: list[str] = []

    def run(self) -> Examined:
        """All of it: nodes, links, groups. Raises TrainrtError where no node answers."""
        self._begin()
        for name, actor in self._actors.items():
            self._measured[name]["clock_offset"] = self._clock_offset(actor)
        self._check_nodes()
        links = self._measure_links()
        self._time_groups()
        for name, rates in best_of_nodes(links).items():
            self._measured[name].update(rates)
        return Examined(self._hosts, self._measured, links, self._notes)

    def close(self) -> None:
        import ray

        self._ask("close", self._actors)
        for actor in self._actors.values():
            with suppress(Exception):
                ray.kill(actor)

    def _begin(self) -> None:
        """An actor on every node; those that do not answer are named and left out."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        remote = ray.remote(Examiner)
        for name, site in self._sites.items():
            self._actors[name] = remote.options(
                num_cpus=0, num_gpus=self._gpus[name] if self._device == "cuda" else 0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(site.node_id, soft=False),
            ).remote()  # fmt: skip
        about = self._ask("about", self._actors, seconds=ACTOR_SECONDS)
        self._hosts = {name: answer["host"] for name, answer in about.items()}
        self._actors = {name: actor for name, actor in self._actors.items() if name in about}
        self._measured = {name: {} for name in self._actors}
        if not about:
            raise TrainrtError(f"no node of {len(self._sites)} answered within {ACTOR_SECONDS:.0f} s")

    def _check_nodes(self) -> None:
        """Every node by itself. Whoever is not like its peers is measured once more, and has the better of both."""
        self._take_turns(list(self._actors))
        again = [
            name for name, checks in judge(self._measured, hosts=self._addresses()).items()
            if any(value.by_peers for value in checks.values())
        ]  # fmt: skip
        self._take_turns(again)

    def _take_turns(self, nodes: Sequence[str]) -> None:
        """Nodes of one host would measure each other."""
        by_host: dict[str, list[str]] = {}
        for name in nodes:
            by_host.setdefault(self._sites[name].host, []).append(name)
        while turn := [names.pop(0) for names in by_host.values() if names]:
            answers = self._ask("check", turn, tempfile.gettempdir(), self._device)
            for name in turn:
                held = self._measured[name]
                for check, value in (answers.get(name) or {"compute": None}).items():
                    held[check] = value if held.get(check) is None else max(held[check] or 0.0, value or 0.0)

    def _addresses(self) -> dict[str, str]:
        return {name: self._sites[name].host for name in self._actors}

    def _clock_offset(self, actor: Any) -> float | None:
        """How far a node's clock is ahead of this one, s: of the quickest of some answers, half its way."""
        import ray

        samples = []
        with suppress(Exception):
            for _ in range(CLOCK_SAMPLES):
                start, before = time.monotonic(), time.time()
                there = ray.get(actor.clock.remote(), timeout=CALL_SECONDS)
                took = time.monotonic() - start
                samples.append((took, there - before - took / 2))
        return min(samples)[1] if samples else None

    # Links.

    def _measure_links(self) -> list[Link]:
        rounds, every = pair_rounds(list(self._actors))
        if not every:
            self._notes.append(f"links: ring neighbours and {len(rounds) - 2} rounds of random pairs, not all pairs")
        links = []
        for pairs in rounds:
            links += self._stream(pairs)
            links += self._stream([(target, source) for source, target in pairs])
        slow = {item.link for item in judge_links(links) if item.judged.by_peers}
        return [self._again(link) if link in slow else link for link in links]

    def _again(self, link: Link) -> Link:
        """A slow link once more, alone; the better of both counts."""
        return max(link, *self._stream([(link.source, link.target)]), key=lambda link: link.value)

    def _stream(self, pairs: Sequence[Pair]) -> list[Link]:
        """Each first node of some disjoint pairs sends to the second."""
        ports = self._ask("listen", [target for _, target in pairs])
        for source, target in pairs:
            if target in ports:
                self._actors[source].send.remote(self._sites[target].host, ports[target])
        rates = self._ask("received", list(ports))
        return [
            Link(source, target, rates.get(target, 0.0) / 1e9, self._kind(source, target)) for source, target in pairs
        ]

    def _kind(self, one: str, other: str) -> str:
        """Links are compared with their like: on one host, inside a rack, between racks."""
        here, there = self._sites[one], self._sites[other]
        if here.host == there.host:
            return HOST
        return "network" if here.rack == there.rack else "racks"

    # Groups.

    def _time_groups(self) -> None:
        """All-to-all inside each node, then all-reduce of each node with its neighbours; the best of them counts."""
        ready = self._ask("prepare_groups", self._actors, seconds=2 * CALL_SECONDS + 5)
        nodes = [name for name in self._actors if ready.get(name)]
        if len(nodes) < len(self._actors):
            self._notes.append(
                f"collectives: {', '.join(set(self._actors) - set(nodes))} could not import torch in time"
            )
        for name in nodes:
            if self._ranks(name, "all_to_all") > 1:
                self._measured[name]["all_to_all"] = self._time_group("all_to_all", [[name]]).get(name)
        for pairs in neighbours(nodes):
            for name, rate in self._time_group("all_reduce", pairs).items():
                best = self._measured[name].get("all_reduce") or 0.0
                self._measured[name]["all_reduce"] = max(best, rate or 0.0)

    def _time_group(self, operation: str, groups: Sequence[Sequence[str]]) -> dict[str, float | None]:
        """GB/s of disjoint groups of nodes, by node."""
        import ray

        ports = self._ask("free_port", [nodes[0] for nodes in groups])
        answers = {}
        for nodes in groups:
            if nodes[0] not in ports:
                continue
            first = 0
            for name in nodes:
                ranks = self._ranks(name, operation)
                order = Order(
                    operation, rendezvous=f"{self._sites[nodes[0]].host}:{ports[nodes[0]]}", first_rank=first,
                    ranks=ranks, world_size=sum(self._ranks(node, operation) for node in nodes), device=self._device,
                    way=next((self._sites[other].host for other in nodes if other != name), ""),
                )  # fmt: skip
                answers[name] = self._actors[name].group.remote(order)
                first += ranks
        found: dict[str, float | None] = {}
        for name, reference in answers.items():
            found[name] = None
            with suppress(Exception):
                answer = ray.get(reference, timeout=CALL_SECONDS)
                if "error" in answer:
                    self._notes.append(f"{operation} of {name}: {answer['error']}")
                else:
                    found[name] = answer["bytes_per_second"] / 1e9
        return found

    def _ranks(self, name: str, operation: str) -> int:
        return self._gpus[name] if self._device == "cuda" else RANKS_ON_CPU[operation]

    def _ask(
        self, method: str, nodes: Sequence[str] | Mapping[str, Any], *arguments: Any, seconds: float = CALL_SECONDS
    ) -> Any:
        """Call several nodes at once; those that do not answer in time are left out."""
        import ray

        references = {name: getattr(self._actors[name], method).remote(*arguments) for name in nodes}
        end, answers = time.monotonic() + seconds, {}
        for name, reference in references.items():
            with suppress(Exception):
                answers[name] = ray.get(reference, timeout=max(0.1, end - time.monotonic()))
        return answers
