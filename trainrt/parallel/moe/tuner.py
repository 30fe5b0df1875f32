"""The dictionary from loads to strategies, filled while training (Tutel, MLSys'23, sections 3.2 and 3.3).

Loads fall into buckets. For a new one the cost model names few candidates; these are tried in turn, step by step, in training
itself, until one is the fastest with confidence. What was measured refines the cost model, which then names better candidates
for the next bucket. A strategy that has become slower than it was is tried against others again.

Ranks agree by construction: a bucket follows from the rows of all ranks, the times of all ranks are gathered once a step, and
rates are fitted by one rank for all.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import NormalDist, mean, median, variance
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainrt.parallel.moe.cost import Key, Observation, Rates, Sizes, fit, predict
from trainrt.parallel.moe.exchange import Counts
from trainrt.parallel.moe.strategy import Choice, Strategy
from trainrt.parallel.moe.timing import Times

ROOM = 16
"""Buckets of one step whose times are gathered; further ones run, unmeasured."""
FEWEST, MOST = 3, 10
"""Times of a candidate before it may lose or win, and after which the faster one wins in any case."""
CONFIDENCE = 0.95
PAPER_WAYS = 8
"""Tutel tries each of 4 degrees with each of 2 all-to-alls (section 3.3), for each r."""
SHARE_OF_TRIALS = 0.25
DRIFT, WINDOW = 1.3, 8
"""The median of so many times is larger or smaller by this factor than when the strategy was chosen: it is tried again."""
EVERY = 4
"""A bucket that has its strategy is timed in one step of so many."""
WORTH = 0.9
"""A strategy that was not tried is worth it where it is predicted to take this share of the chosen one's time."""
FEWEST_TO_FIT, GROWTH = 2, 1.25
"""Pairs of bucket and strategy that were measured before rates are fitted, and by what factor more before they are again."""
COLUMNS = 6
HISTORY = 64
"""Observations that rates are fitted to, the newest."""


@dataclass(slots=True)
class Entry:
    """What is known of one bucket. samples: seconds of both passes by strategy, while candidates are compared.

    usual, recent: of the chosen one, when it was chosen and lately.
    """

    candidates: list[Strategy]
    samples: dict[Strategy, list[tuple[float, float]]] = field(default_factory=dict)
    tried: set[Strategy] = field(default_factory=set)
    chosen: Strategy | None = None
    confidence: float = 0.0
    usual: float = 0.0
    recent: list[float] = field(default_factory=list)
    why: str = "new"

    @property
    def reason(self) -> str:
        """Why the current strategy runs."""
        if self.chosen is None:
            return f"tried: {self.why}"
        return f"{self.why}, confidence {self.confidence:.2f}" if self.confidence else self.why

    @property
    def current(self) -> Strategy:
        """What runs in the next step: the chosen one, or the candidate with the fewest times."""
        return self.chosen or min(self.candidates, key=lambda s: len(self.samples.get(s, ())))


class Tuner:
    """A chooser (strategy.py) that learns. One serves all mixtures of the same sizes.

    recomputed: experts are computed again for backward in any case.
    """

    def __init__(
        self, strategies: Sequence[Strategy], sizes: Sizes, rates: Rates, group: dist.ProcessGroup, *, recomputed: bool
    ) -> None:
        self.strategies, self.sizes, self.rates, self.group = list(strategies), sizes, rates, group
        self.recomputed = recomputed
        self.entries: dict[Key, Entry] = {}
        self.seen: dict[tuple[Key, Strategy], list[tuple[float, float]]] = {}
        self.calls: Counter[tuple[Strategy, str]] = Counter()
        self.last: Counter[tuple[Strategy, str]] = Counter()
        self._fitted_at = self._version = 0
        self._step: dict[Key, Choice] = {}

    @property
    def agreed(self) -> tuple[int]:
        return (self._version,)

    def choose(self, count_WE: Counts) -> Choice:
        """The strategy of a call. It is the same for a bucket for the whole of a step, so that what is computed again for
        backward is computed the same way."""
        key = self.sizes.key(count_WE)
        choice = self._step.get(key)
        if choice is None:
            entry = self.entries.get(key)
            strategy = entry.current if entry is not None else self._best(key)[0]
            timed = entry is None or entry.chosen is None or self._version % EVERY == 0
            choice = Choice(strategy, Times(self.group) if timed and len(self._step) < ROOM else None)
            if not torch.is_grad_enabled():
                # An evaluation: forward alone.
                return Choice(strategy)
            self._step[key] = choice
        entry = self.entries.get(key)
        self.calls[choice.strategy, "new" if entry is None else entry.reason] += 1
        return choice

    def _best(self, key: Key) -> list[Strategy]:
        """All strategies, the one that is predicted to be fastest first."""
        return sorted(self.strategies, key=lambda s: (self.predicted(key, s), s))

    def predicted(self, key: Key, strategy: Strategy) -> float:
        """Seconds of both passes."""
        return sum(predict(key, strategy, self.sizes, self.rates, recomputed=self.recomputed))

    # Once a step.

    def observed(self, device: torch.device) -> Tensor:
        """This rank's step, (ROOM, COLUMNS) of float64: bucket, strategy, mean seconds forward and backward, calls."""
        table = torch.zeros((ROOM, COLUMNS), dtype=torch.float64)
        timed = [
            (key, choice) for key, choice in self._step.items() if choice.times is not None and choice.times.backward
        ]
        for row, (key, choice) in zip(table, timed, strict=False):
            assert choice.times is not None
            forward, backward = (
                [w.seconds() for w in watches] for watches in (choice.times.forward, choice.times.backward)
            )
            index = self.strategies.index(choice.strategy)
            row[:] = torch.tensor([*key, index, mean(forward), mean(backward), len(backward)], dtype=torch.float64)
        self._step.clear()
        return table.to(device)

    def learn(self, tables: Tensor) -> None:
        """What all ranks observed, (ranks, ROOM, COLUMNS). Every rank calls this with the same tables."""
        found: dict[tuple[Key, int], tuple[float, float]] = {}
        for first, second, index, forward, backward, calls in tables.flatten(0, 1).tolist():
            if calls:
                at = (int(first), int(second)), int(index)
                known = found.get(at, (0.0, 0.0))
                found[at] = max(known[0], forward), max(known[1], backward)
        # Under checkpointing of activations each call comes twice.
        times = 2 if self.recomputed else 1
        self.last = Counter({said: calls // times for said, calls in self.calls.items()})
        self.calls.clear()
        for (key, index), seconds in sorted(found.items()):
            strategy = self.strategies[index]
            entry = self.entries.get(key)
            if entry is None:
                entry = self.entries[key] = Entry(self._candidates(key))
            self.seen[key, strategy] = [*self.seen.get((key, strategy), []), seconds][-WINDOW:]
            entry.tried.add(strategy)
            if entry.chosen is None:
                entry.samples.setdefault(strategy, []).append(seconds)
                self._compare(entry)
            elif strategy == entry.chosen:
                self._watch(entry, key, sum(seconds))
        if len(self.seen) >= max(FEWEST_TO_FIT, GROWTH * self._fitted_at):
            self._refine()
        self._version += 1

    def _candidates(self, key: Key) -> list[Strategy]:
        """The one that is predicted to be fastest. For the first bucket of all a very different one, too, to learn rates from."""
        best, *others = self._best(key)
        if self._fitted_at or self.entries or not others or self._allowance(1) < 2:
            return [best]
        return [best, max(others, key=lambda s: (abs(math.log2(s.degree / best.degree)), s.r == best.r, -s.hot, s))]

    @property
    def _paper_trials(self) -> int:
        """Strategies that Tutel tries for a bucket."""
        return len({s.r for s in self.strategies}) * PAPER_WAYS

    def _allowance(self, new: int) -> int:
        """How many strategies may still be tried, with so many new buckets."""
        spent = sum(max(len(entry.tried), len(entry.candidates)) for entry in self.entries.values())
        return math.floor(SHARE_OF_TRIALS * self._paper_trials * (len(self.entries) + new)) - spent

    def _compare(self, entry: Entry) -> None:
        """Drop candidates that are slower with confidence; choose the last."""
        times = {s: [math.log(sum(t)) for t in entry.samples.get(s, ())] for s in entry.candidates}
        if min(map(len, times.values())) < FEWEST:
            return
        best = min(times, key=lambda s: (median(times[s]), s))
        for other in list(entry.candidates):
            if other != best:
                entry.confidence = _confidence(times[best], times[other])
                if entry.confidence >= CONFIDENCE or len(times[other]) >= MOST:
                    entry.candidates.remove(other)
        if len(entry.candidates) == 1:
            entry.chosen, entry.why = best, "measured" if len(times) > 1 else "predicted"
            entry.usual, entry.recent = math.exp(median(times[best])), []

    def _watch(self, entry: Entry, key: Key, seconds: float) -> None:
        entry.recent = [*entry.recent, seconds][-WINDOW:]
        drift = median(entry.recent) / entry.usual
        if len(entry.recent) == WINDOW and not 1 / DRIFT < drift < DRIFT:
            others = [s for s in self._best(key) if s != entry.chosen]
            if self._allowance(0) < 1:
                others = [s for s in others if s in entry.tried]
            self._reopen(key, others[:1], f"drifted by a factor of {drift:.2f}")

    def _reopen(self, key: Key, others: Sequence[Strategy], why: str) -> None:
        """Compare what was chosen with others."""
        entry = self.entries[key]
        known = [entry.chosen] if entry.chosen is not None else entry.candidates
        entry.candidates = [*known, *(s for s in others if s not in known)]
        entry.samples, entry.chosen, entry.why, entry.recent, entry.confidence = {}, None, why, [], 0.0

    def _refine(self) -> None:
        """Fit the rates to what was measured, and try what they say is better than what was chosen, most promising first."""
        self._fitted_at = len(self.seen)
        box: list[Rates | None] = [None]
        if dist.get_rank() == 0:
            box = [fit(self.observations(), self.sizes, self.rates, recomputed=self.recomputed)]
        dist.broadcast_object_list(box, 0)
        assert box[0] is not None
        self.rates = box[0]
        promising = []
        for key, entry in self.entries.items():
            best = self._best(key)[0]
            share = self.predicted(key, best) / min(self.predicted(key, s) for s in entry.tried)
            if best not in entry.tried and share < WORTH:
                promising.append((share, key, best))
        for _, key, best in sorted(promising):
            if self._allowance(0) >= 1:
                self._reopen(key, [best], "another one is predicted to be faster")

    def observations(self) -> list[Observation]:
        """The medians of what was measured, of the newest buckets and strategies."""
        newest = list(self.seen.items())[-HISTORY:]
        return [Observation(*at, *(median(column) for column in zip(*times, strict=True))) for at, times in newest]

    # What outlives the process.

    @property
    def trials(self) -> tuple[int, int]:
        """Strategies tried, over all buckets, and those that trying each degree with each r and all-to-all would have taken."""
        return sum(len(entry.tried) for entry in self.entries.values()), self._paper_trials * len(self.entries)

    def to_json(self) -> dict[str, Any]:
        """The dictionary, the rates and what they were fitted to."""
        chosen = [
            {"bucket": list(key), "strategy": asdict(entry.chosen), "confidence": entry.confidence, "seconds": entry.usual,
             "why": entry.why, "tried": [asdict(s) for s in sorted(entry.tried)]}
            for key, entry in sorted(self.entries.items()) if entry.chosen is not None
        ]  # fmt: skip
        history = [
            {"bucket": list(o.key), "strategy": asdict(o.strategy), "forward": o.forward, "backward": o.backward}
            for o in self.observations()
        ]
        return {"sizes": asdict(self.sizes), "rates": asdict(self.rates), "chosen": chosen, "history": history}

    def restore(self, document: dict[str, Any]) -> None:
        """Know what an earlier incarnation knew, as far as this one's strategies allow; nothing of one with other rates."""
        if document["rates"].keys() != asdict(self.rates).keys():
            return
        self.rates = Rates(**document["rates"])
        for item in document["chosen"]:
            strategy = Strategy(**item["strategy"])
            if strategy in self.strategies:
                tried = {Strategy(**s) for s in item["tried"]}
                known = {key: item[key] for key in ("confidence", "why")}
                self.entries[_key(item)] = Entry(
                    [strategy], tried=tried, chosen=strategy, usual=item["seconds"], **known
                )
        for item in document["history"]:
            self.seen[_key(item), Strategy(**item["strategy"])] = [(item["forward"], item["backward"])]
        self._fitted_at = len(self.seen)


def _key(item: dict[str, Any]) -> Key:
    first, second = item["bucket"]
    return first, second


def _confidence(faster: list[float], slower: list[float]) -> float:
    """That the mean of logarithms of the first is the smaller one."""
    spread = math.sqrt(variance(faster) / len(faster) + variance(slower) / len(slower))
    difference = mean(slower) - mean(faster)
    return NormalDist().cdf(difference / spread) if spread else float(difference > 0)
