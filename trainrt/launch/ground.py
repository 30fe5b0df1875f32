"""What a run stands on: a connected cluster, an agent and a store per node; started, or taken over.

`Ground` owns them until the end of the run. Which ranks sit where is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainrt.config import JobConfig
from trainrt.launch.cluster import Cluster, Embedded, Joined, Site, free_port, local_gpus
from trainrt.launch.fleet import Fleet
from trainrt.launch.machine import Event
from trainrt.launch.orders import AgentOrders
from trainrt.launch.record import Folder, Record, Shape
from trainrt.launch.stores import Stores, sweep_memory
from trainrt.launch.vetting import Vetting
from trainrt.run_dir import RunDir


@dataclass(frozen=True, slots=True)
class Code:
    """What workers run: the entry ("module:function"), what the zygote imports first, the user's module."""

    entry: str
    preload: tuple[str, ...]
    runtime_env: dict[str, Any] | None


class Ground:
    """Cluster, agents and stores of one run."""

    def __init__(
        self, run_dir: RunDir, config: JobConfig, code: Code, *, run_id: str, put: Callable[[Event], None]
    ) -> None:
        self.run_dir, self._config, self._code, self._run_id = run_dir, config, code, run_id
        self.folder = Folder(run_dir)
        self.fleet = Fleet(run_id, put=put)
        self.secret = self.folder.secret.read_text()
        self.stores = Stores(run_dir, config, secret=self.secret)
        self.device = chosen_device(config)
        self.shape = shape_of(config, self.device)
        self.vetting = Vetting(self.fleet, config, device=self.device)
        self.cluster: Cluster
        self.record: Record

    @property
    def count(self) -> int:
        """Nodes with agents, spares included."""
        return self._config.cluster.nodes + self._config.cluster.spare_nodes

    # Coming up.

    def begin(self, record: Record | None) -> bool:
        """Start the cluster, or find the one an earlier driver left (True). Does not wait."""
        if record is not None:
            for node, address in record.stores.items():
                self.stores.add_retired(node, address)
        if record is not None and record.shape == self.shape and self._find(record):
            self.record = record
            return True
        if record is not None and record.embedded:
            self._embedded(record).close()
        names = [f"n{index}" for index in range(self.count)]
        if self._config.cluster.address == "local":
            embedded = Embedded(self.run_dir, run_id=self._run_id, names=names, port=free_port())
            embedded.start(
                cpus=self._config.cluster.workers_per_node + 1, gpus=self._gpus(),
                grace_seconds=self._config.cluster.driver_grace_seconds,
            )  # fmt: skip
            self.cluster = embedded
        else:
            cpus = self._config.cluster.workers_per_node
            self.cluster = Joined(self._config.cluster.address, cpus=cpus, gpus=self._gpus(), count=self.count)
        self.record = Record(
            self._run_id, self.cluster.address, self._config.cluster.address == "local", names, self.shape, {}
        )
        return False

    def connect(self, *, check: Callable[[], None]) -> None:
        """Connect this process to the cluster as soon as that is possible."""
        self.cluster.connect(check=check, runtime_env=self._code.runtime_env)
        self.record = replace(self.record, address=self.cluster.address)
        self._save_record()

    def come_up(self, *, adopt: bool, check: Callable[[], None], phase: Callable[[str], None]) -> list[str]:
        """Wait until every node has an agent and a store. Returns the nodes' names, in order."""
        if adopt:
            alive = {site.name: site for site in self.cluster.alive() if site.name}
            found = self.fleet.adopt(self.record.names, alive)
            self.vetting.begin(found)
            self._setup(found, check=check)
        if adopt and self.fleet.nodes:
            absent = set(self.record.names) - set(self.fleet.nodes)
            missing = [site for name, site in alive.items() if name in absent]
        else:
            # A cluster that was started anew at its old address knows no agents either.
            missing = named(self.cluster.sites(check=check), self.record.names, stores=self.stores.addresses())
        phase("cluster")
        self.add(missing, check=check)
        phase("agents")
        return [name for name in self.record.names if name in self.fleet.nodes]

    def add(self, sites: list[Site], *, check: Callable[[], None]) -> None:
        """Put agents on sites and wait for them; meanwhile they look at their nodes."""
        self.fleet.start(sites, self._orders, resources=self._resources())
        self.vetting.begin(site.name for site in sites)
        self._setup([site.name for site in sites], check=check)

    def in_place(self, node: str) -> Site | None:
        """The site of a lost agent, where Ray still holds its node for alive."""
        site = self.fleet.sites.get(node)
        if site is None:
            return None
        return next((site for other in self.cluster.alive() if other.node_id == site.node_id), None)

    def waiting(self) -> bool:
        """Whether a joined cluster has a node that runs nothing of this run yet."""
        return next(self._unused(), None) is not None

    def unused(self) -> Site | None:
        """Such a node, with a name of its own."""
        site = next(self._unused(), None)
        if site is None:
            return None
        name = f"n{len(self.record.names)}"
        self.record = replace(self.record, names=[*self.record.names, name])
        return replace(site, name=name)

    def _unused(self) -> Iterator[Site]:
        if not isinstance(self.cluster, Embedded):
            used = {site.node_id for site in self.fleet.sites.values()}
            yield from (site for site in self.cluster.alive() if site.node_id not in used)

    def driver_host(self) -> str:
        """The address under which the nodes reach this process."""
        if isinstance(self.cluster, Embedded):
            return "127.0.0.1"
        import ray

        return str(ray.util.get_node_ip_address())

    def store_changed(self, node: str, store: dict[str, str] | None) -> None:
        if store is None:
            self.stores.remove(node)
        else:
            self.stores.add(node, store)
            self._save_record()

    def lose(self, node: str) -> None:
        """A node is lost; its store may still answer."""
        self.fleet.forget(node)
        self.stores.retire(node)

    def evict(self, node: str) -> None:
        """Leave a node that is alive: its workers end before anybody else takes their ranks."""
        self.fleet.call("end_workers", {node: ()}, at_once=True)
        self.lose(node)

    # Going down.

    def close(self) -> None:
        """End workers, agents, stores and an embedded cluster; nothing of the run is left afterwards."""
        self.fleet.close()
        self.stores.shutdown()
        if hasattr(self, "cluster"):
            self.cluster.close()
        sweep_memory(self._run_id)
        self.folder.forget_cluster()

    # Parts.

    def _find(self, record: Record) -> bool:
        if record.embedded:
            self.cluster = self._embedded(record)
            return self.cluster.adoptable()
        cpus = self._config.cluster.workers_per_node
        self.cluster = Joined(record.address, cpus=cpus, gpus=self._gpus(), count=self.count)
        return self.cluster.adoptable()

    def _embedded(self, record: Record) -> Embedded:
        port = int(record.address.rpartition(":")[2])
        return Embedded(self.run_dir, run_id=record.run_id, names=record.names, port=port)

    def _setup(self, nodes: list[str], *, check: Callable[[], None]) -> None:
        proof = self.folder.proof.read_text()
        lives = lambda node: self.in_place(node) is not None  # noqa: E731
        for node, answer in self.fleet.setup(nodes, proof=proof, check=check, lives=lives).items():
            if answer["store"] is not None:
                self.stores.add(node, answer["store"])
        self._save_record()

    def _save_record(self) -> None:
        self.record = replace(self.record, stores=self.stores.addresses())
        self.record.save(self.folder)

    def _orders(self, site: Site) -> AgentOrders:
        return AgentOrders(
            run_dir=str(self.run_dir), run_id=self._run_id, node=site.name, secret=self.secret,
            grace_seconds=self._config.cluster.driver_grace_seconds, entry=self._code.entry,
            preload=self._code.preload, host=site.host,
        )  # fmt: skip

    def _gpus(self) -> int:
        return self._config.cluster.workers_per_node if self.device == "cuda" else 0

    def _resources(self) -> dict[str, float]:
        resources = {"CPU": float(self._config.cluster.workers_per_node)}
        if self._gpus():
            resources["GPU"] = float(self._gpus())
        return resources


def named(sites: list[Site], names: list[str], *, stores: Mapping[str, str]) -> list[Site]:
    """The sites with names. One whose host has a store of an earlier cluster gets that store's name, and so takes it over."""
    free, result = list(names), []
    homes = {name: address.rpartition(":")[0] for name, address in stores.items() if name in names}
    for site in sorted(sites, key=lambda site: site.host not in homes.values()):
        here = [name for name in free if name == site.name or (not site.name and homes.get(name) == site.host)]
        name = (here or [name for name in free if name not in homes] or free)[0]
        free.remove(name)
        result.append(replace(site, name=name))
    return sorted(result, key=lambda site: names.index(site.name))


def chosen_device(config: JobConfig) -> str:
    """cpu or cuda. With `auto`, an embedded cluster takes GPUs if there is one for every worker."""
    if config.cluster.device != "auto":
        return config.cluster.device
    if config.cluster.address != "local":
        from trainrt.parallel.mesh import choose_device

        return choose_device("auto")
    workers = (config.cluster.nodes + config.cluster.spare_nodes) * config.cluster.workers_per_node
    return "cuda" if local_gpus() >= workers else "cpu"


def shape_of(config: JobConfig, device: str) -> Shape:
    cluster = config.cluster
    return Shape(cluster.address, cluster.nodes, cluster.workers_per_node, cluster.spare_nodes, device)


def newest_checkpoint(run_dir: RunDir) -> tuple[int, Path] | None:
    """The newest complete checkpoint of the run directory, with its step."""
    from trainrt.checkpoint.universal import newest

    path = newest(run_dir.checkpoints)
    return None if path is None else (int(path.name.removeprefix("step-")), path)
