"""Stores as real daemons: commit over all ranks or not at all, kills, stale messages, and what is read back."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainrt.checkpoint.inspect import verify
from trainrt.checkpoint.source import MemorySource, digest
from trainrt.checkpoint.store.admin import StoreAddress, StoreAdmin, spawn
from trainrt.checkpoint.store.client import SnapshotClient, open_generation
from trainrt.checkpoint.store.generation import TRANSITIONS, Generation, State
from trainrt.checkpoint.store.group import choose_groups
from trainrt.checkpoint.store.inventory import take_inventory
from trainrt.checkpoint.store.slots import shared_folder
from trainrt.checkpoint.universal import Universal
from trainrt.errors import StaleIncarnation, StoreError
from trainrt.parallel.layout import Box, Fragment, Layout, LogicalTensor

TOKEN = "secret"
RANKS = {0: "a", 1: "a", 2: "b", 3: "b"}
ROWS, COLUMNS = 64, 1000
TENSOR = LogicalTensor("w", "parameter", "float32", (ROWS * len(RANKS), COLUMNS))
BYTES = ROWS * COLUMNS * 4


class Stores:
    """Two stores of a run, and the clients of its ranks."""

    def __init__(self, folder: Path) -> None:
        self.run_id, self.folder = uuid.uuid4().hex[:8], folder
        self.at: dict[str, StoreAddress] = {}
        self.configuration = 0
        for node in ("a", "b"):
            self.start(node)

    def start(self, node: str) -> StoreAddress:
        self.at[node] = spawn(self.run_id, node, grace_seconds=60, token=TOKEN)
        return self.at[node]

    @property
    def addresses(self) -> dict[str, str]:
        return {node: store.address for node, store in self.at.items()}

    def configure(self, incarnation: int, ranks: dict[int, str] = RANKS) -> None:
        groups = choose_groups(dict.fromkeys(set(ranks.values()), "host"), data_shards=None, parity_shards=1)
        self.configuration += 1
        for store in self.at.values():
            StoreAdmin(store.address, TOKEN).configure(
                incarnation=incarnation, configuration=self.configuration,
                stores=self.addresses, nodes_of_ranks=ranks, leader="a", groups=groups,
                checkpoints=str(self.folder / "checkpoints"), keep=2, spill=str(self.folder / "spill"),
            )  # fmt: skip

    def client(self, rank: int, incarnation: int) -> SnapshotClient:
        socket = self.at[RANKS[rank]].socket
        made = SnapshotClient(socket, run_id=self.run_id, incarnation=incarnation, rank=rank, token=TOKEN)
        made.describe(layout_of(rank), BYTES)
        return made

    def statuses(self) -> list[dict[str, Any]]:
        return [StoreAdmin(store.address, TOKEN).status() for store in self.at.values()]

    def newest(self) -> int | None:
        """The newest step that is whole without decoding."""
        return next((held.step for held in take_inventory(self.statuses()) if not held.lost), None)

    def open(self, step: int, node: str = "a") -> Any:
        return open_generation(step, self.addresses, node=node, socket=self.at[node].socket, token=TOKEN)


def layout_of(rank: int) -> Layout:
    layout = Layout()
    layout.add(TENSOR, Fragment(rank, Box((rank * ROWS, 0), (ROWS, COLUMNS)), "state", (COLUMNS, 1)))
    return layout


def contents(rank: int, step: int) -> np.ndarray:
    return np.random.default_rng([rank, step]).integers(0, 255, BYTES, np.uint8)


def expected(step: int) -> dict[Any, str]:
    layout = Layout()
    for rank in RANKS:
        layout.merge(layout_of(rank))
    return digest(MemorySource(layout, {(rank, "state"): contents(rank, step) for rank in RANKS}))


def put(client: SnapshotClient, rank: int, step: int, *, checkpoint: bool = False) -> None:
    buffer = client.begin(step, checkpoint=checkpoint)
    assert buffer is not None
    buffer[:] = contents(rank, step)
    metadata = {"step": step, "run_id": "r", "aliases": {}, "model_config": {}} if rank == 0 else None
    client.seal(step, metadata=metadata, checkpoint=checkpoint)


@pytest.fixture
def stores(tmp_path: Path) -> Iterator[Stores]:
    made = Stores(tmp_path)
    yield made
    for store in made.at.values():
        try:
            StoreAdmin(store.address, TOKEN).shutdown()
        except StoreError:
            os.kill(store.pid, 0) if alive(store.pid) else None
    wait(lambda: not shared_folder(made.run_id, "a").exists() and not shared_folder(made.run_id, "b").exists())


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def wait(condition: Any, seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "condition not met in time"
        time.sleep(0.01)


def test_a_generation_is_committed_over_all_ranks_and_read_back_from_either_node(stores: Stores) -> None:
    stores.configure(1)
    clients = {rank: stores.client(rank, 1) for rank in RANKS}
    for step in (1, 2, 3):
        for rank, client in clients.items():
            put(client, rank, step)
        assert all(client.wait_committed(20) for client in clients.values())
    for node in ("a", "b"):
        source = stores.open(3, node)
        assert digest(source) == expected(3)
        assert source.metadata["step"] == 3
    assert digest(stores.open(3)) != expected(2), "negative control"
    with pytest.raises(StoreError, match="no longer"):
        stores.open(1)


def test_without_the_last_rank_nothing_is_committed_and_the_older_one_stays(stores: Stores) -> None:
    stores.configure(1)
    clients = {rank: stores.client(rank, 1) for rank in RANKS}
    for step, ranks in ((1, RANKS), (2, [0, 1, 2])):
        for rank in ranks:
            put(clients[rank], rank, step)
        if step == 1:
            assert all(clients[rank].wait_committed(20) for rank in ranks)
    assert not clients[0].wait_committed(0.5)
    assert stores.newest() == 1
    stores.configure(2)
    assert stores.newest() == 1
    assert digest(stores.open(1)) == expected(1)


def test_a_new_incarnation_keeps_what_it_restores_until_it_commits_its_own(stores: Stores) -> None:
    stores.configure(1)
    old = {rank: stores.client(rank, 1) for rank in RANKS}
    for step in (1, 2):
        for rank in RANKS:
            put(old[rank], rank, step)
        assert all(old[rank].wait_committed(20) for rank in RANKS)
    stores.configure(2)
    with pytest.raises(StoreError, match="incarnation 1 is stale"):
        stores.client(0, 1)
    with pytest.raises(StaleIncarnation, match="incarnation 1 is stale"):
        old[0].begin(3)
    new = {rank: stores.client(rank, 2) for rank in RANKS}
    for rank in RANKS:
        buffer = new[rank].begin(3)
        assert buffer is not None
        buffer[:] = 0
    assert digest(stores.open(2)) == expected(2), "half-written slots touch nothing that is sealed"


def test_an_inventory_mixes_neither_incarnations_nor_worlds() -> None:
    def held(step: int, incarnation: int, world_size: int, ranks: list[int]) -> dict[str, Any]:
        seating = {str(rank): "ab"[rank // 2] for rank in range(world_size)}
        return {
            "step": step,
            "incarnation": incarnation,
            "seating": seating,
            "groups": [],
            "ranks": ranks,
            "parity": False,
        }

    def whole(*statuses: dict[str, Any]) -> list[int]:
        return [found.step for found in take_inventory(statuses) if not found.lost]

    one = {"node": "a", "generations": [held(5, 1, 4, [0, 1]), held(4, 1, 4, [0, 1]), held(6, 2, 2, [0])]}
    two = {"node": "b", "generations": [held(5, 2, 4, [2, 3]), held(4, 1, 4, [2, 3]), held(6, 3, 4, [1])]}
    assert whole(one, two) == [4]
    assert whole(one) == [] and whole() == []


def _trainer(stores: dict[str, Any], ready: Any) -> None:
    client = SnapshotClient(stores["socket"], run_id=stores["run_id"], incarnation=1, rank=1, token=TOKEN)
    client.describe(layout_of(1), BYTES)
    buffer = client.begin(2)
    assert buffer is not None
    buffer[: BYTES // 2] = 7
    ready.set()
    time.sleep(60)


def test_a_trainer_killed_while_it_copies_costs_only_that_generation(stores: Stores) -> None:
    stores.configure(1)
    clients = {rank: stores.client(rank, 1) for rank in RANKS}
    for rank in RANKS:
        put(clients[rank], rank, 1)
    assert all(client.wait_committed(20) for client in clients.values())
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    trainer = context.Process(target=_trainer, args=({"socket": stores.at["a"].socket, "run_id": stores.run_id}, ready))
    trainer.start()
    assert ready.wait(30)
    os.kill(trainer.pid or 0, signal.SIGKILL)
    trainer.join()
    for rank in (0, 2, 3):
        put(clients[rank], rank, 2)
    assert not clients[0].wait_committed(0.5)
    assert stores.newest() == 1
    stores.configure(2)
    assert digest(stores.open(1)) == expected(1)


def test_a_killed_store_costs_snapshots_until_a_new_one_is_there(stores: Stores) -> None:
    stores.configure(1)
    clients = {rank: stores.client(rank, 1) for rank in RANKS}
    os.kill(stores.at["b"].pid, signal.SIGKILL)
    wait(lambda: not alive(stores.at["b"].pid))
    assert clients[2].begin(1) is None
    assert clients[2].skipped == 1
    assert stores.start("b").pid
    stores.configure(1)
    for rank in RANKS:
        put(clients[rank], rank, 2)
        # The new store begins to code before it knows of its second rank.
        time.sleep(0.3)
    assert all(client.wait_committed(20) for client in clients.values())
    assert digest(stores.open(2)) == expected(2)


def test_spawning_twice_adopts_the_living_store(stores: Stores) -> None:
    assert spawn(stores.run_id, "a", grace_seconds=60, token=TOKEN) == stores.at["a"]


def test_a_store_ends_by_itself_when_nobody_renews_it(tmp_path: Path) -> None:
    run_id = uuid.uuid4().hex[:8]
    store = spawn(run_id, "a", grace_seconds=0.5, token=TOKEN)
    wait(lambda: not alive(store.pid))
    wait(lambda: not shared_folder(run_id, "a").parent.exists())


def test_without_the_token_there_is_no_answer(stores: Stores) -> None:
    with pytest.raises(StoreError):
        StoreAdmin(stores.at["a"].address, "guess").status()


def test_a_checkpoint_is_written_by_both_stores_and_is_the_generation(stores: Stores) -> None:
    stores.configure(1)
    clients = {rank: stores.client(rank, 1) for rank in RANKS}
    for rank in RANKS:
        put(clients[rank], rank, 1, checkpoint=True)
    paths = {client.wait_checkpoint(1, 30) for client in clients.values()}
    assert len(paths) == 1
    path = paths.pop()
    assert digest(Universal.open(path)) == expected(1)
    assert verify(path)["ok"]


def test_a_checkpoint_that_cannot_be_written_says_why(stores: Stores) -> None:
    (stores.folder / "checkpoints").write_text("a file where the folder should be")
    stores.configure(1)
    clients = {rank: stores.client(rank, 1) for rank in RANKS}
    for rank in RANKS:
        put(clients[rank], rank, 1, checkpoint=True)
    with pytest.raises(StoreError, match="checkpoint of step 1"):
        clients[0].wait_checkpoint(1, 30)
    for rank in RANKS:
        put(clients[rank], rank, 2)
    assert all(client.wait_committed(20) for client in clients.values()), "snapshots go on"


def test_a_bit_that_rots_in_memory_is_found_before_it_is_used(stores: Stores) -> None:
    stores.configure(1)
    clients = {rank: stores.client(rank, 1) for rank in RANKS}
    for rank in RANKS:
        put(clients[rank], rank, 1)
    assert all(client.wait_committed(20) for client in clients.values())
    for node in ("a", "b"):
        slot = sorted(shared_folder(stores.run_id, node).glob("rank-*"))[0]
        with slot.open("r+b") as file:
            file.seek(BYTES // 2)
            byte = file.read(1)[0]
            file.seek(BYTES // 2)
            file.write(bytes([byte ^ 4]))
    with pytest.raises(StoreError, match="checksum"):
        digest(stores.open(1))


def test_no_room_is_an_answer_and_a_checkpoint_spills_to_disk(stores: Stores) -> None:
    stores.configure(1, {0: "a"})
    client = SnapshotClient(stores.at["a"].socket, run_id=stores.run_id, incarnation=1, rank=0, token=TOKEN)
    facts = os.statvfs("/dev/shm")
    client.describe(layout_of(0), facts.f_blocks * facts.f_frsize * 2)
    assert client.begin(1) is None
    assert client.skipped == 1
    assert not list(shared_folder(stores.run_id, "a").glob("rank-*")), "nothing half-made is left"


def test_the_document_shows_the_states_and_transitions_of_the_code() -> None:
    text = (Path(__file__).parents[2] / "docs" / "recovery.md").read_text()
    for (state, event), target in TRANSITIONS.items():
        assert f"| {state.value} | {event} | {target.value} |" in text
    assert text.count("| committed |") == sum(State.COMMITTED in (a, b) for (a, _), b in TRANSITIONS.items())


def test_a_transition_that_is_not_in_the_table_is_refused() -> None:
    generation = Generation(1, 1, "a", {0: "a"})
    with pytest.raises(StoreError, match="no commit in state copying"):
        generation.advance("commit")
    assert json.dumps(generation.summary())
