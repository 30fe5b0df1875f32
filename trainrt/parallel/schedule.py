"""A schedule of chunks through stages, so that communication of some runs under computation of others.

It knows nothing of what the stages do. Those that communicate start their work and return something to wait for; it is waited
for when the next stage of the chunk needs it. The order of starts depends on numbers of chunks and stages only, so it is the
same on all ranks: collectives of one group must start in one order.

What leads to the computation is started for all chunks, hop by hop, before any is computed. Then each chunk is computed and
sent on; a chunk that has further to go is sent on when the next one has been computed. Wherever something would be waited for
that has not come yet, work that nobody waits for is done.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


class Work(Protocol):
    """What has been started; `wait` gives its result. On a GPU it makes the current stream wait, not the host."""

    def wait(self) -> Any: ...

    def is_completed(self) -> bool: ...


Start = Callable[[int, Any], Work]
"""(number of the chunk, what the stage before made of it; None for the first) to work that has been started."""
Compute = Callable[[int, Any], Any]
"""(number of the chunk, what has arrived of it) to what is to be sent on."""


@dataclass(slots=True)
class Schedule:
    """lead: the hops to where a chunk is computed, at least one; trail: the hops from there, at least one.

    fillers: work that nobody waits for, and that starts no collectives: done in the gaps, or at the end. `compute` may add
    to it.
    """

    lead: Sequence[Start]
    compute: Compute
    trail: Sequence[Start]
    fillers: deque[Callable[[], None]] = field(default_factory=deque)

    def run(self, chunks: Iterable[int]) -> list[tuple[int, Any]]:
        """Take chunks through all stages in the order given. Returns (chunk, result) in that order."""
        order = list(chunks)
        arriving = {chunk: self.lead[0](chunk, None) for chunk in order}
        for hop in self.lead[1:]:
            arriving = {chunk: hop(chunk, self._wait(arriving[chunk])) for chunk in order}
        leaving: dict[int, Work] = {}
        hops = dict.fromkeys(order, 1)
        for position, chunk in enumerate(order):
            leaving[chunk] = self.trail[0](chunk, self.compute(chunk, self._wait(arriving.pop(chunk))))
            self._advance(order[:position], leaving, hops)
        while any(hops[chunk] < len(self.trail) for chunk in order):
            self._advance(order, leaving, hops)
        ended = [(chunk, self._wait(leaving.pop(chunk))) for chunk in order]
        while self.fillers:
            self.fillers.popleft()()
        return ended

    def _advance(self, chunks: list[int], leaving: dict[int, Work], hops: dict[int, int]) -> None:
        """One hop further for those that have further to go."""
        for chunk in chunks:
            if hops[chunk] < len(self.trail):
                leaving[chunk] = self.trail[hops[chunk]](chunk, self._wait(leaving[chunk]))
                hops[chunk] += 1

    def _wait(self, work: Work) -> Any:
        while self.fillers and not work.is_completed():
            self.fillers.popleft()()
        return work.wait()
