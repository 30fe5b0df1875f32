"""The native engine: a model on a mesh, forward, backward, reduce, clip, step.

Leaves (logical shards) are computed one at a time, gradients of *sums* accumulate, and one gather of
a few numbers a step gives every rank the global token count, the true gradient norm over all meshes,
and every leaf's loss. Then each rank scales and updates its own shards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed._composable import checkpoint
from torch.distributed.fsdp import FSDPModule

from trainrt.config import JobConfig
from trainrt.events import NO_ROUND, ring
from trainrt.parallel.blocks import find_blocks
from trainrt.parallel.collectives import all_gather
from trainrt.parallel.fsdp import apply_fsdp
from trainrt.parallel.mesh import Groups, coordinates
from trainrt.parallel.moe.balance import BiasBalance
from trainrt.parallel.moe.counts import RoutingCounter
from trainrt.parallel.moe.experts import local
from trainrt.parallel.moe.tuner import Tuner
from trainrt.parallel.norm import ExactNorm, PlainNorm, SquaredNorm
from trainrt.parallel.plan import Plan
from trainrt.parallel.sharded.model import shard_model
from trainrt.parallel.timed import time_blocks
from trainrt.parallel.tree import Turn
from trainrt.training.engines.mixtures import learn, spread_mixtures
from trainrt.training.models.build import compute_dtype
from trainrt.training.objectives import Loss, LossFunction, evaluate_loss
from trainrt.training.optimizer import STATE_ROLES, learning_rate, make_optimizer


def parallelize(
    model: nn.Module, plan: Plan, groups: Groups, *, config: JobConfig, turn: Turn | None
) -> tuple[nn.Module, list[Tuner]]:
    """Tensor parallel -> expert parallel -> activation checkpointing -> FSDP, in that order. Returns what tunes mixtures, too.

    With a `turn`, sums over leaves have one order on every mesh of the same tp and ep.
    """
    blocks = find_blocks(model)
    if groups.size.tp > 1:
        shard_model(model, plan.splits(), groups.dense["tp"], sequence=plan.sequence)
    spread, tuners = spread_mixtures(model, plan, groups, config)
    if config.model.activation_checkpointing:
        for block in blocks or ():
            checkpoint(block)
    apply_fsdp(model, blocks, groups, experts=spread, compute=compute_dtype(config), turn=turn)
    time_blocks(blocks or ())
    return model, tuners


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step came to, equal on all ranks. Losses are means over the global batch's weight, and so is
    what is auxiliary: other losses, and statistics.

    slowest: of each number that the ranks brought, the largest.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    auxiliary: dict[str, float]
    leaf_digests: list[int]
    updated: bool
    stop: bool
    slowest: list[float]


@dataclass(slots=True)
class LeafResult:
    """What one logical shard adds to the step, as numbers that travel in float64."""

    loss: float
    weight: float
    auxiliary: dict[str, float]
    digest: int


class NativeEngine:
    """The model and its optimizer on this rank. `leaves`: logical shards of a step, over all ranks."""

    def __init__(
        self, model: nn.Module, plan: Plan, groups: Groups, *, config: JobConfig, loss: LossFunction, rank: int
    ) -> None:
        self.plan, self.groups, self.config, self.rank = plan, groups, config, rank
        self.loss = loss
        deterministic = config.run.deterministic
        self._turn = Turn() if deterministic else None
        self._norm: SquaredNorm = ExactNorm() if deterministic else PlainNorm()
        self.model, self.tuners = parallelize(model, plan, groups, config=config, turn=self._turn)
        self._balance = BiasBalance(self.model, rate=config.moe.bias_rate)
        self.routing = RoutingCounter(self.model, plan.mesh, rank, groups.device)
        self.where = coordinates(plan.mesh, rank)
        self.data_rank = self.where["dp"] * plan.mesh.fsdp + self.where["fsdp"]
        self.sharded = dict(self.model.named_parameters())
        self.local = {name: _share(parameter) for name, parameter in self.sharded.items() if parameter.requires_grad}
        self._check_plan()
        shapes = {parameter.name: parameter.shape for parameter in plan.parameters}
        self.optimizer = make_optimizer(config, self.local, shapes)
        self._primary = {p.name: p.primary(plan.mesh, rank) for p in plan.parameters}
        self._counted = {p.name: p.counted(plan.mesh, rank) for p in plan.parameters}

    def _check_plan(self) -> None:
        """The plan is the one notion of who holds what: what the engine made must be just that."""
        for parameter in self.plan.parameters:
            if parameter.name in self.local:
                made, planned = tuple(self.local[parameter.name].shape), parameter.held(self.plan.mesh, self.rank).shape
                if made != planned and math.prod(made) + math.prod(planned) > 0:
                    raise RuntimeError(f"{parameter.name}: the engine holds {made}, the plan says {planned}")

    def rounds(self, leaves: int) -> int:
        """Forward and backward passes a rank makes a step; a rank without a leaf runs one of weight zero."""
        return math.ceil(leaves / self.plan.mesh.data_ranks)

    def leaf_of(self, turn: int, leaves: int) -> int | None:
        """The logical shard this rank computes in a round, or None for a dummy."""
        leaf = turn * self.plan.mesh.data_ranks + self.data_rank
        return leaf if leaf < leaves else None

    def step(
        self,
        step: int,
        batches: Sequence[tuple[Mapping[str, Any], int]],
        *,
        leaves: int,
        steps: int,
        stop: bool = False,
        measured: Sequence[float] = (),
        before_update: Callable[[], None] = lambda: None,
    ) -> StepResult:
        """One optimizer step. `batches`: (batch, digest) for each round of this rank; a dummy repeats a batch.

        `stop` asks all ranks to end after this step; the result says whether any did. `measured` are numbers of this rank
        of which all ranks learn the largest. `before_update` is called when gradients are there and nothing of the state is
        changed yet.
        """
        self.model.train()
        results = [self._leaf(step, turn, batches, leaves) for turn in range(len(batches))]
        ring.microbatch = NO_ROUND
        gradients = self._gradients()
        names = sorted(results[0].auxiliary)
        numbers = self._gather(results, names, gradients, [float(stop), *measured])
        losses, weights = numbers.column("loss", leaves), numbers.column("weight", leaves)
        total = sum(weights)
        norm = math.sqrt(numbers.norm_squared) / total if total else math.nan
        loss = sum(losses) / total if total else math.nan
        rate = learning_rate(self.config.optimizer, step=step, steps=steps)
        finite = math.isfinite(norm) and math.isfinite(loss)
        if finite:
            before_update()
            self._update(gradients, rate, total=total, norm=norm)
            self._balance.move(dist.distributed_c10d._get_default_group())
        self._balance.forget()
        self.model.zero_grad()
        learn(self.tuners, self.groups.device)
        auxiliary = {
            name: sum(a * w for a, w in zip(numbers.column(name, leaves), weights, strict=True)) / total for name in names
        } if finite else {}  # fmt: skip
        return StepResult(
            loss=loss, grad_norm=norm, learning_rate=rate, tokens=round(total), auxiliary=auxiliary,
            leaf_digests=numbers.digests(leaves), updated=finite, stop=numbers.largest[0] > 0, slowest=numbers.largest[1:],
        )  # fmt: skip

    def _leaf(self, step: int, turn: int, batches: Sequence[tuple[Mapping[str, Any], int]], leaves: int) -> LeafResult:
        leaf, ring.microbatch = self.leaf_of(turn, leaves), turn
        batch, digest = batches[turn]
        self._synchronize(turn, rounds=len(batches), leaves=leaves)
        # Dropout and the like depend on the leaf, not on who computes it (DESIGN section 6).
        torch.manual_seed(hash((self.config.run.seed, step, leaf if leaf is not None else -1)) & 0x7FFFFFFF)
        with ring.span("forward", kind="forward"), self.routing.counting(turn == 0 and leaf is not None):
            loss = evaluate_loss(self.loss, self.model, batch)
        if leaf is not None and self.where["tp"] == 0:
            self._balance.count()
        total = loss.total()
        with ring.span("backward", kind="backward"):
            (total if leaf is not None else total * 0.0).backward()
        return _numbers(loss, digest) if leaf is not None else LeafResult(0.0, 0.0, _numbers(loss, 0).auxiliary, 0)

    def _synchronize(self, turn: int, *, rounds: int, leaves: int) -> None:
        """Reduce gradients in the last round only; before, they accumulate where they are.

        Under `run.deterministic` no two leaves are added before all are there: every round reduces.
        """
        assert isinstance(self.model, FSDPModule)
        last = turn == rounds - 1
        if self._turn is not None:
            self._turn.index, self._turn.rounds, self._turn.leaves = turn, rounds, leaves
            last = True
        self.model.set_requires_gradient_sync(last)
        self.model.set_is_last_backward(last)

    def _gradients(self) -> dict[str, Tensor]:
        """The reduced local gradients (of the sum of losses); zeros where a parameter took no part."""
        found = {}
        for name, tensor in self.local.items():
            gradient = self.sharded[name].grad
            found[name] = torch.zeros_like(tensor) if gradient is None else local(gradient)
        return found

    def _update(self, gradients: dict[str, Tensor], rate: float, *, total: float, norm: float) -> None:
        clip = self.config.optimizer.clip
        scale = (min(1.0, clip / (norm + 1e-6)) if clip else 1.0) / total
        with ring.span("optimizer", kind="optimizer"):
            torch._foreach_mul_(list(gradients.values()), scale)
            for name, tensor in self.local.items():
                tensor.grad = gradients[name]
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            self.optimizer.zero_grad()

    def _gather(
        self, results: list[LeafResult], names: list[str], gradients: dict[str, Tensor], measured: list[float]
    ) -> _Gathered:
        """The step's one gather of numbers: (ranks, columns) of float64."""
        # Each element counts once: a replica's gradient is left to the first rank that holds it.
        held = ((name, g) for name, g in gradients.items() if self._primary[name] and g.numel())
        counted = [_counted(g, self._counted[name]) for name, g in held]
        rows = [*self._norm.part(counted), *measured]
        for result in results:
            rows += [result.loss, result.weight, float(result.digest >> 32), float(result.digest & 0xFFFFFFFF)]
            rows += [result.auxiliary[name] for name in names]
        mine = torch.tensor(rows, dtype=torch.float64, device=self.groups.device)
        with ring.span("gather_statistics", kind="other"):
            table = all_gather(mine, dist.distributed_c10d._get_default_group(), axis="world").cpu()
        return _Gathered(table.numpy(), names, self.plan, self._norm, len(measured))

    @torch.no_grad()
    def evaluate(self, batches: Sequence[tuple[Mapping[str, Any], bool]]) -> float:
        """Mean loss over the validation batches of all ranks; `bool` is False for a dummy."""
        self.model.eval()
        sums = torch.zeros((len(batches), 2), dtype=torch.float64, device=self.groups.device)
        with ring.span("evaluation", kind="evaluation"):
            for row, (batch, counts) in zip(sums, batches, strict=True):
                loss = evaluate_loss(self.loss, self.model, batch)
                if counts and self.where["tp"] == 0:
                    row += torch.stack((loss.sum.double(), loss.weight.double()))
            table = all_gather(sums, dist.distributed_c10d._get_default_group(), axis="world").cpu()
        # Round after round, and in each one rank after the other: the order of the batches on any mesh.
        total, weight = (sum(column.T.flatten().tolist()) for column in table.unbind(-1))
        return total / weight

    # The state, as named local tensors: what snapshots pack and restores fill.

    def roles(self) -> list[tuple[str, str | None]]:
        """(role, dtype) of what is kept of each trainable parameter; None: the stored dtype."""
        compute = self.config.model.dtype
        weights: list[tuple[str, str | None]] = [("parameter", None)]
        if compute == "bfloat16":
            weights = [("parameter", "bfloat16"), ("master", None)]
        return [*weights, *((role, None) for role in STATE_ROLES)]

    def tensor(self, name: str, role: str) -> Tensor:
        """The live local tensor of a (parameter or buffer, role)."""
        if role == "buffer":
            return self.model.get_buffer(name)
        if role in ("parameter", "master"):
            return self.local[name] if name in self.local else _share(self.sharded[name])
        return self.optimizer.state[self.local[name]][role]

    @property
    def updates(self) -> int:
        """How often the parameters were updated (Adam's step)."""
        return int(next(iter(self.optimizer.state.values()))["step"].item())

    @updates.setter
    def updates(self, value: int) -> None:
        for state in self.optimizer.state.values():
            state["step"].fill_(float(value))


@dataclass(frozen=True, slots=True)
class _Gathered:
    """The gathered numbers: the norm's, those of the rank, then by leaf: round `l // n` of data rank `l % n`, its tp rank 0."""

    table: NDArray[np.float64]
    names: list[str]
    plan: Plan
    norm: SquaredNorm
    measured: int

    @property
    def norm_squared(self) -> float:
        return self.norm.total(self.table[:, : self.norm.width])

    @property
    def largest(self) -> list[float]:
        """Of each number of the ranks."""
        return self.table[:, self.norm.width : self.norm.width + self.measured].max(0).tolist()

    def _entry(self, leaf: int, column: int) -> float:
        mesh = self.plan.mesh
        turn, data_rank = divmod(leaf, mesh.data_ranks)
        width = 4 + len(self.names)
        return float(self.table[data_rank * mesh.tp, self.norm.width + self.measured + turn * width + column])

    def column(self, name: str, leaves: int) -> list[float]:
        index = {"loss": 0, "weight": 1}.get(name)
        index = 4 + self.names.index(name) if index is None else index
        return [self._entry(leaf, index) for leaf in range(leaves)]

    def digests(self, leaves: int) -> list[int]:
        return [int(self._entry(leaf, 2)) << 32 | int(self._entry(leaf, 3)) for leaf in range(leaves)]


def _numbers(loss: Loss, digest: int) -> LeafResult:
    means = {name: mean for name, (mean, _) in loss.auxiliary.items()} | dict(loss.statistics)
    auxiliary = {name: float(mean.detach()) for name, mean in means.items()}
    return LeafResult(float(loss.sum.detach()), float(loss.weight), auxiliary, digest)


def _counted(gradient: Tensor, part: tuple[int, list[int]] | None) -> Tensor:
    if part is None:
        return gradient
    return gradient.index_select(part[0], torch.tensor(part[1], dtype=torch.int64, device=gradient.device))


def _share(parameter: Tensor) -> nn.Parameter:
    """A plain parameter over the memory of a sharded one."""
    return nn.Parameter(local(parameter).detach(), requires_grad=parameter.requires_grad)
