"""How long a mixture takes, forward and backward, on the clock of its device.

All ranks of a mixture start together where it is timed: forward after they exchanged their counts, backward after a barrier of
its own. So the longest time of all ranks is that of the mixture.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainrt.parallel.collectives import all_reduce


class Stopwatch:
    """Seconds from the first mark to the last, of what was asked of a device in between. On a GPU the host does not wait."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._moments: list[Any] = []

    def mark(self) -> None:
        if self._cuda:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
            self._moments.append(moment)
        else:
            self._moments.append(time.perf_counter())

    def seconds(self) -> float:
        """Between the first mark and the last. Waits for them on a GPU."""
        start, stop = self._moments[0], self._moments[-1]
        if self._cuda:
            stop.synchronize()
            return float(start.elapsed_time(stop)) / 1e3
        return float(stop - start)


@dataclass(slots=True)
class Times:
    """The watches of a step for one kind of call. group: the ranks that start together in backward."""

    group: dist.ProcessGroup
    forward: list[Stopwatch] = field(default_factory=list)
    backward: list[Stopwatch] = field(default_factory=list)

    def take(self, compute: Callable[[Tensor], Tensor], x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """What `compute` makes of `x`, timed; backward from the gradient of the result to the last of those of `x` and of the
        weights, which come after it where weights were gathered."""
        forward, backward = Stopwatch(x.device), Stopwatch(x.device)
        forward.mark()
        y = compute(x)
        forward.mark()
        self.forward.append(forward)
        if y.requires_grad and x.requires_grad:

            def begins(_: Tensor) -> None:
                all_reduce(torch.zeros(1, device=x.device), self.group)
                backward.mark()

            def ends(_: Tensor) -> None:
                backward.mark()

            y.register_hook(begins)
            for tensor in (x, *(weight for weight in weights if weight.requires_grad)):
                tensor.register_hook(ends)
            x.register_hook(lambda _: self.backward.append(backward))
        return y
