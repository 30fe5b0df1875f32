"""Which node, device or link is not like its peers: the judgement of self-checks (docs/doctor.md).

A value is compared with the median of the others of its kind, so that no table of what hardware should do is needed, and one
slow node cannot hide by pulling an average down. With fewer than three of a kind the slow one of two cannot be told from the
fast one's being better than usual: only gross differences count then. Pure: no clock, no process.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median, median_low
from typing import Any

from trainrt.diagnostics.selfcheck import Check, check_of

FEWEST = 3
"""Of so many of a kind the majority decides."""


@dataclass(frozen=True, slots=True)
class Judged:
    """A value and what is made of it.

    value: None where it could not be measured. why: empty where it is ok. floor: what its peers say it must be; 0 where they
    have nothing to say.
    """

    name: str
    value: float | None
    peers_median: float | None
    why: str = ""
    floor: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.why

    @property
    def check(self) -> Check:
        return check_of(self.name)

    @property
    def by_peers(self) -> bool:
        """Whether it is its peers that speak against it, and a second measurement might not."""
        return bool(self.why) and self.floor > 0

    def to_json(self) -> dict[str, Any]:
        return {"value": self.value, "unit": self.check.unit, "peers_median": self.peers_median, "ok": self.ok}


Measured = Mapping[str, float | None]
"""Values by the names of checks, of one node."""


def judge(nodes: Mapping[str, Measured], *, hosts: Mapping[str, str] | None = None) -> dict[str, dict[str, Judged]]:
    """Judge every value of every node against all others of its kind: those of other nodes, and of its other devices.

    hosts: of the nodes. Nodes of one host share its hardware, so what differs between them is chance: the best of them speaks
    for all (not for devices, of which each node has its own).
    """
    kinds: dict[str, dict[tuple[str, str], float]] = {}
    for node, measured in nodes.items():
        for name, value in measured.items():
            if value is not None:
                kinds.setdefault(_kind(name), {})[node, name] = value
    found: dict[str, dict[str, Judged]] = {node: {} for node in nodes}
    for node, measured in nodes.items():
        for name, value in measured.items():
            peers = [other for key, other in kinds.get(_kind(name), {}).items() if key != (node, name)]
            judged = judge_one(name, value, peers)
            if judged.by_peers and _on_host(node, name, nodes, hosts or {}) > judged.floor:
                judged = replace(judged, why="")
            found[node][name] = judged
    return found


def _kind(name: str) -> str:
    return name.partition(":")[0]


def _on_host(node: str, name: str, nodes: Mapping[str, Measured], hosts: Mapping[str, str]) -> float:
    """The best value that a node of the same host has; nothing where each has devices of its own."""
    if ":" in name or node not in hosts:
        return 0.0
    return max((nodes[other].get(name) or 0.0 for other in nodes if hosts.get(other) == hosts[node]), default=0.0)


def judge_one(name: str, value: float | None, peers: Sequence[float]) -> Judged:
    """One value against those of its peers."""
    check, middle = check_of(name), median(peers) if peers else None
    if value is None:
        return Judged(name, None, middle, "could not be measured")
    if value < check.least:
        return Judged(name, value, middle, f"{shown(name, value)} is less than {shown(name, check.least)}")
    if value > check.most:
        return Judged(name, value, middle, f"{shown(name, value)} is more than {shown(name, check.most)}")
    ratio = check.ratio if len(peers) + 1 >= FEWEST else check.gross
    # Of two in the middle the lower: among three nodes one that is faster than usual must not make outliers of the others.
    floor = ratio * median_low(peers) if peers and ratio is not None else 0.0
    if middle is None or value >= floor:
        return Judged(name, value, middle)
    why = f"{shown(name, value)}, its peers' median is {shown(name, middle)}"
    return Judged(name, value, middle, why, floor)


def shown(name: str, value: float) -> str:
    """A value with its unit, for people."""
    if check_of(name).unit != "bytes":
        return f"{value:.3g} {check_of(name).unit}"
    size, units = float(value), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.3g} {units[0]}"


# Links.

HOST = "host"


@dataclass(frozen=True, slots=True)
class Link:
    """What travelled from one node to another, GB/s (0: nothing arrived). kind: what else it is compared with; `host` for
    nodes of one host, which have no network between them.
    """

    source: str
    target: str
    value: float
    kind: str = "network"


@dataclass(frozen=True, slots=True)
class JudgedLink:
    """A link and what is made of it."""

    link: Link
    judged: Judged

    def to_json(self) -> dict[str, Any]:
        return {
            "source": self.link.source, "target": self.link.target, "kind": self.link.kind, **self.judged.to_json(),
        }  # fmt: skip


def best_of_nodes(links: Iterable[Link]) -> dict[str, dict[str, float | None]]:
    """`network_send` and `network_receive` of every node: the best of its links.

    Only where every link of a node is slow is its best one, and then it is not the links but the node's interface.
    Links between nodes of one host say nothing of it.
    """
    best: dict[str, dict[str, float | None]] = {}
    for link in (link for link in links if link.kind != HOST):
        for node, name in ((link.source, "network_send"), (link.target, "network_receive")):
            values = best.setdefault(node, {})
            values[name] = max(values.get(name) or 0.0, link.value)
    return best


def judge_links(
    links: Sequence[Link], *, cannot_send: Collection[str] = (), cannot_receive: Collection[str] = ()
) -> list[JudgedLink]:
    """Judge each link against the others of its kind; those of nodes whose interface is slow are no measure of the rest.

    With two nodes there is one link: its two directions are compared, by the gross ratio.
    """
    explained = {id(link) for link in links if link.source in cannot_send or link.target in cannot_receive}
    found = []
    for link in links:
        peers = [
            other.value for other in links
            if other is not link and other.kind == link.kind and id(other) not in explained
        ]  # fmt: skip
        judged = judge_one("host_link" if link.kind == HOST else "link", link.value, peers)
        found.append(JudgedLink(link, judged))
    return found
