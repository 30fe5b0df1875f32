"""Peers of `benchmarks.recovery` that are not among the project's dependencies; each takes part where it is installed.

    pip install "ray[train]==2.60.0" torchft-nightly==2026.10.26

(With torchft 0.2.0 the survivors of a kill die too: its hook in DDP asserts on the future of a failed all-reduce.) Both train
the model and the batches of our job data-parallel over three processes on gloo, in a loop as their own examples write it, with
their own default time-outs. One process is killed with SIGKILL. A step counts when it began after the kill and was completed:
nothing that was under way does.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainrt.config import load
from trainrt.run_dir import replace
from trainrt.training.data import collate, logical_shards, open_corpus
from trainrt.training.models.moe_lm import MoeLm

ROOT = Path(__file__).parents[1]
RANKS, VICTIM = 3, 1
CHECKPOINT_EVERY = 20
"""Steps between checkpoints of Ray Train's run: a second or three of them."""
WARM_STEPS = 30
PATIENCE_SECONDS = 180.0


def installed() -> dict[str, Callable[[Path, Path], dict[str, float]]]:
    """The peers that are here: (config, folder) to seconds from the kill, by what happened then."""
    found: dict[str, Callable[[Path, Path], dict[str, float]]] = {}
    if _there("pandas", "pyarrow", "tensorboardX"):
        found["Ray Train"] = measure_ray_train
    if _there("torchft"):
        found["torchft"] = measure_torchft
    return found


def _there(*packages: str) -> bool:
    return all(importlib.util.find_spec(package) is not None for package in packages)


class Plain:
    """What one rank trains: model, AdamW, and its third of the global batch."""

    def __init__(self, config: Path, rank: int) -> None:
        torch.set_num_threads(1)
        self.config, self.rank = load(config), rank
        torch.manual_seed(self.config.run.seed)
        self.model = MoeLm(self.config.moe_lm, self.config.moe)
        self.model.initialize()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=self.config.optimizer.learning_rate, weight_decay=0.1
        )
        self._samples = open_corpus(self.config.data).train

    def backward(self, model: nn.Module, step: int) -> None:
        """Gradients of this rank's part of a step, through `model`, which wraps `self.model`."""
        data, moe = self.config.data, self.config.moe
        shards = logical_shards(
            0, step, global_batch=data.global_batch, microbatch=data.microbatch, length=len(self._samples)
        )
        batch = collate([self._samples[int(index)] for index in shards[self.rank]])
        output = model(batch["input_ids"])
        loss: Tensor = F.cross_entropy(output.logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)
        (loss + moe.balance_loss * output.router.balance + moe.z_loss * output.router.z).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip)

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


class Notes:
    """Completed steps, a line each, a file a rank: written by the ranks, read by whoever measures."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, rank: int, step: int, *, began: float, whole: bool = True) -> None:
        """`whole`: all ranks took part in the step."""
        line = {"step": step, "began": began, "time": time.time(), "pid": os.getpid(), "whole": whole}
        with self._path(rank).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def read(self, rank: int) -> list[dict[str, Any]]:
        path = self._path(rank)
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait(self, ranks: list[int], holds: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        """The first line of each of the ranks for which something holds."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            found = [next(filter(holds, self.read(rank)), None) for rank in ranks]
            if None not in found:
                return [line for line in found if line is not None]
            time.sleep(0.02)
        raise TimeoutError(f"ranks {ranks} made no such step within {PATIENCE_SECONDS:.0f} s")

    def _path(self, rank: int) -> Path:
        return self._folder / f"steps-{rank}.jsonl"


@contextmanager
def child(*words: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process of this module: ended, and waited for, at the end."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # A token of Ray's would be written under the home directory, and asked for by every cluster from then on.
    environment = {**os.environ, "PYTHONPATH": path, "RAY_AUTH_MODE": "disabled"}
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.recovery_peers", *words],
            stdout=output, stderr=output, cwd=ROOT, env=environment,
        )  # fmt: skip
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


# Ray Train: all workers are started again, from a checkpoint on disk.


def measure_ray_train(config: Path, folder: Path) -> dict[str, float]:
    """Seconds until all of the new workers completed a step; Ray makes them anew."""
    notes = Notes(folder)
    with child("ray-train", str(config), str(folder), log=folder / "driver.log"):
        before = notes.wait(list(range(RANKS)), lambda line: line["step"] >= WARM_STEPS)
        killed = time.time()
        os.kill(before[VICTIM]["pid"], signal.SIGKILL)
        after = notes.wait(list(range(RANKS)), lambda line: line["began"] > killed)
    return {"Ray Train, a worker (disk)": max(line["time"] for line in after) - killed}


def ray_train_driver(config: Path, folder: Path) -> None:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    ray.init(num_cpus=RANKS + 1, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False)
    TorchTrainer(
        ray_train_worker,
        train_loop_config={"config": str(config), "folder": str(folder)},
        scaling_config=ScalingConfig(num_workers=RANKS),
        run_config=RunConfig(name="run", storage_path=str(folder), failure_config=FailureConfig(max_failures=3)),
        torch_config=TorchConfig(backend="gloo"),
    ).fit()


def ray_train_worker(options: dict[str, str]) -> None:
    import ray.train
    from ray.train.torch import prepare_model

    rank = ray.train.get_context().get_world_rank()
    plain, notes, step = Plain(Path(options["config"]), rank), Notes(Path(options["folder"])), 0
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder) / "state.pt")
        plain.load(state)
        step = state["step"]
    model = prepare_model(plain.model)
    while True:
        began = time.time()
        plain.optimizer.zero_grad()
        plain.backward(model, step)
        plain.optimizer.step()
        step += 1
        notes.write(rank, step, began=began)
        if step % CHECKPOINT_EVERY == 0:
            ray_train_report(plain, step)


def ray_train_report(plain: Plain, step: int) -> None:
    """A checkpoint, written by rank 0; all ranks report."""
    import ray.train

    with tempfile.TemporaryDirectory() as folder:
        if plain.rank == 0:
            torch.save({**plain.state(), "step": step}, Path(folder) / "state.pt")
        kept = ray.train.Checkpoint.from_directory(folder) if plain.rank == 0 else None
        ray.train.report({"step": step}, checkpoint=kept)


# torchft: the survivors go on; the killed replica, started again, takes the state from one of them.


def measure_torchft(config: Path, folder: Path) -> dict[str, float]:
    """Seconds until the survivors committed a step, and until the killed replica, started again at once, took part in one."""
    notes, survivors = Notes(folder), [rank for rank in range(RANKS) if rank != VICTIM]

    def process(name: str) -> Any:
        return child(name, str(config), str(folder), log=folder / f"{name}.log")

    with process("lighthouse"), process("replica-0"), process("replica-2"), process(f"replica-{VICTIM}") as victim:
        notes.wait(list(range(RANKS)), lambda line: line["step"] >= WARM_STEPS and line["whole"])
        killed = time.time()
        victim.kill()
        victim.wait()
        with process(f"replica-{VICTIM}"):
            back = notes.wait([VICTIM], lambda line: line["began"] > killed and line["whole"])
            after = notes.wait(survivors, lambda line: line["began"] > killed)
    return {
        "torchft, the survivors": max(line["time"] for line in after) - killed,
        "torchft, the killed takes part": back[0]["time"] - killed,
    }


def torchft_lighthouse(folder: Path) -> None:
    """What its README starts; the time after which a replica without a heartbeat is lost (5 s) is its default."""
    from torchft.coordination import LighthouseServer

    server = LighthouseServer(bind="[::]:0", min_replicas=1, quorum_tick_ms=100, join_timeout_ms=10000)
    replace(folder / "lighthouse", f"http://127.0.0.1:{server.address().rpartition(':')[2]}")
    signal.pause()


def torchft_replica(config: Path, folder: Path, rank: int) -> None:
    """One replica group of one rank."""
    from torch.distributed import TCPStore
    from torchft import DistributedDataParallel, Manager, Optimizer, ProcessGroupGloo

    plain, notes, lighthouse = Plain(config, rank), Notes(folder), folder / "lighthouse"
    while not lighthouse.exists():
        time.sleep(0.02)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=timedelta(seconds=5)), min_replica_size=1, replica_id=f"replica_{rank}",
        load_state_dict=plain.load, state_dict=plain.state, timeout=timedelta(seconds=30),
        rank=0, world_size=1, store_addr="127.0.0.1", store_port=store.port, lighthouse_addr=lighthouse.read_text(),
    )  # fmt: skip
    model, optimizer = DistributedDataParallel(manager, plain.model), Optimizer(manager, plain.optimizer)
    while True:
        began, step = time.time(), manager.current_step()
        optimizer.zero_grad()
        plain.backward(model, step)
        optimizer.step()
        if manager.current_step() > step:
            whole = manager.is_participating() and manager.num_participants() == RANKS
            notes.write(rank, manager.current_step(), began=began, whole=whole)


if __name__ == "__main__":
    kind, job, where = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    if kind == "ray-train":
        ray_train_driver(job, where)
    elif kind == "lighthouse":
        torchft_lighthouse(where)
    else:
        torchft_replica(job, where, int(kind.removeprefix("replica-")))
