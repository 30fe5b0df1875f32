"""Parity over real stores: whatever m of a group's nodes are killed, the committed generation is decoded, bit for bit."""

from __future__ import annotations

import itertools
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoint.test_store import TOKEN, alive, wait
from trainrt.checkpoint.source import MemorySource, digest
from trainrt.checkpoint.store.admin import StoreAddress, StoreAdmin, spawn
from trainrt.checkpoint.store.client import SnapshotClient, open_generation
from trainrt.checkpoint.store.group import Group, choose_groups, segment_bytes
from trainrt.checkpoint.store.inventory import Holding, take_inventory
from trainrt.checkpoint.store.segments import BUCKET_BYTES
from trainrt.checkpoint.store.slots import shared_folder
from trainrt.errors import StoreError
from trainrt.parallel.layout import Box, Fragment, Layout, LogicalTensor

COLUMNS = 1024


class Cluster:
    """Stores of a run with some ranks each; every rank holds rows of one tensor, each a different number of them."""

    def __init__(self, folder: Path, nodes: int, *, ranks_per_node: int, rows: int, m: int) -> None:
        self.run_id, self.folder, self.m = os.urandom(4).hex(), folder, m
        self.names = [f"n{index}" for index in range(nodes)]
        self.seats = {rank: self.names[rank // ranks_per_node] for rank in range(nodes * ranks_per_node)}
        self.rows = [rows + 16 * rank for rank in self.seats]
        self.tensor = LogicalTensor("w", "parameter", "float32", (sum(self.rows), COLUMNS))
        self.at: dict[str, StoreAddress] = {}
        self.configuration = 0
        self.drifted: set[int] = set()
        for name in self.names:
            self.start(name)

    def start(self, name: str) -> None:
        self.at[name] = spawn(self.run_id, name, grace_seconds=60, token=TOKEN)

    def kill(self, *names: str) -> None:
        for name in names:
            pid = self.at.pop(name).pid
            os.kill(pid, signal.SIGKILL)
            wait(lambda pid=pid: not alive(pid))

    @property
    def addresses(self) -> dict[str, str]:
        return {name: store.address for name, store in self.at.items()}

    def admin(self, name: str) -> StoreAdmin:
        return StoreAdmin(self.at[name].address, TOKEN)

    def configure(self, incarnation: int, seats: dict[int, str] | None = None) -> None:
        self.seats = seats or self.seats
        hosts = dict.fromkeys(set(self.seats.values()), "host")
        self.configuration += 1
        for name in self.at:
            self.admin(name).configure(
                incarnation=incarnation, configuration=self.configuration,
                stores=self.addresses, nodes_of_ranks=self.seats, leader=min(self.at),
                groups=choose_groups(hosts, data_shards=None, parity_shards=self.m),
                checkpoints=str(self.folder / "checkpoints"), keep=2, spill=str(self.folder / "spill"),
            )  # fmt: skip

    def layout(self, rank: int) -> Layout:
        layout = Layout()
        start = sum(self.rows[:rank])
        layout.add(self.tensor, Fragment(rank, Box((start, 0), (self.rows[rank], COLUMNS)), "state", (COLUMNS, 1)))
        return layout

    def contents(self, rank: int, step: int) -> np.ndarray:
        return np.random.default_rng([rank, step]).integers(0, 255, self.rows[rank] * COLUMNS * 4, np.uint8)

    def expected(self, step: int) -> dict[Any, str]:
        layout = Layout()
        for rank in self.seats:
            layout.merge(self.layout(rank))
        return digest(MemorySource(layout, {(rank, "state"): self.contents(rank, step) for rank in self.seats}))

    def clients(self, incarnation: int, *, replicas: bool = False) -> dict[int, SnapshotClient]:
        """`replicas`: every rank could copy all other ranks' shares too."""
        made = {}
        for rank, name in self.seats.items():
            socket = self.at[name].socket
            made[rank] = SnapshotClient(socket, run_id=self.run_id, incarnation=incarnation, rank=rank, token=TOKEN)
            others = [other for other in self.seats if other != rank] if replicas else []
            made[rank].describe(self.layout(rank), self.rows[rank] * COLUMNS * 4, replicas=others)
        return made

    def snapshot(self, clients: dict[int, SnapshotClient], step: int, *, but: int | None = None) -> None:
        """All ranks copy and seal, in halves, so that coding starts before the copy ends."""
        buffers = {rank: client.begin(step) for rank, client in clients.items() if rank != but}
        for rank, buffer in buffers.items():
            assert buffer is not None
            half = buffer.size // 2
            buffer[:half] = self.contents(rank, step)[:half]
            clients[rank].copied(step, half)
        for rank, buffer in buffers.items():
            assert buffer is not None
            buffer[:] = self.contents(rank, step)
            metadata = {"step": step, "run_id": "r", "aliases": {}, "model_config": {}} if rank == 0 else None
            clients[rank].seal(step, metadata=metadata, checkpoint=False)
            if clients[rank].mirror is not None:
                self.copy_orders(clients[rank], step)

    def copy_orders(self, client: SnapshotClient, step: int) -> None:
        """What a trainer copies of the shares of its replicas; one of them has drifted in some steps."""
        assert client.mirror is not None
        mirror, orders = client.mirror
        for other, start, stop, at in orders:
            mirror[at : at + stop - start] = self.contents(other, step)[start:stop]
        if step in self.drifted:
            mirror[0] ^= 1
        client.mirrored(step)

    def pulled(self) -> int:
        """Bytes that came over the network to be coded."""
        return sum(self.admin(name).status()["pulled"] for name in self.at)

    def holdings(self) -> list[Holding]:
        return take_inventory(self.admin(name).status() for name in self.at)

    def rebuild(self, holding: Holding) -> None:
        for node in holding.lost:
            self.admin(min(self.at)).rebuild(holding, node, stores=self.addresses)

    def digest(self, step: int) -> dict[Any, str]:
        name = min(self.at)
        return digest(open_generation(step, self.addresses, node=name, socket=self.at[name].socket, token=TOKEN))

    def close(self) -> None:
        for name in self.at:
            self.admin(name).shutdown()
        wait(lambda: not any(shared_folder(self.run_id, name).exists() for name in self.at))
        for name in self.names:
            for left in shared_folder(self.run_id, name).glob("*"):
                left.unlink()
            if shared_folder(self.run_id, name).exists():
                shared_folder(self.run_id, name).rmdir()
        if shared_folder(self.run_id, "n0").parent.exists():
            shared_folder(self.run_id, "n0").parent.rmdir()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Any]:
    made: list[Cluster] = []

    def build(nodes: int, *, m: int, ranks_per_node: int = 1, rows: int = 64) -> Cluster:
        made.append(Cluster(tmp_path, nodes, m=m, ranks_per_node=ranks_per_node, rows=rows))
        made[-1].configure(1)
        return made[-1]

    yield build
    for cluster in made:
        cluster.close()


def committed(cluster: Cluster, steps: int) -> None:
    clients = cluster.clients(1)
    for step in range(1, steps + 1):
        cluster.snapshot(clients, step)
        assert all(client.wait_committed(30) for client in clients.values())


@pytest.mark.parametrize(
    ("nodes", "m", "ranks_per_node"),
    [(2, 1, 2), (3, 1, 1), (3, 2, 1), pytest.param(5, 2, 1, marks=pytest.mark.campaign), (4, 3, 2)],
)
def test_any_m_lost_nodes_are_decoded(make: Any, nodes: int, m: int, ranks_per_node: int) -> None:
    cluster = make(nodes, m=m, ranks_per_node=ranks_per_node)
    committed(cluster, 3)
    lost = random.Random(nodes * 10 + m).sample(cluster.names, m)
    cluster.kill(*lost)
    (holding,) = cluster.holdings()
    assert (holding.step, holding.lost, holding.recoverable) == (3, sorted(lost), True)
    with pytest.raises(StoreError, match="no longer"):
        cluster.digest(3)
    cluster.configure(
        2, {rank: node if node in cluster.at else min(cluster.at) for rank, node in cluster.seats.items()}
    )
    cluster.rebuild(holding)
    assert cluster.digest(3) == cluster.expected(3)
    assert cluster.digest(3) != cluster.expected(2), "negative control"


@pytest.mark.parametrize(("nodes", "m", "ranks_per_node"), [(2, 1, 2), (4, 2, 1)])
def test_replicated_state_is_coded_without_network_unless_it_has_drifted(
    make: Any, nodes: int, m: int, ranks_per_node: int
) -> None:
    cluster = make(nodes, m=m, ranks_per_node=ranks_per_node, rows=2048)
    clients = cluster.clients(1, replicas=True)

    def step(number: int) -> int:
        before = cluster.pulled()
        cluster.snapshot(clients, number)
        assert all(client.wait_committed(30) for client in clients.values())
        return cluster.pulled() - before

    assert step(1) > 0, "who holds how much is known from the first generation on"
    assert step(2) == 0
    cluster.drifted = {3}
    assert 0 < step(3) <= len(clients) * BUCKET_BYTES
    measured = [link for name in cluster.at for link in cluster.admin(name).renew().values()]
    assert sum(bytes for _, bytes, _ in measured) == cluster.pulled()
    assert all(seconds > 0 for _, bytes, seconds in measured if bytes)
    cluster.kill(*cluster.names[:m])
    (holding,) = [held for held in cluster.holdings() if held.step == 3]
    cluster.rebuild(holding)
    assert cluster.digest(3) == cluster.expected(3)


def test_segments_larger_than_a_bucket_and_ends_that_do_not_fit(make: Any) -> None:
    cluster = make(3, m=1, rows=3 * BUCKET_BYTES // COLUMNS // 4 - 16)
    committed(cluster, 1)
    cluster.kill("n1")
    (holding,) = cluster.holdings()
    cluster.rebuild(holding)
    assert cluster.digest(1) == cluster.expected(1)


def test_more_than_m_lost_nodes_are_not_decoded_and_the_message_says_so(make: Any) -> None:
    cluster = make(3, m=1)
    committed(cluster, 1)
    cluster.kill("n0", "n2")
    (holding,) = cluster.holdings()
    assert not holding.recoverable and holding.lost == ["n0", "n2"]
    assert "lost n0, n2 of a group of 2 + 1" in holding.missing()
    with pytest.raises(StoreError, match="shards needed of stripe"):
        cluster.admin("n1").rebuild(holding, "n0", stores=cluster.addresses)


def test_a_node_lost_before_its_peers_have_coded_falls_back_to_the_generation_before(make: Any) -> None:
    cluster = make(3, m=1)
    clients = cluster.clients(1)
    cluster.snapshot(clients, 1)
    assert all(client.wait_committed(30) for client in clients.values())
    # The last rank never copies, so no parity of step 2 can be whole.
    cluster.snapshot(clients, 2, but=2)
    cluster.kill("n0")
    found = {holding.step: holding.recoverable for holding in cluster.holdings()}
    assert found == {2: False, 1: True}
    cluster.rebuild(next(holding for holding in cluster.holdings() if holding.step == 1))
    assert cluster.digest(1) == cluster.expected(1)


def test_a_second_loss_after_a_rebuilding_is_decoded_with_what_was_rebuilt(make: Any) -> None:
    cluster = make(4, m=2)
    committed(cluster, 1)
    for lost in ("n3", "n2"):
        cluster.kill(lost)
        (holding,) = cluster.holdings()
        cluster.rebuild(holding)
    assert cluster.digest(1) == cluster.expected(1)


@pytest.mark.parametrize("kind", ["rank-", "parity-"])
def test_a_rotten_shard_counts_as_lost(make: Any, kind: str) -> None:
    cluster = make(4, m=2)
    committed(cluster, 1)
    cluster.kill("n3")
    for slot in shared_folder(cluster.run_id, "n1").glob(f"{kind}*"):
        with slot.open("r+b") as file:
            byte = file.read(1)[0]
            file.seek(0)
            file.write(bytes([byte ^ 1]))
    (holding,) = cluster.holdings()
    cluster.admin("n0").rebuild(holding, "n3", stores=cluster.addresses)
    layout, name = cluster.layout(3), min(cluster.at)
    source = open_generation(1, cluster.addresses, node=name, socket=cluster.at[name].socket, token=TOKEN)
    (fragment,) = layout.fragments[("w", "parameter")]
    got = source.read(cluster.tensor, next(f for f in source.layout.fragments[("w", "parameter")] if f.rank == 3))
    assert got.tobytes() == cluster.contents(3, 1).tobytes() and fragment.rank == 3


def test_scrubbing_repairs_flipped_bits_in_data_and_parity(make: Any) -> None:
    cluster = make(3, m=1, rows=1200)
    committed(cluster, 1)
    for kind in ("rank-", "parity-"):
        for slot in shared_folder(cluster.run_id, "n1").glob(f"{kind}*"):
            with slot.open("r+b") as file:
                for place in (5, slot.stat().st_size - 3):
                    file.seek(place)
                    byte = file.read(1)[0]
                    file.seek(place)
                    file.write(bytes([byte ^ 16]))
    with pytest.raises(StoreError, match="checksum"):
        cluster.digest(1)
    repaired = cluster.admin("n1").scrub()
    assert repaired["data"] == 2 and repaired["parity"] >= 1
    assert cluster.digest(1) == cluster.expected(1)
    assert cluster.admin("n1").scrub() == {"data": 0, "parity": 0}
    cluster.kill("n0")
    (holding,) = cluster.holdings()
    cluster.rebuild(holding)
    assert cluster.digest(1) == cluster.expected(1), "the repaired parity decodes"


def test_a_rebuilt_generation_gives_way_to_the_next_committed_one(make: Any) -> None:
    cluster = make(3, m=1)
    committed(cluster, 2)
    cluster.kill("n1")
    cluster.configure(2, {0: "n0", 1: "n2", 2: "n2"})
    (holding,) = cluster.holdings()
    cluster.rebuild(holding)
    clients = cluster.clients(2)
    cluster.snapshot(clients, 3)
    assert all(client.wait_committed(30) for client in clients.values())
    found = cluster.holdings()
    assert [(held.step, held.incarnation, held.protected) for held in found] == [(3, 2, True)]
    assert cluster.digest(3) == cluster.expected(3)


def test_the_rotation_protects_every_segment_once_and_loads_all_alike() -> None:
    for size, m in itertools.product(range(2, 9), (1, 2, 3)):
        if m >= size:
            continue
        group = Group(tuple(f"n{index}" for index in range(size)), m)
        shards = [(stripe, number, node) for stripe in range(size) for number, node in group.shards(stripe).items()]
        assert all(len({node for s, _, node in shards if s == stripe}) == size for stripe in range(size))
        for node in group.nodes:
            assert sorted(n for _, n, held in shards if held == node and n < group.k) == list(range(group.k))
            assert [(s, n - group.k) for s, n, held in shards if held == node and n >= group.k] == sorted(
                group.parity_of(node)
            )
            assert all(group.contributor(group.stripe_of(node, j), j) == node for j in range(group.k))
        for count in range(size + 1):
            for lost in itertools.combinations(group.nodes, count):
                left = set(group.nodes) - set(lost)
                assert group.decodable(data=left, parity=left) == (count <= m)


def test_groups_spread_over_hosts_and_are_reduced_to_what_there_is() -> None:
    one = choose_groups({"n0": "h"}, data_shards=None, parity_shards=2)
    assert one == [Group(("n0",), 0)]
    assert [g.m for g in choose_groups({"n0": "h", "n1": "h"}, data_shards=None, parity_shards=3)] == [1]
    twelve = {f"n{index:02d}": f"h{index // 3}" for index in range(12)}
    groups = choose_groups(twelve, data_shards=3, parity_shards=1)
    assert [(group.k, group.m) for group in groups] == [(3, 1)] * 3
    assert all(len({twelve[node] for node in group.nodes}) == 4 for group in groups), (
        "one host is lost: one node a group"
    )
    racks = {f"n{index:02d}": f"r{index // 3}/h{index % 3}" for index in range(12)}
    for group in choose_groups(racks, data_shards=3, parity_shards=1):
        assert len({racks[node].partition("/")[0] for node in group.nodes}) == 4, "one rack is lost: one node a group"
    assert choose_groups({"n0": "h", "n1": "h"}, data_shards=None, parity_shards=0) == [
        Group(("n0",), 0),
        Group(("n1",), 0),
    ]
    assert segment_bytes(1, 3) == 64 and segment_bytes(640, 3) == 256
