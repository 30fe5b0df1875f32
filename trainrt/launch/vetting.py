"""Before ranks are seated on nodes, those are looked at: one that fails its self-checks is treated as lost (docs/doctor.md).

The agents measure while the driver waits for something else anyhow. A check that fails, hangs or is late says nothing of its
node: it costs nobody a seat, and a job no more than `WAIT_SECONDS`.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from trainrt.config import JobConfig
from trainrt.diagnostics.outliers import Judged, judge
from trainrt.diagnostics.selfcheck import LONGEST_SECONDS
from trainrt.errors import PlanError
from trainrt.launch.fleet import Fleet
from trainrt.launch.recovery import largest_world

WAIT_SECONDS = 1.0
"""What a start or a recovery waits at most for answers, the second measurement of an outlier included."""
BESIDE_SECONDS = 3.0
"""How long a node without GPUs may measure while cluster and plan come up."""
CALL_SECONDS = 0.1
"""What of that the way to the agents may take."""


@dataclass(frozen=True, slots=True)
class Vetted:
    """unfit: why a node gets no ranks, by node. remark: what is wrong and yet costs no node its ranks; empty: nothing."""

    unfit: dict[str, str] = field(default_factory=dict)
    remark: str = ""


class Vetting:
    """The self-checks of a run's nodes. `begin` asks, `result` judges the answers."""

    def __init__(self, fleet: Fleet, config: JobConfig, *, device: str) -> None:
        self._fleet, self._config, self._device = fleet, config, device
        self._asked: dict[str, Any] = {}

    def begin(self, nodes: Iterable[str]) -> None:
        """Before a start: have nodes measured, one of each host; does not wait. GPUs are each node's own, so then all are.

        A host that is alone has no peers, and needs its cores to come up: only its free shared memory is looked at.
        """
        if not self._config.diagnostics.selfcheck:
            return
        nodes = list(nodes)
        alone = len({self._host(node) for node in [*self._fleet.nodes, *nodes]}) == 1
        beside = 0.0 if alone else BESIDE_SECONDS
        self._ask_all(nodes, self._device, seconds=LONGEST_SECONDS if self._device == "cuda" else beside)

    def begin_again(self, nodes: Iterable[str]) -> None:
        """After an incident: the same for the nodes that stay, without their GPUs, which take too long and are in use.

        Nodes of one host are not measured: none of them could be left out for another one, and they need their cores now.
        """
        nodes = list(nodes)
        self._asked.clear()
        if self._config.diagnostics.selfcheck and len({self._host(node) for node in nodes}) > 1:
            self._ask_all(nodes, "cpu", seconds=WAIT_SECONDS - CALL_SECONDS)

    def _ask_all(self, nodes: Iterable[str], device: str, *, seconds: float) -> None:
        hosts = {self._host(node) for node in self._asked}
        for node in nodes:
            if device == "cuda" or self._host(node) not in hosts:
                hosts.add(self._host(node))
                self._ask(node, device, seconds=seconds)

    def result(self, nodes: Collection[str]) -> Vetted:
        """Judge the answers about nodes that are to be seated; waits for them, `WAIT_SECONDS` at most.

        Whoever is unlike its peers is measured again, and is unfit only where it is so again. If all fail it is not the
        nodes, and if no mesh fits on the rest they are better than nothing: none is unfit then, and the remark says so.
        """
        deadline = time.monotonic() + WAIT_SECONDS
        answers = self._answers(deadline)
        failed = self._failed(answers)
        # A GPU that is slow is so at every repetition, and there is no time for another look at one.
        doubtful = [
            node for node, checks in failed.items() if all(check.by_peers and ":" not in check.name for check in checks)
        ]
        for node in doubtful:
            self._ask(node, "cpu", seconds=deadline - time.monotonic() - CALL_SECONDS)
        second = self._answers(deadline) if doubtful else {}
        still = self._failed({**answers, **second})
        unfit = {
            node: checks
            for node, checks in failed.items()
            if node not in doubtful or node in still.keys() & second.keys()
        }
        return self._decide(unfit, asked=len(answers), nodes=nodes)

    def _ask(self, node: str, device: str, *, seconds: float) -> None:
        with suppress(Exception):
            self._asked[node] = self._fleet.ask(node, "selfcheck", device, max(0.0, seconds))

    def _answers(self, deadline: float) -> dict[str, dict[str, float | None]]:
        """What has come by then, by node. Where only one host is checked nothing hangs on it, and it is not waited for."""
        patient = len(self._asked) > 1 or len(set(map(self._host, self._fleet.nodes))) > 1
        found = {}
        for node, reference in self._asked.items():
            found[node] = self._fleet.answer(reference, seconds=deadline - time.monotonic() if patient else 0.0)
        self._asked.clear()
        return {node: answer for node, answer in found.items() if answer}

    def _failed(self, answers: dict[str, dict[str, float | None]]) -> dict[str, list[Judged]]:
        """The checks that a node fails and that cost it its ranks, by node."""
        judged = judge(answers, hosts={node: self._host(node) for node in answers})
        return {
            node: bad for node, checks in judged.items()
            if (bad := [check for check in checks.values() if not check.ok and check.check.evicts])
        }  # fmt: skip

    def _decide(self, failed: dict[str, list[Judged]], *, asked: int, nodes: Collection[str]) -> Vetted:
        if not failed:
            return Vetted()
        why = {
            node: f"self-check of {self._host(node)}: " + "; ".join(f"{check.name} {check.why}" for check in checks)
            for node, checks in failed.items()
        }  # fmt: skip
        all_of_them = "; ".join(f"node {node}: {reason}" for node, reason in why.items())
        if len(failed) == asked:
            return Vetted(remark=f"{all_of_them}; every node that was checked fails, so none is left out")
        # What one node of a host fails, all of it do.
        unfit = {node: why[bad] for node in nodes for bad in failed if self._same(node, bad)}
        if not self._enough(len(set(nodes) - set(unfit))):
            return Vetted(remark=f"{all_of_them}; no mesh fits on the nodes without it, so it stays")
        return Vetted(unfit)

    def _same(self, node: str, bad: str) -> bool:
        return node == bad or (self._device != "cuda" and self._host(node) == self._host(bad))

    def _enough(self, nodes: int) -> bool:
        try:
            largest_world(self._config, available=nodes * self._config.cluster.workers_per_node)
        except PlanError:
            return False
        return nodes > 0

    def _host(self, node: str) -> str:
        site = self._fleet.sites.get(node)
        return site.host if site is not None else node
