"""An incarnation: which rank sits on which node, from what state it began, and what it has completed."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from trainrt.checkpoint.store.inventory import Holding
from trainrt.config import JobConfig, MeshSize
from trainrt.errors import PlanError, TrainrtError
from trainrt.launch.ground import Ground, newest_checkpoint
from trainrt.launch.recovery import Origin, Progress, choose_origin, largest_world, seat_ranks
from trainrt.launch.reliability import Reliability
from trainrt.launch.telemetry import Telemetry

if TYPE_CHECKING:
    from trainrt.parallel.plan import Plan
    from trainrt.training.planning import Preflight


class Planner:
    """Plans, made beside whatever the driver waits for: they need torch, and the model on the meta device."""

    def __init__(self, config: JobConfig) -> None:
        self._config = config
        self._result: Preflight | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="plan", daemon=True)

    def begin(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        try:
            from trainrt.training.planning import preflight

            self._result = preflight(self._config, world_size=self._config.world_size)
        except BaseException as error:
            self._error = error

    def check(self) -> None:
        """Raise what the plan raised, if it has."""
        if self._error is not None:
            raise self._error

    def result(self, *, check: Callable[[], None]) -> Preflight:
        while self._thread.is_alive():
            self._thread.join(0.05)
            check()
        self.check()
        assert self._result is not None
        return self._result

    def plan(self, size: MeshSize | int) -> Plan:
        """A plan for other ranks, which wait for it: no time for integer programs. Raises PlanError where there is none."""
        from trainrt.training.planning import make_plan

        if isinstance(size, int):
            return make_plan(self._config, world_size=size, placement_seconds=0.0)
        return make_plan(self._config, world_size=size.world_size, mesh=size, placement_seconds=0.0)


class Incarnation:
    """The ranks of a run. `order` starts the next incarnation of them; `replace` finds new seats before that."""

    def __init__(
        self, ground: Ground, config: JobConfig, planner: Planner, *,
        names: list[str], number: int, run_id: str, completed: int, reliability: Reliability,
    ) -> None:  # fmt: skip
        self._ground, self._config, self._planner, self._run_id = ground, config, planner, run_id
        self._reliability = reliability
        self.number = number
        self._nodes = names[: config.cluster.nodes]
        self._spares = names[config.cluster.nodes :]
        self.finished: dict[int, str] = {}
        self.origin = Origin("none", 0)
        self.find_seconds = 0.0
        self._rendezvous: Any = None
        self._abandoned = False
        self.committed_once = False
        self.doubted = False
        self.plan = planner.result(check=lambda: None).plan
        if len(self._nodes) < config.cluster.nodes:
            self._fit()
        self._seat()
        self.progress = Progress(self.world_size, done=completed)

    @property
    def world_size(self) -> int:
        return self.plan.mesh.world_size

    @property
    def completed(self) -> int:
        """Steps completed by all ranks."""
        return self.progress.completed

    def _seat(self) -> None:
        self.seats = seat_ranks(self.world_size, self._nodes, workers_per_node=self._config.cluster.workers_per_node)

    def _fit(self) -> None:
        """Plan for the nodes that are left. Raises PlanError where nothing fits."""
        size = largest_world(self._config, available=len(self._nodes) * self._config.cluster.workers_per_node)
        while True:
            try:
                self.plan = self._planner.plan(size)
                return
            except PlanError:
                if isinstance(size, MeshSize) or size == 1:
                    raise
                size -= 1

    # Seats.

    def replace(self, lost: list[str], *, unfit: Collection[str] = (), check: Callable[[], None]) -> str:
        """Find other seats for the ranks of nodes that are lost, or unfit. Returns the action: restart, replace or shrink.

        Raises PlanError where too few nodes are left for any mesh.
        """
        action = "restart"
        for node in set(unfit) & set(self._spares):
            self._ground.lose(node)
            self.drop_spare(node)
        for node in [*lost, *(node for node in unfit if node in self._nodes and node not in lost)]:
            place = None if node in unfit else self._ground.in_place(node)
            self._ground.lose(node)
            if place is not None:
                # Ray's node lives: only the agent died, or it died first.
                self._ground.add([place], check=check)
                if node in self._ground.fleet.nodes:
                    continue
            spare = self._take_spare(check=check)
            position = self._nodes.index(node)
            if spare is not None:
                self._nodes[position] = spare
                action = "replace" if action == "restart" else action
            else:
                del self._nodes[position]
                action = "shrink"
        if action == "shrink":
            self._fit()
        self._seat()
        return action

    def evict(self, node: str, *, check: Callable[[], None]) -> str:
        """Seat the ranks of a node that is alive elsewhere; its store may still answer. Returns the action: replace or shrink.

        A spare node just goes. Raises PlanError where too few nodes would be left for any mesh: then nothing has changed.
        """
        if node in self._spares:
            self._spares.remove(node)
            self._ground.evict(node)
            return "skip"
        before, spare = list(self._nodes), self._take_spare(check=check)
        position = self._nodes.index(node)
        if spare is not None:
            self._nodes[position] = spare
        else:
            del self._nodes[position]
            try:
                self._fit()
            except PlanError:
                self._nodes = before
                raise
        self._ground.evict(node)
        self._seat()
        return "replace" if spare is not None else "shrink"

    @property
    def incomplete(self) -> bool:
        """Whether it runs on fewer nodes than the job asks for."""
        return len(self._nodes) < self._config.cluster.nodes

    def grow(self, *, check: Callable[[], None]) -> list[str]:
        """Take in nodes that are there now, up to what the job asks for. Returns their names."""
        taken = []
        while self.incomplete and (node := self._take_spare(check=check)) is not None:
            self._nodes.append(node)
            taken.append(node)
        if taken:
            self._fit()
            self._seat()
        return taken

    @property
    def nodes(self) -> list[str]:
        """Those with seats, then the spares."""
        return [*self._nodes, *self._spares]

    def drop_spare(self, node: str) -> None:
        if node in self._spares:
            self._spares.remove(node)

    def _take_spare(self, *, check: Callable[[], None]) -> str | None:
        if self._spares:
            return self._spares.pop(0)
        site = self._ground.unused()
        if site is None:
            return None
        self._ground.add([site], check=check)
        return site.name if site.name in self._ground.fleet.nodes else None

    # Orders.

    def order(self, telemetry: Telemetry) -> tuple[Origin, int]:
        """Start the next incarnation, and say who sits where.

        Returns where its state comes from, and how many completed steps are redone.
        """
        before = self.completed
        self.number += not self._abandoned
        self._abandoned = False
        # From here on the stores commit nothing of the last incarnation, so what they answer stays true.
        self.configure_stores()
        began = time.monotonic()
        self.origin = self._find_origin()
        self.find_seconds = time.monotonic() - began
        self.progress = Progress(self.world_size, done=self.origin.step)
        self.finished.clear()
        self._tell_seats(telemetry)
        specs: dict[str, list[dict[str, Any]]] = {}
        for rank, node in self.seats.items():
            specs.setdefault(node, []).append(self._spec(rank, node, local_rank=len(specs.get(node, []))))
        idle = [node for node in self._ground.fleet.nodes if node not in specs]
        arguments: dict[str, tuple[Any, ...]] = {node: (orders,) for node, orders in specs.items()}
        self._ground.fleet.call("start", {**arguments, **{node: ([],) for node in idle}})
        return self.origin, max(0, before - self.origin.step)

    def _tell_seats(self, telemetry: Telemetry) -> None:
        from trainrt.parallel.plan import mesh_json

        mesh = mesh_json(self.plan.mesh)
        telemetry.seats(incarnation=self.number, mesh=mesh, nodes=self.seats, first_step=self.origin.step + 1)

    def _find_origin(self) -> Origin:
        """Raises TrainrtError where a generation was committed once, and nothing can be restored any more."""
        stores = self._ground.stores
        holdings, repaired = stores.holdings(), 0
        if self.doubted:
            holdings, repaired = stores.checked(holdings)
            self.doubted = False
        origin, missing = choose_origin(
            holdings,
            newest_checkpoint(self._ground.run_dir),
            rebuild=lambda holding: stores.rebuild(holding, seats=self.seats),
        )
        if origin.kind == "none" and self.committed_once:
            raise TrainrtError(f"nothing is left to restore from: {missing}; there is no checkpoint")
        return Origin("parity", origin.step) if repaired and origin.kind == "memory" else origin

    def abandon(self, *, lost: Collection[str]) -> None:
        """This incarnation is over: its number is used up, and the stores, but those of `lost` nodes, let go who waits for it."""
        if not self._abandoned:
            self._abandoned = True
            self.number += 1
            self.configure_stores(but=lost)

    def configure_stores(self, *, but: Collection[str] = ()) -> None:
        """Tell the stores who belongs, and how much parity protects whom."""
        hosts = {node: site.place for node, site in self._ground.fleet.sites.items()}
        if self._config.snapshot.parity_shards == "auto":
            seated = {node: hosts.get(node, node) for node in set(self.seats.values())}
            on_host, known = Counter(seated.values()), self._ground.fleet.memory_bytes
            memory = [known[node] // on_host[host] for node, host in seated.items() if node in known]
            self._ground.stores.parity_shards = self._reliability.parity_shards(
                seated, node_bytes=self.plan.estimate["state_bytes"] * self._config.cluster.workers_per_node,
                memory_bytes=min(memory, default=0),
            )  # fmt: skip
        self._ground.stores.configure(incarnation=self.number, nodes_of_ranks=self.seats, hosts=hosts, but=but)

    def stores_absent(self, *, but: Collection[str]) -> bool:
        """Whether a node with ranks, other than the lost ones, has no store that answers."""
        nodes = set(self.seats.values()) - set(but)
        return self._ground.stores.answering(nodes) != nodes

    @property
    def parity_shards(self) -> int:
        """As the job asks, or as was chosen for it."""
        return self._ground.stores.parity_shards

    @property
    def stores_retired(self) -> bool:
        return self._ground.stores.retired

    def committed(self) -> Holding | None:
        """The newest whole generation, newer than what was restored, that the stores serving ranks now hold."""
        holdings = self._ground.stores.holdings(active_only=True)
        whole = [held for held in holdings if not held.lost and held.step > self.origin.step]
        if whole:
            self.committed_once = True
        # The newest of all may be between its last copy and its commit.
        return next((held for held in whole if held.protected), whole[0] if whole else None)

    def forget_retired(self) -> None:
        self._ground.stores.forget_retired()

    def _spec(self, rank: int, node: str, *, local_rank: int) -> dict[str, Any]:
        from trainrt.parallel.plan import mesh_json

        ground = self._ground
        return {
            "run_dir": str(ground.run_dir), "run_id": self._run_id, "token": ground.secret, "incarnation": self.number,
            "rank": rank, "world_size": self.world_size, "local_rank": local_rank, "node": node,
            "rendezvous": self._rendezvous_address(), "mesh": mesh_json(self.plan.mesh),
            "expert_orders": {name: list(order) for name, order in self.plan.orders.items()},
            "store": ground.stores.of(node), "stores": ground.stores.addresses(), "restore": self.origin.to_json(),
            "device": ground.device, "steps": self._config.run.steps,
            "mtbf_seconds": self._reliability.node_mtbf_seconds() / len(set(self.seats.values())),
        }  # fmt: skip

    def _rendezvous_address(self) -> str:
        """The store through which ranks find each other, in this process for the whole run."""
        import torch.distributed as dist

        host = self._ground.driver_host()
        if self._rendezvous is None:
            self._rendezvous = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        return f"{host}:{self._rendezvous.port}"
