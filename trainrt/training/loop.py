"""The step loop: data, engine, snapshot, metrics. The shortest account of what training is."""

from __future__ import annotations

import math
import time
from base64 import b64encode
from typing import Any

import torch
import xxhash

from trainrt.events import ring
from trainrt.parallel.cost import PEAK_FLOPS, flops_per_token
from trainrt.run_dir import append_line, write_json
from trainrt.training.control import Control
from trainrt.training.data import digest_batch, logical_shards, sample_ids
from trainrt.training.engines.mixtures import said
from trainrt.training.engines.native import StepResult
from trainrt.training.job import Job
from trainrt.training.manifest import step_metadata
from trainrt.training.planning import work_of
from trainrt.training.snapshots import Stall


def run(job: Job, control: Control) -> dict[str, Any]:
    """Train from `job.done` to the last step, or until some rank was asked to stop. Returns the outcome.

    Every end leaves a checkpoint of the last step. Raises NonFinite, ReplicasDiffer, PeerLost, and what the user's code raises.
    """
    meter = Meter(job)
    first = time.perf_counter()
    outcome, step = "finished", job.done
    while step < job.spec.steps:
        step += 1
        with ring.span("step", kind="step"):
            try:
                result, stall, seconds = train_step(job, meter, step, stop=control.stop_requested.is_set())
            except Exception as error:
                error.step = step  # type: ignore[attr-defined]
                raise
            job.done = step
            if first:
                control.send("phase", name="first_step", seconds=time.perf_counter() - first)
                first = 0.0
            validation = None
            if _evaluates(job, step, ending=result.stop or step == job.spec.steps):
                control.busy("evaluation", worth=steps_worth(job))
                validation = evaluate(job)
        report(job, control, meter, step, result=result, stall=stall, seconds=seconds, validation=validation)
        if result.stop and step < job.spec.steps:
            outcome = "interrupted"
            break
    control.busy("checkpoint")
    path = final_checkpoint(job, step)
    job.recorder.close()
    return {"outcome": outcome, "step": step, "checkpoint": path}


def train_step(job: Job, meter: Meter, step: int, *, stop: bool) -> tuple[StepResult, Stall, float]:
    """One optimizer step and its snapshot. Returns the result, the snapshot's stall and the step's seconds.

    The step's metrics are journalled before its snapshot, which may be all that is left of this process a moment later.
    """
    start = time.perf_counter()
    with ring.span("data", kind="data"):
        batches = step_batches(job, step)
    leaves = job.config.data.global_batch // job.config.data.microbatch
    result = job.engine.step(
        step, batches, leaves=leaves, steps=job.spec.steps, stop=stop, measured=meter.last,
        before_update=job.snapshots.before_update,
    )  # fmt: skip
    job.snapshots.interval.begin(step, step_seconds=result.slowest[0], stall_seconds=result.slowest[1])
    ending = result.stop or step == job.spec.steps
    job.integrity.check(step, result, ending=ending)
    if job.spec.rank == 0 and job.snapshots.due(step, ending=ending)[0]:
        line = metrics_line(job, meter, step, result=result, stall=Stall(), seconds=time.perf_counter() - start)
        append_line(job.run_dir.metrics_journal, line)
    stall = job.snapshots.take(step, ending=ending, metadata=lambda: metadata_of(job, step))
    if stall.checkpoint:
        with ring.span("keep_mixtures", kind="checkpoint"):
            keep_mixtures(job, step)
    seconds = time.perf_counter() - start
    meter.last = (seconds, stall.seconds)
    return result, stall, seconds


def step_batches(job: Job, step: int) -> list[tuple[dict[str, torch.Tensor], int]]:
    """This rank's batches of a step, one a round, each with its digest. A rank without a leaf repeats leaf 0's."""
    data = job.config.data
    shards = logical_shards(
        job.config.run.seed, step - 1, global_batch=data.global_batch, microbatch=data.microbatch, length=len(job.train)
    )
    batches = []
    for turn in range(job.engine.rounds(len(shards))):
        leaf = job.engine.leaf_of(turn, len(shards))
        batch = job.collate([job.train[int(index)] for index in shards[leaf if leaf is not None else 0]])
        job.recorder.batch(batch)
        digest = digest_batch(batch)
        batches.append(({key: value.to(job.groups.device) for key, value in batch.items()}, digest))
    return batches


def metadata_of(job: Job, step: int) -> dict[str, Any] | None:
    """What the generation of `step` says of itself; one rank says it for all."""
    if job.spec.rank != 0:
        return None
    changing = step_metadata(job.engine, step, steps=job.spec.steps, corpus_digest=job.corpus_digest)
    return {**job.constants, **changing}


def keep_mixtures(job: Job, step: int) -> None:
    """What routers chose so far, for the placement of experts when the run is launched again, and how mixtures are computed."""
    counts, tuners = job.engine.routing.gather(step), job.engine.tuners
    if counts is not None and job.spec.rank == 0:
        write_json(job.run_dir.experts, counts.to_json())
    if tuners and job.spec.rank == 0:
        write_json(job.run_dir.strategies, {"step": step, "mixtures": [tuner.to_json() for tuner in tuners]})


def final_checkpoint(job: Job, step: int) -> str | None:
    """Wait for the checkpoint of the last step; one that a lost incarnation left unwritten is made now."""
    if job.snapshots.store is None:
        return None
    folder = job.run_dir.checkpoint(step)
    if folder.exists():
        return str(folder)
    if job.snapshots.taken != step:
        job.snapshots.take(step, ending=True, metadata=lambda: metadata_of(job, step))
    return job.snapshots.wait_checkpoint(step)


def _evaluates(job: Job, step: int, *, ending: bool) -> bool:
    every = job.config.evaluation.every
    return (
        job.validation is not None
        and job.config.evaluation.samples > 0
        and (ending or (every > 0 and step % every == 0))
    )


def steps_worth(job: Job) -> float:
    """An evaluation takes no longer than so many steps: it runs forward passes alone."""
    data, engine = job.config.data, job.engine
    groups = math.ceil(job.config.evaluation.samples / data.microbatch)
    return 1.0 + engine.rounds(groups) / engine.rounds(data.global_batch // data.microbatch)


def evaluate(job: Job) -> float:
    """Mean loss over the first samples of the validation split; the same samples on any mesh."""
    assert job.validation is not None
    data, validation = job.config.data, job.validation
    count = min(job.config.evaluation.samples, len(validation))
    ids = sample_ids(job.config.run.seed, 0, global_batch=count, length=len(validation))
    groups = [ids[at : at + data.microbatch] for at in range(0, count, data.microbatch)]
    batches = []
    for turn in range(job.engine.rounds(len(groups))):
        leaf = job.engine.leaf_of(turn, len(groups))
        batch = job.collate([validation[int(index)] for index in groups[leaf if leaf is not None else 0]])
        batches.append(({key: value.to(job.groups.device) for key, value in batch.items()}, leaf is not None))
    return job.engine.evaluate(batches)


class Meter:
    """Model operations and the peak they are held against, for MFU. `last`: seconds and stall of the last step."""

    def __init__(self, job: Job) -> None:
        self.last = (0.0, 0.0)
        work = work_of(job.config, job.engine.model)
        active = sum(_elements(p.shape) for p in job.plan.parameters if not p.buffer) * work.active_fraction
        self.flops = flops_per_token(
            round(active), layers=work.layers, hidden_size=work.hidden_size, sequence_length=work.sequence_length
        )
        device = job.groups.device
        name = "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device).lower()
        self.peak = next((flops for known, flops in PEAK_FLOPS.items() if known in name), PEAK_FLOPS["h100"])
        self.ranks = job.spec.world_size

    def mfu(self, tokens_per_second: float) -> float:
        """The share of the devices' peak that model operations make up (PaLM, arXiv 2204.02311, appendix B)."""
        return tokens_per_second * self.flops / (self.peak * self.ranks)


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count


def report(
    job: Job, control: Control, meter: Meter, step: int, *,
    result: StepResult, stall: Stall, seconds: float, validation: float | None,
) -> None:  # fmt: skip
    """The step's summary for the driver, and from rank 0 the metrics line."""
    summary = job.recorder.step(step, epoch=control.epoch)
    control.send("step", step=step, summary=b64encode(summary or b"").decode())
    if job.spec.rank != 0:
        return
    if not result.updated:
        left_out = f"loss = {result.loss}, grad_norm = {result.grad_norm}: the update of step {step} was left out"
        control.send("incident", incident=_incident("non_finite", step, left_out))
    follow_checkpoints(job, control)
    line = metrics_line(job, meter, step, result=result, stall=stall, seconds=seconds)
    if validation is not None:
        line["validation_loss"] = validation
    append_line(job.run_dir.metrics_journal, line)
    control.send("metrics", line=line)


def metrics_line(
    job: Job, meter: Meter, step: int, *, result: StepResult, stall: Stall, seconds: float
) -> dict[str, Any]:  # fmt: skip
    """The line of metrics.jsonl."""
    rate = result.tokens / seconds
    return {
        "step": step, "loss": finite(result.loss), "grad_norm": finite(result.grad_norm), "learning_rate": result.learning_rate,
        "tokens": result.tokens, "step_seconds": seconds, "tokens_per_second": rate, "mfu": meter.mfu(rate),
        "snapshot_stall_seconds": stall.seconds, "snapshots_skipped": job.snapshots.skipped,
        "snapshot_every": job.snapshots.interval.every,
        "samples_digest": samples_digest(result.leaf_digests), "incarnation": job.spec.incarnation,
        "world_size": job.spec.world_size, "time": time.time(), **result.auxiliary, **strategies(job),
    }  # fmt: skip


def strategies(job: Job) -> dict[str, Any]:
    """How mixtures were computed on rank 0 and why, where more than one way is open."""
    tuners = job.engine.tuners
    if not tuners:
        return {}
    tried, exhaustive = (sum(column) for column in zip(*(tuner.trials for tuner in tuners), strict=True))
    return {"moe_strategies": said(tuners), "moe_trials": tried, "moe_trials_exhaustive": exhaustive}


def follow_checkpoints(job: Job, control: Control) -> None:
    """Say what became of the checkpoints that are written beside the training: a full disk does not stop it."""
    for step, path, failure in job.snapshots.outcomes():
        if path is not None:
            control.send("checkpointed", step=step, path=path)
        else:
            control.send("incident", incident=_incident("storage", step, f"no checkpoint of step {step}: {failure}"))


def finite(value: float) -> float | None:
    """A number as JSON knows it: null for what is none."""
    return value if math.isfinite(value) else None


def samples_digest(leaf_digests: list[int]) -> str:
    """One digest of all samples of a step, in the order of the logical shards: equal on any mesh."""
    return xxhash.xxh3_64_hexdigest(b"".join(digest.to_bytes(8, "little") for digest in leaf_digests))


def _incident(kind: str, step: int, message: str) -> dict[str, Any]:
    """An incident that left something out and stopped nothing."""
    return {
        "kind": kind, "ranks": [], "nodes": [], "step": step, "detected_seconds": 0.0, "recovered_seconds": None,
        "steps_lost": 0, "restored_from": "none", "action": "skip", "message": message,
    }  # fmt: skip
