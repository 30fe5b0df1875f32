"""Whether a step can be believed: its numbers are numbers and like those before, and replicas are equal, bit for bit.

Both are looked at after the update and before the snapshot, so that no generation holds what is not believed. What
fails here goes back to a generation that was.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from trainrt.config import JobConfig
from trainrt.errors import Anomaly, NonFinite, ReplicasDiffer
from trainrt.events import ring
from trainrt.parallel.collectives import all_gather
from trainrt.run_dir import RunDir
from trainrt.training.engines.native import NativeEngine, StepResult

WINDOW = 64
ENOUGH = 16
"""Fewer steps than this say nothing of what is usual."""
SPREADS = 20.0
LEAST_SPREADS = {"loss": 0.05, "grad_norm": 0.5}
"""Shares of the median: a spread is never taken for smaller, so a spike is at least 2 and 11 times the median."""
NORMAL = 1.4826
"""The standard deviation of a normal distribution over its median absolute deviation."""
TAIL_BYTES = 1 << 18


def spike(value: float, before: Sequence[float], *, least_spread: float) -> bool:
    """Whether a value lies far above those before it: by many times their median absolute deviation.

    `least_spread`, a share of their median, stands in where they hardly vary. Never with few values.
    """
    if len(before) < ENOUGH:
        return False
    middle = statistics.median(before)
    deviation = statistics.median(abs(other - middle) for other in before)
    return value - middle > SPREADS * max(NORMAL * deviation, least_spread * abs(middle))


class Numbers:
    """The loss and the gradient norm of each step against those of the last `WINDOW` steps."""

    def __init__(self, lines: Iterable[Mapping[str, Any]] = ()) -> None:
        self._before: dict[str, deque[float]] = {name: deque(maxlen=WINDOW) for name in LEAST_SPREADS}
        for line in lines:
            self._add(line)

    def check(self, step: int, numbers: Mapping[str, float]) -> None:
        """Raises Anomaly where one is none, or is a spike. Values are given to the last bit, so that it shows whether
        they come again.
        """
        shown = ", ".join(f"{name} = {numbers[name]!r}" for name in LEAST_SPREADS)
        if not all(math.isfinite(numbers[name]) for name in LEAST_SPREADS):
            raise Anomaly(f"step {step}: {shown}")
        for name, least in LEAST_SPREADS.items():
            before = self._before[name]
            if spike(numbers[name], before, least_spread=least):
                middle = statistics.median(before)
                raise Anomaly(
                    f"step {step}: {shown}: {name} is far above what it was (median {middle:.4g} of {len(before)} steps)"
                )
        self._add(numbers)

    def _add(self, numbers: Mapping[str, float | None]) -> None:
        for name, held in self._before.items():
            value = numbers[name]
            if value is not None:
                held.append(value)


def lines_before(path: Path, step: int) -> list[dict[str, Any]]:
    """The last metrics lines up to `step`, the latest of those that were replayed; the end of the file is read."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        start = max(0, path.stat().st_size - TAIL_BYTES)
        file.seek(start)
        whole = file.read().split(b"\n")[1 if start else 0 : -1]
    latest = {line["step"]: line for line in map(json.loads, whole) if line["step"] <= step}
    return [latest[number] for number in sorted(latest)][-WINDOW:]


@dataclass(frozen=True, slots=True)
class Difference:
    """Parameters of which the replicas are not equal, and who is to blame: the odd ones, or all where none is more."""

    names: tuple[str, ...]
    replicas: tuple[int, ...]
    odd: bool


def compare(names: Sequence[str], table: Sequence[Sequence[int]]) -> Difference | None:
    """Digests by replica and parameter. A replica is odd where most of them agree on something else."""
    columns = list(zip(*table, strict=True))
    differing = [index for index, column in enumerate(columns) if len(set(column)) > 1]
    if not differing:
        return None
    blamed: set[int] = set()
    for index in differing:
        digest, count = Counter(columns[index]).most_common(1)[0]
        if count * 2 <= len(table):
            return Difference(tuple(names[i] for i in differing), tuple(range(len(table))), odd=False)
        blamed |= {replica for replica, other in enumerate(columns[index]) if other != digest}
    return Difference(tuple(names[i] for i in differing), tuple(sorted(blamed)), odd=True)


class Replicas:
    """The parameters of this rank that other ranks of its dp group hold as well. Experts that are spread are none."""

    def __init__(self, engine: NativeEngine) -> None:
        self._engine, self._group = engine, engine.groups.dp
        spread = {p.name for p in engine.plan.parameters if {cut.axis for cut in p.cuts} & {"ep", "efsdp"}}
        self.names = [name for name in engine.local if name not in spread] if self._group is not None else []

    def check(self, step: int) -> None:
        """Raises ReplicasDiffer. Costs a hash of every byte and one gather of 8 bytes a parameter."""
        if self._group is None or not self.names:
            return
        with ring.span("compare_replicas", kind="other"):
            digests = torch.tensor([digest(self._engine.local[name]) for name in self.names], dtype=torch.int64)
            table = all_gather(digests.to(self._engine.groups.device), self._group, axis="dp").cpu()
        found = compare(self.names, table.tolist())
        if found is None:
            return
        ranks = tuple(dist.get_global_rank(self._group, replica) for replica in found.replicas)
        who = ", ".join(map(str, ranks))
        verdict = (
            f"rank{'s' if len(ranks) > 1 else ''} {who} differ{'' if len(ranks) > 1 else 's'} from most of {len(table)} replicas"
            if found.odd
            else f"ranks {who} differ from each other, and no majority says who is right"
        )
        more = f" and {len(found.names) - 1} more parameters" if len(found.names) > 1 else ""
        values = "-".join(f"{value & 0xFFFFFFFFFFFFFFFF:016x}" for value in table[:, self.names.index(found.names[0])])
        raise ReplicasDiffer(f"step {step}: {verdict} in {found.names[0]}{more} (xxh3 {values})", ranks)


@torch.no_grad()
def digest(tensor: Tensor) -> int:
    """xxh3-64 of a tensor's bytes, as a signed number."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    value = xxhash.xxh3_64_intdigest(flat.numpy())
    return value - (1 << 64) if value >> 63 else value


class Integrity:
    """What is asked of every step before it is kept."""

    def __init__(self, config: JobConfig, engine: NativeEngine, run_dir: RunDir, *, done: int) -> None:
        self._policy = config.optimizer.non_finite
        self._every, self._checkpoints = config.diagnostics.corruption_check_every, config.checkpoint.every
        self._numbers = Numbers(lines_before(run_dir.metrics, done)) if self._policy == "rollback" else None
        self._replicas = Replicas(engine)

    def check(self, step: int, result: StepResult, *, ending: bool) -> None:
        """Raises NonFinite, Anomaly or ReplicasDiffer: the step must not be kept."""
        if self._numbers is not None:
            self._numbers.check(step, {"loss": result.loss, "grad_norm": result.grad_norm})
        elif not result.updated and self._policy == "stop":
            raise NonFinite(
                f"step {step}: loss = {result.loss}, grad_norm = {result.grad_norm}; the state of step {step - 1} "
                'is kept (optimizer.non_finite = "skip" leaves such steps out, "rollback" tries them again)'
            )
        if self._due(step) or (ending and self._every):
            self._replicas.check(step)

    def _due(self, step: int) -> bool:
        """Every so many steps, and whenever a checkpoint is written: what is on disk has been compared."""
        return bool(self._every) and (
            step % self._every == 0 or (self._checkpoints > 0 and step % self._checkpoints == 0)
        )
