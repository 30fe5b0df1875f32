"""The run's stores, as the driver sees them: their addresses, their state, what they are told.

A store whose node was lost may still live (Ray died, the machine did not): it is kept as retired,
to restore from, until a newer generation is committed elsewhere.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from trainrt.checkpoint.store.admin import StoreAdmin
from trainrt.checkpoint.store.group import Group, choose_groups
from trainrt.checkpoint.store.inventory import Holding, take_inventory
from trainrt.checkpoint.store.slots import shared_folder
from trainrt.config import JobConfig
from trainrt.errors import StoreError
from trainrt.run_dir import RunDir

MEMORY_SECONDS = 5.0
"""How long ended stores may take to remove their shared memory."""


def sweep_memory(run_id: str) -> None:
    """Stores remove their memory as they end; what a killed one left on this host goes here."""
    shared = shared_folder(run_id, "n0").parent
    deadline = time.monotonic() + MEMORY_SECONDS
    while any(shared.glob("*/store.sock")) and time.monotonic() < deadline:
        time.sleep(0.02)
    shutil.rmtree(shared, ignore_errors=True)


def end_stores(addresses: Mapping[str, str], *, secret: str) -> None:
    """End stores that nobody serves any more; those that are gone are no matter."""
    for address in addresses.values():
        with suppress(StoreError, OSError):
            StoreAdmin(address, secret).shutdown()


class Stores:
    """Stores by node: `active` ones serve ranks, `retired` ones only remember."""

    def __init__(self, run_dir: RunDir, config: JobConfig, *, secret: str) -> None:
        self._run_dir, self._config, self._secret = run_dir, config, secret
        self._active: dict[str, dict[str, str]] = {}
        self._retired: dict[str, str] = {}
        self._distrusted = (0, 0)
        self._configuration = 0
        asked = config.snapshot.parity_shards
        self.parity_shards: int = 1 if asked == "auto" else asked
        self._pool = ThreadPoolExecutor(max_workers=16, thread_name_prefix="stores")

    def add(self, node: str, store: dict[str, str]) -> None:
        self._active[node] = store
        self._retired.pop(node, None)

    def add_retired(self, node: str, address: str) -> None:
        """A store of an earlier driver's, which may still live."""
        self._retired[node] = address

    def remove(self, node: str) -> None:
        """The store died."""
        self._active.pop(node, None)

    def retire(self, node: str) -> None:
        """The node is lost; its store may live on."""
        store = self._active.pop(node, None)
        if store is not None:
            self._retired[node] = store["address"]

    def of(self, node: str) -> dict[str, str] | None:
        return self._active.get(node)

    @property
    def retired(self) -> bool:
        return bool(self._retired)

    def addresses(self) -> dict[str, str]:
        """Every store that may hold something, by node."""
        return {**self._retired, **{node: store["address"] for node, store in self._active.items()}}

    def distrust(self, *, incarnation: int, above: int) -> None:
        """Generations of steps above this one, of this incarnation or an older one, are not restored any more."""
        self._distrusted = (incarnation, above)

    def _believed(self, status: dict[str, Any]) -> dict[str, Any]:
        """A store's answer without the generations that are not trusted."""
        incarnation, above = self._distrusted
        kept = [held for held in status["generations"] if held["incarnation"] > incarnation or held["step"] <= above]
        return {**status, "generations": kept}

    def holdings(self, *, active_only: bool = False) -> list[Holding]:
        """What live stores hold together, the newest first."""
        addresses = self.addresses()
        if active_only:
            addresses = {node: store["address"] for node, store in self._active.items()}
        answers = self._ask(addresses, lambda admin: admin.status())
        for node in set(self._retired) & set(addresses) - set(answers):
            del self._retired[node]
        return take_inventory(self._believed(answer) for answer in answers.values())

    def checked(self, holdings: list[Holding]) -> tuple[list[Holding], int]:
        """The holdings from the newest sound one on, and how many of its blocks had rotted and were decoded anew."""
        for number, holding in enumerate(holdings):
            keepers = sorted({node for nodes in holding.data.values() for node in nodes} & set(self._active))
            # Twice: parity can be coded anew only from data that another store has repaired.
            first, second = self._scrub(keepers, holding), self._scrub(keepers, holding)
            if len(second) == len(keepers):
                return holdings[number:], sum(first) + sum(second)
        return [], 0

    def _scrub(self, nodes: list[str], holding: Holding) -> list[int]:
        """Blocks of data repaired, by each store in which all is well now."""
        repaired = []
        for node in nodes:
            with suppress(StoreError):
                repaired.append(self._admin(node).scrub(holding)["data"])
        return repaired

    def rebuild(self, holding: Holding, *, seats: dict[int, str]) -> None:
        """Decode what a generation lost, into stores of nodes with ranks. Raises StoreError where that is not possible."""
        targets = sorted(self.answering(set(seats.values())))
        if not targets:
            raise StoreError("no node with ranks has a store")
        work = {}
        for number, node in enumerate(holding.lost):
            # Where its ranks sit now, which is its successor's node if there is one; else dealt out.
            seat = next((seats[rank] for rank in holding.ranks_of(node) if rank in seats), "")
            work[node] = seat if seat in targets else targets[number % len(targets)]
        futures = [
            self._pool.submit(self._admin(target).rebuild, holding, node, stores=self.addresses())
            for node, target in work.items()
        ]
        for future in futures:
            future.result()

    def answering(self, nodes: Collection[str]) -> set[str]:
        """Those of the nodes whose store is there and answers: of a store that died a moment ago nobody may have heard."""
        addresses = {node: store["address"] for node, store in self._active.items() if node in nodes}
        return set(self._ask(addresses, lambda admin: admin.renew()))

    def _admin(self, node: str) -> StoreAdmin:
        return StoreAdmin(self._active[node]["address"], self._secret)

    def configure(
        self, *, incarnation: int, nodes_of_ranks: dict[int, str], hosts: Mapping[str, str], but: Collection[str] = ()
    ) -> None:
        """Tell the stores of the nodes with ranks who belongs to this incarnation, and who protects whom.

        `but` nodes that are lost and would not answer.
        """
        nodes = set(nodes_of_ranks.values()) & set(self._active) - set(but)
        addresses = {node: self._active[node]["address"] for node in sorted(nodes)}
        if not addresses:
            return
        self._configuration += 1
        groups = self.groups({node: hosts.get(node, node) for node in set(nodes_of_ranks.values())})
        self._ask(
            addresses,
            lambda admin: admin.configure(
                incarnation=incarnation, configuration=self._configuration, stores=addresses, nodes_of_ranks=nodes_of_ranks,
                leader=min(addresses), groups=groups, checkpoints=str(self._run_dir.checkpoints),
                keep=self._config.checkpoint.keep, spill=str(self._run_dir.path / ".spill"),
            ),
        )  # fmt: skip

    def groups(self, hosts: Mapping[str, str]) -> list[Group]:
        """The groups of these nodes (name to host, or "rack/host"), as the job asks for them."""
        asked = self._config.snapshot
        return choose_groups(
            hosts,
            data_shards=None if asked.data_shards == "auto" else asked.data_shards,
            parity_shards=self.parity_shards,
        )

    def forget_retired(self) -> None:
        """Something newer is committed: end the retired stores."""
        self._ask(self._retired, lambda admin: admin.shutdown())
        self._retired.clear()

    def shutdown(self) -> None:
        self._ask(self.addresses(), lambda admin: admin.shutdown())
        self._pool.shutdown()

    def _ask(self, addresses: dict[str, str], question: Callable[[StoreAdmin], Any]) -> dict[str, Any]:
        """Ask several stores at once; those that do not answer are left out."""
        admins = {node: StoreAdmin(address, self._secret) for node, address in addresses.items()}
        futures = {node: self._pool.submit(question, admin) for node, admin in admins.items()}
        answers: dict[str, Any] = {}
        for node, future in futures.items():
            with suppress(StoreError, OSError):
                answers[node] = future.result()
        return answers
