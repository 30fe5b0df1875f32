"""What snapshots cost a training step: ours in a group of 3 + 1 stores, and torch's DCP `async_save`, against none.

    python -m benchmarks.snapshot [--rounds 5] [--steps 20] [--megabytes 400] [--step-seconds 1.0] [--arms none,ours 1]

Four ranks in one process group, each with its own store as if it were a node; each holds that much state (parameters, exp_avg,
exp_avg_sq in float32) and steps together with the others. A step is a real forward, backward and AdamW update of a rank's own
layers, filled up with sleep to the given length: the rest of an accelerator's step, in which the host's cores are free. Arms
alternate within every round. After each arm of ours all state is read back from the stores and compared bit for bit.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.checkpoint import async_save

from benchmarks.snapshot_peers import Flash, Gemini, installed
from trainrt.checkpoint.store.admin import StoreAddress, StoreAdmin, spawn
from trainrt.checkpoint.store.client import SnapshotClient, open_generation
from trainrt.checkpoint.store.group import choose_groups
from trainrt.checkpoint.store.slots import shared_folder
from trainrt.config import JobConfig, MeshSize
from trainrt.parallel.plan import Cut, ParameterPlan, Part, Plan
from trainrt.training.snapshots import Snapshots
from trainrt.training.state import Snapshotter, restore

RANKS, PARITY, WIDTH, TOKENS = 4, 1, 1024, 64
WARM_UP = 3
TOKEN = "benchmark"


class State:
    """One rank's layers and their optimizer, as an engine shows them: rows of every weight are cut over the ranks."""

    def __init__(self, rank: int, layers: int) -> None:
        torch.manual_seed(rank)
        self.rank = rank
        self.model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, foreach=True)
        shape = (RANKS * WIDTH, WIDTH)
        names = [name for name, _ in self.model.named_parameters()]
        self._weights = dict(self.model.named_parameters())
        parts = {name: (Part.whole(name, shape),) for name in names}
        cuts = (Cut("fsdp", 0),)
        self.plan = Plan(
            MeshSize(fsdp=RANKS),
            tuple(ParameterPlan(name, shape, "float32", cuts, "benchmark", parts[name]) for name in names),
            {},
        )

    def roles(self) -> list[tuple[str, str | None]]:
        return [("parameter", None), ("exp_avg", "float32"), ("exp_avg_sq", "float32")]

    def tensor(self, name: str, role: str) -> Tensor:
        weight = self._weights[name]
        return weight if role == "parameter" else self.optimizer.state[weight][role]

    def tensors(self) -> dict[str, Tensor]:
        return {
            f"{self.rank}.{name}.{role}": self.tensor(name, role) for name in self._weights for role, _ in self.roles()
        }

    def forward_backward(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.randn(TOKENS, WIDTH)).square().mean().backward()


class Arm(Protocol):
    """`before_update` and `after_update` are called around each update; what they take is the stall."""

    def before_update(self) -> None: ...
    def after_update(self, step: int, step_seconds: float) -> None: ...
    def finish(self, step: int) -> dict[str, Any]: ...


class Nothing:
    def before_update(self) -> None: ...

    def after_update(self, step: int, step_seconds: float) -> None: ...

    def finish(self, step: int) -> dict[str, Any]:
        return {}


class Ours:
    """The trainer's own path: a slot of its store, a copy beside the next forward and backward, a commit over four stores."""

    def __init__(
        self, state: State, every: int, stores: dict[str, StoreAddress], run_id: str, incarnation: int
    ) -> None:
        self._state, self._stores, self._incarnation = state, stores, incarnation
        self._node = f"n{state.rank}"
        snapshotter = Snapshotter(state)
        socket = stores[self._node].socket
        self._client = SnapshotClient(socket, run_id=run_id, incarnation=incarnation, rank=state.rank, token=TOKEN)
        self._client.describe(snapshotter.layout, snapshotter.bytes)
        config = JobConfig.model_validate({"snapshot": {"every": every}, "checkpoint": {"every": 0}})
        self._snapshots = Snapshots(config, snapshotter, self._client, mtbf_seconds=3600.0)

    def before_update(self) -> None:
        self._snapshots.before_update()

    def after_update(self, step: int, step_seconds: float) -> None:
        self._snapshots.interval.begin(step, step_seconds=step_seconds, stall_seconds=0.0)
        self._snapshots.take(step, ending=False, metadata=lambda: {"step": step} if self._state.rank == 0 else None)

    def finish(self, step: int) -> dict[str, Any]:
        """Keep the last state, and compare what the stores give back with it."""
        self._snapshots.interval.now = True
        self._snapshots.take(step + 1, ending=False, metadata=lambda: {} if self._state.rank == 0 else None)
        self._snapshots.finish_copy()
        committed = self._client.wait_committed(60)
        dist.barrier()
        kept = {name: tensor.detach().clone() for name, tensor in self._state.tensors().items()}
        for tensor in self._state.tensors().values():
            tensor.detach().zero_()
        addresses = {name: store.address for name, store in self._stores.items()}
        socket = self._stores[self._node].socket
        restore(self._state, open_generation(step + 1, addresses, node=self._node, socket=socket, token=TOKEN))
        same = all(torch.equal(tensor, kept[name]) for name, tensor in self._state.tensors().items())
        self._snapshots.close()
        held = StoreAdmin(self._stores[self._node].address, TOKEN).status()["bytes"]
        return {"verified": committed and same, "skipped": self._snapshots.skipped, "held": held}


class Dcp:
    """torch.distributed.checkpoint's async_save into shared memory; the next save waits for the one before."""

    def __init__(self, state: State, every: int, folder: Path) -> None:
        self._state, self._every, self._folder = state, every, folder
        self._saving: Any = None
        # Its thread's collectives must not meet the trainer's.
        self._group = dist.new_group(backend="gloo")

    def before_update(self) -> None: ...

    def after_update(self, step: int, step_seconds: float) -> None:
        if step % self._every == 0:
            self._wait()
            self._saving = async_save(
                self._state.tensors(), checkpoint_id=self._folder / f"step-{step % 2}", process_group=self._group
            )

    def _wait(self) -> None:
        if self._saving is not None:
            self._saving.result()

    def finish(self, step: int) -> dict[str, Any]:
        self._wait()
        return {}


def play(state: State, arm: Arm, *, steps: int, step_seconds: float) -> dict[str, Any]:
    """Seconds of each step, and of them those for which the trainer waited."""
    took, stalls, last = [], [], 0.0
    for step in range(1, steps + 1):
        dist.barrier()
        start = time.perf_counter()
        state.forward_backward()
        time.sleep(max(0.0, step_seconds - (time.perf_counter() - start) - last))
        waited = time.perf_counter()
        arm.before_update()
        updated = time.perf_counter()
        state.optimizer.step()
        last = time.perf_counter() - updated
        after = time.perf_counter()
        arm.after_update(step, step_seconds)
        stalls.append(updated - waited + time.perf_counter() - after)
        took.append(time.perf_counter() - start)
    return {"seconds": took[WARM_UP:], "stalls": stalls[WARM_UP:], **arm.finish(steps)}


def make(name: str, state: State, folder: Path, stores: dict[str, StoreAddress], run_id: str, incarnation: int) -> Arm:
    kind, _, every = name.partition(" ")
    match kind:
        case "ours":
            return Ours(state, int(every), stores, run_id, incarnation)
        case "dcp":
            return Dcp(state, int(every), folder)
        case "gemini":
            return Gemini(state, int(every), folder, incarnation)
        case "flash":
            return Flash(state, int(every), folder, RANKS)
    return Nothing()


PEERS = ("dcp", *installed())
ARMS = ("none", *(f"{kind} {every}" for kind in ("ours", *PEERS) for every in (1, 10)))


def configure(stores: dict[str, StoreAddress], incarnation: int, folder: Path) -> None:
    seats = {rank: f"n{rank}" for rank in range(RANKS)}
    groups = choose_groups(dict.fromkeys(stores, "host"), data_shards=RANKS - PARITY, parity_shards=PARITY)
    for store in stores.values():
        StoreAdmin(store.address, TOKEN).configure(
            incarnation=incarnation, configuration=incarnation, groups=groups, nodes_of_ranks=seats, leader="n0",
            stores={name: other.address for name, other in stores.items()}, checkpoints=str(folder), keep=1, spill=str(folder),
        )  # fmt: skip


def worker(
    rank: int, options: argparse.Namespace, folder: Path, stores: dict[str, StoreAddress], run_id: str, queue: Any
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=RANKS)
    state = State(rank, max(1, round(options.megabytes * 1e6 / (12 * WIDTH * WIDTH))))
    state.forward_backward()
    state.optimizer.step()
    incarnation = 0
    for number in range(options.rounds):
        arms = options.arms
        for name in arms[number % len(arms) :] + arms[: number % len(arms)]:
            incarnation += 1
            if rank == 0:
                configure(stores, incarnation, folder)
            dist.barrier()
            arm = make(name, state, folder / "dcp", stores, run_id, incarnation)
            found = play(state, arm, steps=options.steps, step_seconds=options.step_seconds)
            gathered: list[Any] = [None] * RANKS
            dist.all_gather_object(gathered, found)
            if rank == 0:
                queue.put((name, gathered))
    dist.destroy_process_group()


def report(results: dict[str, list[list[dict[str, Any]]]], gigabytes: float) -> None:
    plain = [statistics.mean(ranks[0]["seconds"]) for ranks in results["none"]]
    print(f"{RANKS} ranks with {gigabytes:.2f} GB each, {RANKS - PARITY} + {PARITY}; {len(plain)} rounds, arms in turn")
    for name, rounds in results.items():
        stalls = sorted(stall for ranks in rounds for found in ranks for stall in found["stalls"])
        ratios = [base / statistics.mean(ranks[0]["seconds"]) for base, ranks in zip(plain, rounds, strict=True)]
        p50, p99 = statistics.median(stalls), stalls[int(0.99 * (len(stalls) - 1))]
        print(
            f"  {name:8s} stall p50 {p50 * 1e3:7.1f} ms  p99 {p99 * 1e3:7.1f} ms  ({p50 * 1e3 / gigabytes:6.1f} ms/GB)"
            f"   throughput {statistics.median(ratios):.3f}x ({min(ratios):.3f}-{max(ratios):.3f})"
        )
        checked = [found for ranks in rounds for found in ranks if "verified" in found]
        if checked:
            most = max(found["held"] for found in checked) / 1e9
            print(
                f"           restored bytes equal: {all(found['verified'] for found in checked)}, skipped "
                f"{sum(found['skipped'] for found in checked)}, shared memory {most:.2f} GB a node "
                f"(2 S (1 + m/k) = {2 * gigabytes * (1 + PARITY / (RANKS - PARITY)):.2f})"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--megabytes", type=float, default=400.0)
    parser.add_argument("--step-seconds", type=float, default=1.0)
    parser.add_argument("--arms", type=lambda text: tuple(text.split(",")), default=ARMS)
    options = parser.parse_args()
    run_id = os.urandom(4).hex()
    stores = {f"n{rank}": spawn(run_id, f"n{rank}", grace_seconds=3600, token=TOKEN) for rank in range(RANKS)}
    results: dict[str, list[list[dict[str, Any]]]] = defaultdict(list)
    queue = mp.get_context("spawn").SimpleQueue()
    try:
        # DCP writes where ours does: into memory, not onto a disk.
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            context = mp.spawn(worker, (options, Path(folder), stores, run_id, queue), nprocs=RANKS, join=False)
            over = False
            while not over or not queue.empty():
                if queue.empty():
                    over = over or context.join(timeout=0.1)
                else:
                    name, gathered = queue.get()
                    results[name].append(gathered)
    finally:
        for store in stores.values():
            StoreAdmin(store.address, TOKEN).shutdown()
        time.sleep(1)
        shutil.rmtree(shared_folder(run_id, "n0").parent, ignore_errors=True)
    layers = max(1, round(options.megabytes * 1e6 / (12 * WIDTH * WIDTH)))
    report(results, layers * 12 * WIDTH * WIDTH / 1e9)


if __name__ == "__main__":
    main()
