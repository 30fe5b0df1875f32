"""`trainrt doctor`: the self-checks of a cluster's nodes, links and collectives (MegaScale, section 4.3; docs/doctor.md).

The cluster is connected to, or started for it; what `examination.py` measures on it is judged, and what is not like its peers
is named.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from trainrt.diagnostics.outliers import Judged, JudgedLink, judge, judge_links, shown
from trainrt.errors import ConfigError
from trainrt.launch.cluster import Embedded, Joined, Site, free_port, local_gpus
from trainrt.launch.examination import Examination, Examined
from trainrt.launch.record import Folder, new_run_id
from trainrt.run_dir import RunDir

LOCAL_NODES = 2
GRACE_SECONDS = 20.0
"""How long the embedded cluster outlives a doctor that was killed."""


def doctor(*, address: str | None = None, nodes: int | None = None) -> dict[str, Any]:
    """Check a cluster and return what docs/reference/doctor.schema.json describes.

    address: as of `launch`: local (the default: so many simulated nodes of this machine), auto, or HOST:PORT. nodes: how many;
    by default two locally, else all that are alive. Raises ConfigError for wrong input.
    """
    if nodes is not None and nodes < 1:
        raise ConfigError(f"--nodes {nodes}; allowed: a whole number above 0")
    with _cluster(address or "local", nodes) as (sites, gpus):
        examination = Examination(sites, gpus=gpus)
        try:
            return report(sites, examination.run())
        finally:
            examination.close()


def table(document: dict[str, Any]) -> tuple[list[str], list[list[str]], list[str]]:
    """The document for people: the head and the rows of a table of checks, and lines of what was found."""
    rows = []
    for name in dict.fromkeys(name for node in document["nodes"] for name in node["checks"]):
        checks = {node["name"]: node["checks"][name] for node in document["nodes"] if name in node["checks"]}
        values = sorted((check["value"], node) for node, check in checks.items() if check["value"] is not None)
        bad = ", ".join(node for node, check in checks.items() if not check["ok"]) or "-"
        if values:
            (least, where), (most, _) = values[0], values[-1]
            middle = shown(name, median(value for value, _ in values))
            rows.append([name, f"{shown(name, least)} ({where})", middle, shown(name, most), bad])
        else:
            rows.append([name, "", "", "", bad])
    lines = [finding["message"] for finding in document["findings"]] or ["nothing is unlike its peers"]
    return ["check", "lowest", "median", "highest", "not ok"], rows, [*lines, *document["notes"]]


# The cluster.


@contextmanager
def _cluster(address: str, nodes: int | None) -> Iterator[tuple[list[Site], dict[str, int]]]:
    """Connect to a cluster, or start one; its nodes with names, and how many GPUs each has."""
    if address == "local":
        count = nodes or LOCAL_NODES
        with _embedded(count, gpus := local_gpus() // count) as sites:
            yield sites, dict.fromkeys((site.name for site in sites), gpus)
        return
    joined = Joined(address, cpus=0, gpus=0, count=1)
    try:
        joined.connect(check=lambda: None, runtime_env=None)
        found = joined.alive()
        if len(found) < (nodes or 1):
            raise ConfigError(f"--nodes {nodes}: the Ray cluster at {joined.address} has {len(found)}")
        sites = [replace(site, name=f"n{index}") for index, site in enumerate(found[:nodes])]
        yield sites, _gpus(sites)
    finally:
        joined.close()


@contextmanager
def _embedded(count: int, gpus: int) -> Iterator[list[Site]]:
    with tempfile.TemporaryDirectory(prefix="trainrt-doctor-") as scratch:
        run_dir = RunDir(scratch)
        run_dir.create()
        folder = Folder(run_dir)
        folder.create()
        names = [f"n{index}" for index in range(count)]
        cluster = Embedded(run_dir, run_id=new_run_id(), names=names, port=free_port())
        over = threading.Event()
        keeper = threading.Thread(target=_keep_lease, args=(folder, over), daemon=True)
        try:
            cluster.start(cpus=1, gpus=gpus, grace_seconds=GRACE_SECONDS)
            keeper.start()
            cluster.connect(check=lambda: None, runtime_env=None)
            yield cluster.sites(check=lambda: None)
        finally:
            over.set()
            if keeper.ident is not None:
                keeper.join()
            cluster.close()


def _keep_lease(folder: Folder, over: threading.Event) -> None:
    while not over.wait(1.0):
        folder.renew_lease()


def _gpus(sites: Sequence[Site]) -> dict[str, int]:
    import ray

    found = {node["NodeID"]: int(node["Resources"].get("GPU", 0)) for node in ray.nodes()}
    return {site.name: found.get(site.node_id, 0) for site in sites}


# The report.


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it should be. kind: slow_node, slow_nic, slow_link or no_answer."""

    kind: str
    nodes: list[str]
    message: str

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "nodes": self.nodes, "message": self.message}


def report(sites: Sequence[Site], examined: Examined) -> dict[str, Any]:
    """The document: every value judged, and what was found."""
    addresses = {site.name: site.host for site in sites}
    judged = judge(examined.measured, hosts=addresses)
    slow = {
        kind: {name for name, checks in judged.items() if kind in checks and not checks[kind].ok}
        for kind in ("network_send", "network_receive")
    }
    links = judge_links(examined.links, cannot_send=slow["network_send"], cannot_receive=slow["network_receive"])
    findings = [
        *(_no_answer(site) for site in sites if site.name not in examined.hosts),
        *_of_nodes(judged, addresses),
        *_of_links(links, addresses, slow),
    ]
    return {
        "ok": not findings,
        "nodes": [
            {
                "host": examined.hosts[name], "name": name, "address": addresses[name],
                "checks": {check: value.to_json() for check, value in checks.items()},
            }
            for name, checks in judged.items()
        ],
        "links": [link.to_json() for link in links],
        "findings": [finding.to_json() for finding in findings],
        "notes": list(examined.notes),
    }  # fmt: skip


def _no_answer(site: Site) -> Finding:
    return Finding("no_answer", [site.name], f"{site.name} ({site.host}): does not answer, or its devices are in use")


def _of_nodes(judged: Mapping[str, Mapping[str, Judged]], addresses: Mapping[str, str]) -> Iterator[Finding]:
    for name, checks in judged.items():
        for check, value in checks.items():
            if not value.ok:
                network = check in ("network_send", "network_receive")
                every = ": all its links are slow" if network else ""
                message = f"{name} ({addresses[name]}): {check}: {value.why}{every}"
                yield Finding("slow_nic" if network else "slow_node", [name], message)


def _of_links(
    links: Sequence[JudgedLink], addresses: Mapping[str, str], slow: Mapping[str, set[str]]
) -> Iterator[Finding]:
    """Slow links that no slow interface of either end explains."""
    for item in links:
        source, target = item.link.source, item.link.target
        explained = source in slow["network_send"] or target in slow["network_receive"]
        if not item.judged.ok and not explained:
            ends = f"{source} ({addresses[source]}) to {target} ({addresses[target]})"
            yield Finding("slow_link", [source, target], f"link {ends}: {item.judged.why}")
