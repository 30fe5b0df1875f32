"""Peers of `benchmarks.snapshot` that are not among the project's dependencies; each takes part where it is installed.

pip install --no-deps lm-resiliency==0.2.0 dlrover==0.6.1      (dlrover also wants psutil pynvml deprecated grpcio)
"""

from __future__ import annotations

import functools
import importlib.util
import os
from pathlib import Path
from typing import Any

import torch


def installed() -> list[str]:
    return [kind for kind, package in (("gemini", "lm_resiliency"), ("flash", "dlrover")) if _there(package)]


def _there(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


class Gemini:
    """lm-resiliency's implementation of GEMINI: a copy of its own and one of a peer's state in each trainer's memory."""

    def __init__(self, state: Any, every: int, folder: Path, incarnation: int) -> None:
        from lm_resiliency import InMemoryCkptConfig
        from lm_resiliency.checkpointing import InMemoryCheckpointManager

        self._state, self._every = state, every
        config = InMemoryCkptConfig(
            interval=every, replication_jump=1, disk_flush_interval=0, disk_folder=str(folder / "gemini"),
            run_id=str(incarnation), pin_memory=False,
        )  # fmt: skip
        self._manager = InMemoryCheckpointManager(config)

    def before_update(self) -> None:
        self._manager.maybe_wait()

    def after_update(self, step: int, step_seconds: float) -> None:
        if step % self._every == 0:
            self._manager.save_tensors(list(self._state.tensors().values()), step)

    def finish(self, step: int) -> dict[str, Any]:
        tensors = list(self._state.tensors().values())
        self._manager.save_tensors(tensors, step + 1)
        replicated = self._manager.finalize_replication()
        loaded = self._manager.load_tensors()
        assert loaded is not None
        same = loaded[1] == step + 1 and all(map(torch.equal, tensors, loaded[0]))
        held = 4 * sum(tensor.nbytes for tensor in tensors)
        self._manager.close()
        # Its four buffers a rank would stay until the end of the process.
        del self._manager
        return {"verified": replicated and same, "skipped": 0, "held": held}


@functools.cache
def _checkpointer(folder: str, ranks: int) -> Any:
    """One a process: its helper process serves the first one only."""
    from dlrover.trainer.torch.flash_checkpoint.ddp import DdpCheckpointer

    return DdpCheckpointer(folder, local_shard_num=ranks, global_shard_num=ranks)


class Flash:
    """DLRover's flash checkpoint: a copy into shared memory, in the step; no redundancy over nodes."""

    def __init__(self, state: Any, every: int, folder: Path, ranks: int) -> None:
        os.environ |= {
            "LOCAL_RANK": str(state.rank), "RANK": str(state.rank), "LOCAL_WORLD_SIZE": str(ranks),
            "WORLD_SIZE": str(ranks), "ELASTIC_JOB_NAME": folder.parent.name,
        }  # fmt: skip
        self._state, self._every = state, every
        self._checkpointer = _checkpointer(str(folder / "flash"), ranks)

    def before_update(self) -> None: ...

    def after_update(self, step: int, step_seconds: float) -> None:
        from dlrover.trainer.torch.flash_checkpoint.checkpointer import StorageType

        if step % self._every == 0:
            self._checkpointer.save_checkpoint(step, self._state.tensors(), storage_type=StorageType.MEMORY)

    def finish(self, step: int) -> dict[str, Any]:
        return {}
