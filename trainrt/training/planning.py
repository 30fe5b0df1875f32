"""Before anything starts: the plan of a job, and every check that needs the model or the corpus."""

from __future__ import annotations

import json
import math
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from trainrt.checkpoint.policy import Forecast, best_every, effective_time, node_mtbf_seconds
from trainrt.config import DataConfig, JobConfig, MeshSize, load, parse
from trainrt.errors import ConfigError, ModelError, PlanError, nearest
from trainrt.parallel.blocks import find_blocks
from trainrt.parallel.cost import Work
from trainrt.parallel.mesh import choose_device
from trainrt.parallel.moe.experts import layout_of
from trainrt.parallel.moe.form import ListedExperts
from trainrt.parallel.moe.layout import NO_ORDERS, Orders
from trainrt.parallel.moe.strategy import Lattice, check_listed
from trainrt.parallel.packing import packed_parts
from trainrt.parallel.plan import Part, Plan
from trainrt.parallel.planner.activations import activations_of
from trainrt.parallel.planner.derive import derive
from trainrt.parallel.planner.probe import Blueprint
from trainrt.parallel.planner.sharding import Sharding, sharding_of
from trainrt.parallel.profile import device_of, own_device
from trainrt.parallel.search import assess, choose
from trainrt.run_dir import read_json
from trainrt.training.affinity import by_affinity
from trainrt.training.blueprint import blueprint_of
from trainrt.training.data import Corpus, open_corpus
from trainrt.training.models.build import build_meta, compute_dtype, hidden_size_of, stored_dtype, weight_files
from trainrt.training.pipeline import Pipeline, load_pipeline
from trainrt.training.verification import verified

PLACEMENT_SECONDS = 20.0
"""How long the programs that place experts may take, once a launch."""
SNAPSHOT_SECONDS = 2e-3
COPY_BYTES_PER_SECOND = 1e10
RECOVERY_SECONDS = 5.0
"""Before a run has measured its own: a snapshot's stall and copy, and a failure until the next step."""


@dataclass(frozen=True, slots=True)
class Preflight:
    """What is known of a job before its first process: the plan, and facts of the corpus (None: a user's)."""

    plan: Plan
    corpus_digest: str | None
    unigram_entropy: float | None


def preflight(config: JobConfig, *, world_size: int) -> Preflight:
    """Plan the job and check model, weights and corpus against the config. Raises UserErrors only."""
    pipeline = load_pipeline(config)
    model = meta_model(config, pipeline)
    plan = make_plan(config, world_size=world_size, model=model)
    check_weights(config, plan)
    if pipeline.samples is not None:
        return Preflight(verified(config, plan), None, None)
    corpus = open_corpus(config.data)
    check_vocabulary(config, corpus, model)
    # Last, since it takes longest.
    return Preflight(verified(config, plan), corpus.digest, corpus.unigram_entropy)


def meta_model(config: JobConfig, pipeline: Pipeline) -> nn.Module:
    """The model without storage, the user's or the config's."""
    if pipeline.model is None:
        return build_meta(config)
    with torch.device("meta"):
        return pipeline.model().to(stored_dtype(config))


@dataclass(frozen=True, slots=True)
class _Subject:
    """A job and its model, of which meshes are tried."""

    config: JobConfig
    model: nn.Module
    blueprint: Blueprint
    parts: Mapping[str, tuple[Part, ...]]

    @classmethod
    def of(cls, config: JobConfig, model: nn.Module | None) -> _Subject:
        pipeline = load_pipeline(config)
        model = model if model is not None else meta_model(config, pipeline)
        packs = config.model.kind == "huggingface" and hasattr(model, "config")
        return cls(config, model, blueprint_of(config, pipeline, model), packed_parts(model) if packs else {})

    def place(self, size: MeshSize, orders: Orders = NO_ORDERS) -> Plan:
        """The placements on a mesh. Raises PlanError."""
        plan = derive(self.model, size, self.blueprint, parts=self.parts, orders=orders)
        for name, form in plan.experts.items():
            if isinstance(form, ListedExperts):
                check_listed(self.config.moe, name)
            else:
                Lattice.of(self.config, layout_of(self.model.get_submodule(name), form, size.ep), size).check()
        return plan

    def activation_bytes(self, plan: Plan) -> float | None:
        """Of one sample on a rank of the plan's mesh; None where they cannot be counted."""
        sharding = sharding_of(self.blueprint, plan.mesh.tp) if plan.mesh.tp > 1 else Sharding(1)
        kind, length = compute_dtype(self.config), self.config.data.sequence_length
        found = activations_of(self.blueprint, self.model, sharding, kind, length)
        return None if found is None else found.bytes(recomputed=self.config.model.activation_checkpointing)


def place(
    config: JobConfig, size: MeshSize, *, model: nn.Module | None = None, orders: Orders = NO_ORDERS
) -> Plan:  # fmt: skip
    """The placements on a mesh without what they cost: all that a worker has to know. Raises PlanError.

    `orders` are those of the plan that was made (`Plan.orders`).
    """
    return _Subject.of(config, model).place(size, orders)


def make_plan(
    config: JobConfig, *, world_size: int, model: nn.Module | None = None, device: str | None = None,
    mesh: MeshSize | None = None, placement_seconds: float = PLACEMENT_SECONDS,
) -> Plan:  # fmt: skip
    """The plan for `world_size` ranks: the explicit mesh, shrunk where it has to be, or the best found.

    `mesh` overrides the config's. `placement_seconds`: for the integer programs that place experts; 0: greedily, at once.
    Raises PlanError where nothing fits.
    """
    subject = _Subject.of(config, model)
    profile = device_of(device) if device is not None else own_device(choose_device(config.cluster.device))
    work = work_of(config, subject.model)
    size = mesh or config.mesh()
    if size is None:
        plan = choose(subject.place, world_size, work, profile, subject.activation_bytes)
    else:
        if size.world_size != world_size:
            size = shrink(size, world_size)
        plan = assess(subject.place(size), work, profile, subject.activation_bytes)
    orders, placement = by_affinity(config, plan, seconds=placement_seconds)
    if orders:
        # What a plan costs does not depend on which experts a rank holds, only on how many.
        plan = replace(plan, parameters=subject.place(plan.mesh, orders).parameters, orders=orders)
    return replace(plan, placement=placement, recovery=forecast(config, plan).to_json())


def forecast(config: JobConfig, plan: Plan) -> Forecast:
    """What snapshots and failures are expected to cost, before either is measured."""
    nodes = math.ceil(plan.mesh.world_size / config.cluster.workers_per_node)
    mtbf = node_mtbf_seconds(config) / nodes
    step = plan.predicted_step_seconds
    snapshot = SNAPSHOT_SECONDS + plan.estimate["state_bytes"] / COPY_BYTES_PER_SECOND
    every = config.snapshot.every
    if every == "auto":
        every = best_every(step_seconds=step, snapshot_seconds=snapshot, mtbf_seconds=mtbf)
    effective = effective_time(
        step_seconds=step, snapshot_seconds=snapshot, every=every or config.checkpoint.every or config.run.steps,
        recovery_seconds=RECOVERY_SECONDS, mtbf_seconds=mtbf,
    )  # fmt: skip
    return Forecast(every, step, snapshot, RECOVERY_SECONDS, mtbf * nodes, effective)


def shrink(size: MeshSize, world_size: int) -> MeshSize:
    """The same mesh with fewer fsdp ranks, then fewer replicas; tp, cp, pp and ep stay. Raises PlanError."""
    fixed = size.pp * size.cp * size.tp
    data, rest = divmod(world_size, fixed)
    if rest or data == 0 or data % size.ep:
        raise PlanError(
            f"{world_size} ranks cannot carry tp = {size.tp}, ep = {size.ep}: needs a multiple of {fixed * size.ep}"
        )
    dp = max(d for d in range(1, size.dp + 1) if data % d == 0)
    return MeshSize(pp=size.pp, dp=dp, fsdp=data // dp, cp=size.cp, tp=size.tp, ep=size.ep)


def load_for_plan(source: Path, *, nodes: int | None = None, devices_per_node: int | None = None) -> JobConfig:
    """The job to plan: a TOML file, or a Hugging Face model directory with everything else at its default."""
    sizes = [("nodes", nodes), ("workers_per_node", devices_per_node)]
    if source.is_dir():
        cluster = {key: value for key, value in sizes if value is not None}
        document = read_json(source / "config.json") or {}
        length = min(DataConfig().sequence_length, document.get("max_position_embeddings") or sys.maxsize)
        model = {"kind": "huggingface", "config": str(source)}
        return parse({"model": model, "data": {"sequence_length": length}, "cluster": cluster})
    # The user's module lies beside the job, as for a launch.
    sys.path.insert(0, str(source.absolute().parent))
    return load(source, [f"cluster.{key}={value}" for key, value in sizes if value is not None])


def plan_command(config: JobConfig, *, mesh: str | None = None, device: str | None = None, verify: bool = True) -> Plan:
    """The plan of a job without running it. `mesh` is text such as "tp=2,fsdp=2"; `device` is for
    `device_of`."""
    size = parse_mesh(mesh) if mesh else None
    world_size = size.world_size if size else config.world_size
    made = make_plan(config, world_size=world_size, device=device, mesh=size)
    return verified(config, made) if verify else made


def plan(
    config: JobConfig | str | Path, *, mesh: str | None = None, device: str | None = None, verify: bool = True
) -> Plan:
    """`trainrt.plan`: the plan of a config, or of a path to one. Raises ConfigError and PlanError."""
    job = config if isinstance(config, JobConfig) else load_for_plan(Path(config))
    return plan_command(job, mesh=mesh, device=device, verify=verify)


def parse_mesh(text: str) -> MeshSize:
    """ "tp=2,fsdp=2" as a mesh; what is left out is 1. Raises ConfigError."""
    axes = ("pp", "dp", "fsdp", "cp", "tp", "ep")
    given: dict[str, int] = {}
    for entry in text.split(","):
        axis, _, value = entry.strip().partition("=")
        if axis not in axes:
            raise ConfigError(f"--mesh {text}: {axis!r} is no axis{nearest(axis, axes)}; allowed: {', '.join(axes)}")
        if not value.isdigit() or int(value) < 1:
            raise ConfigError(f"--mesh {text}: {axis} = {value!r}; allowed: a whole number from 1")
        given[axis] = int(value)
    return MeshSize(**{axis: given.get(axis, 1) for axis in axes})


def work_of(config: JobConfig, model: nn.Module) -> Work:
    """The size of a step, for the cost model."""
    blocks = find_blocks(model)
    total = sum(parameter.numel() for parameter in model.parameters())
    return Work(
        global_batch=config.data.global_batch,
        microbatch=config.data.microbatch,
        sequence_length=config.data.sequence_length,
        layers=len(blocks) if blocks is not None else 1,
        hidden_size=hidden_size_of(config, model),
        active_fraction=active_parameters(model) / max(total, 1),
        compute_dtype=config.model.dtype,
        blocks=next((f"{name}." for name, module in model.named_modules() if module is blocks), ""),
        summed_late=not config.run.deterministic,
    )


def active_parameters(model: nn.Module) -> int:
    """Parameters a token meets: of expert weights (stacked, three-dimensional) the chosen share."""
    model_config = getattr(model, "config", None)
    experts = getattr(model_config, "num_local_experts", None) or getattr(model_config, "num_experts", None)
    chosen = getattr(model_config, "num_experts_per_tok", None)
    active = 0.0
    for module in model.modules():
        top_k, number = getattr(module, "top_k", None), getattr(module, "number_of_experts", None)
        if top_k and number:
            experts, chosen = number, top_k
    for parameter in model.parameters():
        share = chosen / experts if parameter.dim() == 3 and experts and chosen else 1.0
        active += parameter.numel() * share
    return round(active)


def check_vocabulary(config: JobConfig, corpus: Corpus, model: nn.Module) -> None:
    """The model's vocabulary must hold the tokenizer's. Raises ConfigError."""
    if config.model.kind == "moe_lm":
        key, size = "model.config.vocab_size", config.moe_lm.vocab_size
    else:
        key, size = "the model's vocab_size", int(getattr(getattr(model, "config", None), "vocab_size", 1 << 62))
    if size < corpus.vocabulary_size:
        raise ConfigError(
            f"{key} = {size} is smaller than the {corpus.vocabulary_size} tokens of "
            f"data.tokenizer = {config.data.tokenizer}; allowed: at least {corpus.vocabulary_size}"
        )


def check_weights(config: JobConfig, plan: Plan) -> None:
    """A model directory's weight files against the plan: whole, complete, of the right shapes. Reads headers only."""
    files = weight_files(config)
    directory = config.model.config
    if config.model.kind != "huggingface" or not isinstance(directory, str):
        return
    index = Path(directory) / "model.safetensors.index.json"
    if index.exists():
        named = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        missing = [name for name in named if not (Path(directory) / name).exists()]
        if missing:
            raise ModelError(f"model.config = {directory}: {missing[0]} is named in {index.name} but missing")
    if not files:
        if list(Path(directory).glob("*.bin")):
            raise ModelError(
                f"model.config = {directory}: pickled weights (*.bin) are not read; allowed: *.safetensors"
            )
        return
    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        found.update(safetensors_shapes(file))
    for parameter in plan.parameters:
        for part in parameter.parts:
            _check_shape(directory, part.name, part.shape, found)


def _check_shape(directory: str, name: str, shape: tuple[int, ...], found: dict[str, tuple[int, ...]]) -> None:
    if name not in found:
        # A base model's file has no head and no prefix; transformers maps those itself.
        short = name.partition(".")[2]
        if short in found:
            name = short
        else:
            raise ModelError(f"model.config = {directory}: the weights have no {name}{nearest(name, found)}")
    if found[name] != shape:
        raise ModelError(f"model.config = {directory}: {name} is {found[name]} in the weights, {shape} by config.json")


def safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a safetensors header. Raises ModelError where the file is cut short or no safetensors."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise ModelError(f"{path}: no safetensors file: {error}") from error
    if size < end:
        raise ModelError(f"{path}: truncated: {size} of {end} bytes")
    return {name: tuple(entry["shape"]) for name, entry in header.items()}
