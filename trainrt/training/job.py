"""A job on one rank: everything the step loop needs, built in the order in which it depends on each other."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainrt.checkpoint.source import Source
from trainrt.checkpoint.store.client import SnapshotClient, open_generation
from trainrt.checkpoint.together import fill_together, open_together
from trainrt.checkpoint.universal import Universal
from trainrt.config import JobConfig, MeshSize, load
from trainrt.errors import CheckpointError
from trainrt.parallel.mesh import Groups, make_groups
from trainrt.parallel.plan import Plan
from trainrt.run_dir import RunDir
from trainrt.training.data import collate, open_corpus
from trainrt.training.engines.mixtures import recall
from trainrt.training.engines.native import NativeEngine
from trainrt.training.integrity import Integrity
from trainrt.training.manifest import constant_metadata
from trainrt.training.models.build import whole_model
from trainrt.training.pipeline import Pipeline, SampleSource, load_pipeline, loss_function
from trainrt.training.planning import meta_model, place
from trainrt.training.recorder import Recorder
from trainrt.training.snapshots import Snapshots
from trainrt.training.state import Snapshotter, restore


@dataclass(frozen=True, slots=True)
class Spec:
    """The orders for one rank of one incarnation, as the agent sends them."""

    run_dir: str
    run_id: str
    token: str
    incarnation: int
    rank: int
    world_size: int
    local_rank: int
    node: str
    rendezvous: str
    mesh: dict[str, int]
    expert_orders: dict[str, list[int]]
    store: dict[str, str] | None
    stores: dict[str, str]
    restore: dict[str, Any]
    device: str
    steps: int
    mtbf_seconds: float

    @classmethod
    def from_message(cls, message: dict[str, Any]) -> Spec:
        return cls(**{key.name: message[key.name] for key in fields(cls)})


@dataclass(slots=True)
class Job:
    """One rank's part of a job. `done`: the last step the state includes."""

    spec: Spec
    config: JobConfig
    run_dir: RunDir
    pipeline: Pipeline
    plan: Plan
    engine: NativeEngine
    train: SampleSource
    validation: SampleSource | None
    corpus_digest: str | None
    snapshots: Snapshots
    recorder: Recorder
    done: int
    constants: dict[str, Any]
    integrity: Integrity

    @classmethod
    def build(cls, spec: Spec, *, report: Callable[..., None]) -> Job:
        """Plan, model, engine, data, store, state. `report` gets a phase with its seconds."""
        run_dir = RunDir(spec.run_dir)
        config = load(run_dir.config)
        clock = _Phases(report)
        pipeline = load_pipeline(config)
        meta = meta_model(config, pipeline)
        orders = {name: tuple(order) for name, order in spec.expert_orders.items()}
        plan = place(config, MeshSize(**spec.mesh), model=meta, orders=orders)
        groups = make_groups(plan.mesh, device_of(spec))
        model = whole_model(config, pipeline.model, fresh=spec.restore["from"] == "none")
        engine = NativeEngine(model, plan, groups, config=config, loss=loss_function(config, pipeline), rank=spec.rank)
        clock.phase("model")
        train, validation, digest = open_samples(config, pipeline)
        clock.phase("data")
        done, source = 0, open_state(spec, groups.device)
        if source is not None:
            load_state(engine, source, report=report)
            done, engine.updates = progress_of(source)
            recall(engine.tuners, strategies_of(source))
        snapshotter = Snapshotter(engine)
        store = connect_store(spec, snapshotter)
        clock.phase("restore")
        recorder = Recorder(run_dir, rank=spec.rank, node=spec.node, incarnation=spec.incarnation, device=groups.device)
        constants = constant_metadata(spec.run_id, config, pipeline=pipeline, plan=plan)
        return cls(
            spec=spec, constants=constants, config=config, run_dir=run_dir, pipeline=pipeline, plan=plan, engine=engine,
            train=train, validation=validation, corpus_digest=digest, recorder=recorder,
            snapshots=Snapshots(config, snapshotter, store, mtbf_seconds=spec.mtbf_seconds), done=done,
            integrity=Integrity(config, engine, run_dir, done=done),
        )  # fmt: skip

    @property
    def groups(self) -> Groups:
        return self.engine.groups

    def collate(self, samples: list[Any]) -> dict[str, torch.Tensor]:
        return (self.pipeline.collate or collate)(samples)


class _Phases:
    def __init__(self, report: Callable[..., None]) -> None:
        self._report, self._last = report, time.perf_counter()

    def phase(self, name: str) -> None:
        now = time.perf_counter()
        self._report("phase", name=name, seconds=now - self._last)
        self._last = now


def device_of(spec: Spec) -> torch.device:
    return torch.device("cuda", spec.local_rank) if spec.device == "cuda" else torch.device("cpu")


def open_samples(config: JobConfig, pipeline: Pipeline) -> tuple[SampleSource, SampleSource | None, str | None]:
    """Training and validation samples, and the digest of the corpus where it is ours."""
    if pipeline.samples is not None:
        return pipeline.samples(), None, None
    corpus = open_corpus(config.data)
    return corpus.train, corpus.validation if len(corpus.validation) else None, corpus.digest


def open_state(spec: Spec, device: torch.device) -> Source | None:
    """Where this incarnation's state comes from: a generation in memory, a checkpoint, or nowhere."""
    origin = spec.restore["from"]
    if origin == "none":
        return None
    if origin == "disk":
        return open_together(Path(spec.restore["path"]), dist.group.WORLD, device)
    if spec.store is None:
        raise CheckpointError("restore from memory was ordered, but this node has no store")
    return open_generation(
        spec.restore["step"], spec.stores, node=spec.node, socket=spec.store["socket"], token=spec.token
    )


def load_state(engine: NativeEngine, source: Source, *, report: Callable[..., None]) -> None:
    """Fill the engine's state. What is on disk is read by all ranks together; rank 0 reports how much that was."""
    if not isinstance(source, Universal):
        restore(engine, source)
        return
    together = partial(fill_together, group=dist.group.WORLD, device=engine.groups.device)
    reading = restore(engine, source, fill=together)
    if engine.rank == 0:
        report("read", **asdict(reading))


def progress_of(source: Any) -> tuple[int, int]:
    """(steps done, updates of the parameters) as the state's metadata says."""
    if isinstance(source, Universal):
        manifest = source.manifest
        return manifest["step"], max(manifest["optimizer"]["steps"].values(), default=0)
    return source.metadata["step"], source.metadata["updates"]


def strategies_of(source: Any) -> list[dict[str, Any]]:
    """What was learned of strategies for mixtures when the state was saved."""
    known = source.manifest if isinstance(source, Universal) else source.metadata
    return known.get("mixtures") or []


def connect_store(spec: Spec, snapshotter: Snapshotter) -> SnapshotClient | None:
    """The node's store, told what this rank's snapshots hold."""
    if spec.store is None:
        return None
    client = SnapshotClient(
        spec.store["socket"], run_id=spec.run_id, incarnation=spec.incarnation, rank=spec.rank, token=spec.token
    )
    client.describe(snapshotter.layout, snapshotter.bytes, replicas=snapshotter.replicas)
    return client
