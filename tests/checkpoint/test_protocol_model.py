"""The commit protocol, model-checked: the stores' real code under random schedules of crashes, delays and stale messages.

Everything of a store runs but its sockets, threads and shared memory: messages between stores lie in flight until the
schedule delivers them, in any order, some twice; slots are small arrays. At every recovery the invariants are held
against what was written: never a mixed generation, never an older one over a newer, and what was committed can be had
after at most m lost stores.

A schedule is a seed. Seeds that once failed are kept in SEEDS.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from trainrt.checkpoint.erasure.code import Code
from trainrt.checkpoint.store.generation import Generation, Member, Parity, State
from trainrt.checkpoint.store.group import Group, choose_groups, segment_bytes
from trainrt.checkpoint.store.inventory import Holding, take_inventory
from trainrt.checkpoint.store.segments import NodeData, cut
from trainrt.checkpoint.store.store import Store
from trainrt.launch.recovery import choose_origin

# 511: a vote that came twice, after the decision, had a committed generation given up.
SEEDS = (511,)
ACTIONS = 70
BYTES = 192


def written(step: int, incarnation: int, rank: int) -> np.ndarray:
    """What a rank writes into its slot: different for every step, incarnation and rank."""
    return np.resize(np.array([step, incarnation, rank, step * 7 + rank], np.uint8), BYTES)


class Memory:
    """Slots without shared memory."""

    bytes = 0

    def __init__(self) -> None:
        self._slots: dict[str, tuple[str, int, np.ndarray]] = {}
        self._numbers = itertools.count()

    def take(self, owner: str, size: int, *, used: Any, spill: Any = None) -> str:
        for name, (whose, bytes, _) in self._slots.items():
            if name not in used and (whose, bytes) == (owner, size):
                return name
        name = f"{owner}-{next(self._numbers)}"
        self._slots[name] = (owner, size, np.zeros(size, np.uint8))
        return name

    def map(self, slot: str) -> np.ndarray:
        return self._slots[slot][2]

    def reclaim(self, *, used: Any, wanted: Any) -> None:
        self._slots = {name: held for name, held in self._slots.items() if name in used or wanted(held[0], held[1])}


class Node(Store):
    """A store in a network that the schedule delivers."""

    def __init__(self, name: str, flight: list[tuple[str, str, dict[str, Any]]]) -> None:
        super().__init__(run_id="r", node=name, token="t", grace_seconds=1e9)
        self.slots = Memory()  # type: ignore[assignment]
        self.flight = flight
        self.coding: list[Generation] = []

    async def in_thread(self, work: Any, *arguments: Any) -> Any:
        return work(*arguments)

    async def _tell(self, node: str, op: str, fields: dict[str, Any]) -> bool:
        self.flight.append((node, op, {**fields, "configuration": self.configuration}))
        return True

    async def _hash(self, generation: Generation, member: Member) -> None:
        if generation.state is State.COPYING and member.copied == member.bytes:
            member.hashes = [1]
            if generation.seal(member.rank):
                fields = self._head(generation) | {"ranks": sorted(generation.expected)}
                self.spawn(self._vote("sealed", generation, fields))
                await self._settle(generation)

    async def _protect(self, generation: Generation) -> None:
        self.coding.append(generation)


class World:
    """Nodes with one rank each, their trainers, and a driver that recovers."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        count = self.random.choice((2, 3, 4))
        self.m = self.random.randint(1, min(2, count - 1))
        self.names = [f"n{index}" for index in range(count)]
        self.flight: list[tuple[str, str, dict[str, Any]]] = []
        self.nodes = {name: Node(name, self.flight) for name in self.names}
        self.alive = set(self.names)
        self.incarnation = self.configuration = 0
        self.steps = dict.fromkeys(range(count), 0)
        self.phases = dict.fromkeys(range(count), "begin")
        self.broken = False
        self.lost = 0
        self.committed = 0
        self.restored = 0

    # What may happen.

    def actions(self) -> Iterator[tuple[int, Any]]:
        yield 6, self.train
        yield 4, self.deliver
        yield 3, self.code
        yield 0.4, self.kill_worker
        yield 0.4, self.stale
        if self.lost < self.m:
            yield 0.4, self.kill_store
        if self.broken:
            yield 2, self.recover

    async def run(self) -> None:
        await self.recover()
        for _ in range(ACTIONS):
            weights, choices = zip(*self.actions(), strict=True)
            await self.random.choices(choices, weights)[0]()
            await asyncio.sleep(0)
            self.look_for_commits()
        await self.recover()

    async def train(self) -> None:
        """One rank goes one phase further. Steps are collective: nobody is ahead by more than a snapshot."""
        rank = self.random.choice(list(self.steps))
        store, step = self.nodes[self.names[rank]], self.steps[rank]
        if self.broken:
            return
        if self.phases[rank] == "begin":
            others = (self.steps[other] * 2 + (self.phases[other] != "begin") for other in self.steps if other != rank)
            if all(other >= step * 2 for other in others):
                await self.begin(rank, store, step + 1)
        elif self.phases[rank] == "seal":
            await self.ask(store, "seal", rank, step=step, metadata=None, checkpoint=False)
            self.phases[rank] = "wait"
        else:
            generation = store.generations.get(step, self.incarnation)
            if (
                store.node not in self.alive
                or generation is None
                or generation.abandoned
                or generation.state is State.COMMITTED
            ):
                self.phases[rank] = "begin"

    async def begin(self, rank: int, store: Node, step: int) -> None:
        answer = await self.ask(store, "begin", rank, step=step, checkpoint=False)
        self.steps[rank] = step
        if answer.get("slot") is not None:
            store.slots.map(answer["slot"])[:] = written(step, self.incarnation, rank)
            self.phases[rank] = "seal"

    async def ask(self, store: Node, op: str, rank: int, **fields: Any) -> dict[str, Any]:
        if store.node not in self.alive:
            return {"error": "gone"}
        return (await store.answer({"op": op, "rank": rank, "incarnation": self.incarnation, **fields}))[0]

    async def deliver(self) -> None:
        """A message arrives: any of those in flight, and one in ten stays there to arrive again."""
        if self.flight:
            number = self.random.randrange(len(self.flight))
            node, op, fields = self.flight[number] if self.random.random() < 0.1 else self.flight.pop(number)
            if node not in self.alive:
                return
            answer, _ = await self.nodes[node].answer({"op": op, **fields})
            if "error" in answer and fields["configuration"] > self.nodes[node].configuration:
                # Who votes asks again until the other side has its configuration too.
                self.flight.append((node, op, fields))

    async def code(self) -> None:
        """A store completes a generation's parity, where all its peers have sealed their part."""
        for name in self.random.sample(sorted(self.alive), len(self.alive)):
            for generation in list(self.nodes[name].coding):
                if generation.over:
                    self.nodes[name].coding.remove(generation)
                elif await self.code_one(self.nodes[name], generation):
                    return

    async def code_one(self, node: Node, generation: Generation) -> bool:
        group = generation.group
        assert group is not None
        peers = [other for other in group.nodes if other != node.node]
        if not all(self.data_of(other, generation) is not None for other in peers):
            return False
        size = segment_bytes(BYTES, group.k)
        slot = node.slots.take("parity", size * group.m, used=node.slots_in_use())
        parity = generation.parity = Parity(slot, size * group.m, [])
        for number, (stripe, row) in enumerate(group.parity_of(node.node)):
            shards = [self.segment(group.contributor(stripe, j), generation, j, group.k) for j in range(group.k)]
            out = np.zeros(size, np.uint8)
            Code(group.k, group.m).encode(shards, out, row)
            node.slots.map(slot)[number * size : (number + 1) * size] = out
        parity.hashes = [1]
        node.coding.remove(generation)
        generation.parity_over = True
        await node._settle(generation)
        return True

    def data_of(self, name: str, generation: Any) -> np.ndarray | None:
        """A node's sealed data of a generation, in its own store or where it was rebuilt."""
        for holder in sorted(self.alive):
            held = self.nodes[holder].generations.get(generation.step, generation.incarnation)
            rank = self.names.index(name)
            if held is not None and rank in held.sealed_ranks():
                return self.nodes[holder].slots.map(held.members[rank].slot)
        return None

    def segment(self, name: str, generation: Any, number: int, k: int) -> np.ndarray:
        data = self.data_of(name, generation)
        assert data is not None
        row = NodeData([(BYTES, cut(data))])
        got = np.frombuffer(row.read(*row.segment(number, k, 0, segment_bytes(BYTES, k))), np.uint8)
        out = np.zeros(segment_bytes(BYTES, k), np.uint8)
        out[: got.size] = got
        return out

    async def kill_worker(self) -> None:
        self.broken = True

    async def kill_store(self) -> None:
        """A store dies with its memory; sometimes it is started again before anything else, as the agent does."""
        name = self.random.choice(self.names)
        self.lost += 1
        self.nodes[name] = Node(name, self.flight)
        if self.random.random() < 0.5:
            await self.configure()
        else:
            self.alive.discard(name)
            self.broken = True

    async def stale(self) -> None:
        """A process of an older incarnation comes back: every word of it is refused."""
        name = self.random.choice(self.names)
        if self.incarnation > 1 and name in self.alive:
            message = {"rank": self.names.index(name), "incarnation": self.incarnation - 1, "step": 1 + self.restored}
            for op in ("begin", "seal", "copied", "commit", "protected"):
                answer, _ = await self.nodes[name].answer(
                    {
                        "op": op,
                        "checkpoint": False,
                        "metadata": None,
                        "bytes": 1,
                        "ranks": [0],
                        "configuration": 0,
                        **message,
                    }
                )
                assert "stale" in answer["error"]

    # Recovery, and what must hold there.

    async def configure(self) -> None:
        self.configuration += 1
        seats = {str(rank): name for rank, name in enumerate(self.names)}
        groups = choose_groups(dict.fromkeys(self.names, "h"), data_shards=None, parity_shards=self.m)
        for name in self.random.sample(self.names, len(self.names)):
            if name not in self.alive:
                continue
            await self.nodes[name].op_configure(
                {
                    "incarnation": self.incarnation, "configuration": self.configuration,
                    "stores": dict.fromkeys(sorted(self.alive), ""), "nodes_of_ranks": seats,
                    "groups": [group.to_json() for group in groups], "leader": min(self.alive),
                    "checkpoints": "/nowhere", "keep": 1, "spill": "/nowhere",
                }
            )  # fmt: skip
            if self.random.random() < 0.5:
                await self.deliver()
        for rank, name in enumerate(self.names):
            await self.ask(self.nodes[name], "describe", rank, layout=[], bytes=BYTES, replicas=[])

    async def recover(self) -> None:
        """The driver's part: a new incarnation, an inventory, the newest state that can be had."""
        self.alive = set(self.names)
        self.incarnation += 1
        await self.configure()
        statuses = [(await self.nodes[name].op_status({})) for name in self.names]
        origin, missing = choose_origin(take_inventory(statuses), None, rebuild=self.rebuild)
        assert origin.step >= self.committed, f"{origin} of {self.committed}: {missing}"
        if origin.kind != "none":
            self.check(origin.step, statuses)
        # What was sealed everywhere but never committed may be restored; only the next commit protects it.
        self.restored = origin.step
        self.steps = dict.fromkeys(self.steps, origin.step)
        self.phases = dict.fromkeys(self.steps, "begin")
        self.broken = False

    def check(self, step: int, statuses: list[dict[str, Any]]) -> None:
        """All ranks' bytes of a step are of one incarnation, the newest that is complete."""
        for incarnation in range(self.incarnation, 0, -1):
            key = Holding(step, incarnation, {}, ())
            found = [self.data_of(name, key) for name in self.names]
            if all(data is not None for data in found):
                for rank, data in enumerate(found):
                    assert np.array_equal(data, written(step, incarnation, rank)), (step, incarnation, rank)
                return
        raise AssertionError(f"step {step} is not whole after its recovery")

    def rebuild(self, holding: Holding) -> None:
        for name in holding.lost:
            group = holding.group_of(name)
            data = np.concatenate([self.decode(holding, group, name, segment) for segment in range(group.k)])[:BYTES]
            target = self.nodes[self.random.choice(self.names)]
            made = Generation(holding.step, holding.incarnation, target.node, holding.seating, holding.groups)
            generation = target.generations.open(made)
            rank = self.names.index(name)
            slot = target.slots.take(f"rank-{rank:05d}", BYTES, used=target.slots_in_use())
            target.slots.map(slot)[:] = data
            generation.members[rank] = Member(rank, slot, BYTES, "", copied=BYTES, hashes=[1], sealed=True)
            generation.rebuilt()

    def decode(self, holding: Holding, group: Group, name: str, segment: int) -> np.ndarray:
        stripe, size = group.stripe_of(name, segment), segment_bytes(BYTES, group.k)
        have: dict[int, np.ndarray] = {}
        for number, node in group.shards(stripe).items():
            if number < group.k and self.data_of(node, holding) is not None:
                have[number] = self.segment(node, holding, number, group.k)
            elif number >= group.k and node in holding.parity:
                held = self.nodes[node].generations.get(holding.step, holding.incarnation)
                assert held is not None and held.parity is not None
                place = group.parity_of(node).index((stripe, number - group.k))
                have[number] = self.nodes[node].slots.map(held.parity.slot)[place * size : (place + 1) * size]
        out = np.zeros(size, np.uint8)
        Code(group.k, group.m).decode(dict(list(have.items())[: group.k]), segment, out)
        return out

    def look_for_commits(self) -> None:
        """A commit that reached any store counts, and against it the stores that have lost their part of it since."""
        done = [
            (g.incarnation, g.step)
            for name in sorted(self.alive)
            for g in self.nodes[name].generations
            if g.state is State.COMMITTED
        ]
        newest = max(done, default=(0, 0))
        if newest[0] == self.incarnation and newest[1] > self.committed:
            # A store that died after its vote counts, also if an empty one is in its place already.
            held = [self.nodes[name].generations.get(newest[1], newest[0]) for name in sorted(self.alive)]
            self.committed, self.lost = newest[1], len(self.names) - sum(generation is not None for generation in held)


def explore(seeds: Iterator[int]) -> int:
    async def all_of_them() -> int:
        commits = 0
        for seed in seeds:
            world = World(seed)
            try:
                await world.run()
            except Exception as error:
                raise AssertionError(f"schedule of seed {seed}") from error
            commits += world.committed > 0
        return commits

    return asyncio.run(all_of_them())


def test_random_schedules_never_lose_or_mix_a_committed_generation(request: pytest.FixtureRequest) -> None:
    count = 10_000 if request.config.getoption("--campaign") else 600
    commits = explore(itertools.chain(SEEDS, range(count)))
    assert commits > count / 4, "schedules in which nothing is committed show nothing"


def test_the_model_finds_a_protocol_that_commits_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: parity is declared complete before it is coded."""

    async def hasty(self: Node, generation: Generation) -> None:
        generation.parity_over = True

    monkeypatch.setattr(Node, "_protect", hasty)
    with pytest.raises(AssertionError, match="schedule of seed"):
        explore(iter(range(300)))


def test_the_model_finds_stores_that_accept_stale_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: nobody looks at the incarnation."""
    monkeypatch.setattr(Node, "current", lambda *_: None)
    with pytest.raises(AssertionError, match="schedule of seed"):
        explore(iter(range(300)))
