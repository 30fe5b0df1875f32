"""A schedule of chunks through stages, so that communication of some runs under computation of others.

It knows nothing of what the stages do. Those that communicate start their work and return something to wait for; it is waited
for when the next stage of the chunk needs it. The order of starts depends on numbers of chunks and stages only, so it is the
same on all ranks: collectives of one group must start in one order.

The first stage is started for all chunks before anything is waited for, then each chunk goes through the stages that follow,
and the last stage is waited for in the end: looking ahead by one chunk only was slower (docs/decisions.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class Work(Protocol):
    """What has been started; `wait` gives its result. On a GPU it makes the current stream wait, not the host."""

    def wait(self) -> Any: ...


@dataclass(frozen=True, slots=True)
class Done:
    """The result of a stage that computes."""

    value: Any

    def wait(self) -> Any:
        return self.value


Stage = Callable[[int, Any], Any]
"""(number of the chunk, what the stage before made of it) to a result, or to the Work of one."""


def run_chunks(chunks: Iterable[int], first: Stage, *stages: Stage) -> list[tuple[int, Any]]:
    """Take chunks through the stages in the order given. Returns (chunk, result) in that order."""
    order = list(chunks)
    started = [_work(first(chunk, None)) for chunk in order]
    ended = [_through(chunk, work, stages) for chunk, work in zip(order, started, strict=True)]
    return [(chunk, work.wait()) for chunk, work in zip(order, ended, strict=True)]


def _through(chunk: int, work: Work, stages: Sequence[Stage]) -> Work:
    for stage in stages:
        work = _work(stage(chunk, work.wait()))
    return work


def _work(made: Any) -> Work:
    return made if hasattr(made, "wait") else Done(made)


def parts(length: int, number: int) -> list[tuple[int, int]]:
    """(start, stop) of `number` parts of a range, as even as can be; some are empty where it is shorter."""
    return [(length * k // number, length * (k + 1) // number) for k in range(number)]
