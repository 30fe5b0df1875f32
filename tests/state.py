"""The consolidated state of engines on real ranks: packed by the plan's layout, read back as one Source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from tests.jobs import engine, train
from tests.ranks import run_ranks
from trainrt.checkpoint.source import MemorySource, digest
from trainrt.checkpoint.together import open_together
from trainrt.checkpoint.universal import WritePlan, write
from trainrt.config import JobConfig
from trainrt.parallel.layout import Key, Layout
from trainrt.training.planning import place


def _rank_main(
    rank: int, config: JobConfig, start: str | None, steps: int, first: int, target: str, orders: Any
) -> Any:  # fmt: skip
    from trainrt.training.job import load_state, progress_of
    from trainrt.training.manifest import constant_metadata, step_metadata
    from trainrt.training.pipeline import load_pipeline
    from trainrt.training.state import Snapshotter

    made = engine(config, rank, orders)
    if start is not None:
        source = open_together(Path(start), dist.group.WORLD, made.groups.device)
        load_state(made, source, report=lambda *_, **__: None)
        done, made.updates = progress_of(source)
        assert done == first - 1
    snapshotter = Snapshotter(made)
    buffer = np.zeros(snapshotter.bytes, np.uint8)
    snapshotter.copy_into(buffer)
    np.save(f"{target}/initial-{rank}.npy", buffer)
    before = made.updates
    losses = [(result.loss, result.grad_norm) for result in train(made, config, steps=steps, first=first)]
    snapshotter.copy_into(buffer)
    np.save(f"{target}/final-{rank}.npy", buffer)
    metadata = None
    if rank == 0:
        constants = constant_metadata("test", config, pipeline=load_pipeline(config), plan=made.plan)
        done = first + steps - 1
        metadata = {**constants, **step_metadata(made, done, steps=config.run.steps, corpus_digest=None)}
    return losses, snapshotter.layout.to_json(), metadata, before


class Trained:
    """What `steps` steps on a mesh left: losses, and the state of all ranks as a Source."""

    def __init__(
        self, config: JobConfig, folder: Path, *, start: Path | None = None, steps: int = 0, first: int = 1,
        orders: Any = None,
    ) -> None:  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        # Planned once here: the ranks find it in the cache.
        mesh = config.mesh()
        assert mesh is not None
        place(config, mesh)
        results = run_ranks(
            config.world_size, _rank_main, config, str(start) if start else None, steps, first, str(folder), orders,
            timeout=180,
        )  # fmt: skip
        self.config, self.folder = config, folder
        self.losses: list[tuple[float, float]] = results[0][0]
        self.metadata: dict[str, Any] = results[0][2]
        self.updates_before: int = results[0][3]
        layout = Layout()
        for result in results:
            layout.merge(Layout.from_json(result[1]))
        self.initial, self.source = (
            MemorySource(layout, {(r, "state"): np.load(folder / f"{name}-{r}.npy") for r in range(len(results))})
            for name in ("initial", "final")
        )

    def digests(self, roles: set[str] | None = None) -> dict[Key, str]:
        return digest(self.source, roles=roles)

    def initial_digests(self) -> dict[Key, str]:
        """Of the state before the first of these steps: freshly made, or as it was loaded."""
        return digest(self.initial)

    def checkpoint(self) -> Path:
        plan = WritePlan.build(self.source.layout, self.metadata, writers=["a"], writer_of_rank={})
        return write(plan, self.folder, self.source)
