"""What a mixture costs under a strategy: seconds forward and backward, from six rates that are fitted to what was measured.

The schedule is followed chunk by chunk (schedule.py): all chunks are on their way at once, a chunk is computed when it is there
and the one before is done, and its way back begins when it is computed and the link is free.

Legend: W ranks of ep, E experts, S slices of an expert, H hosts of P places.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np

from trainrt.parallel.cost import SUSTAINED, Device
from trainrt.parallel.moe.exchange import Counts
from trainrt.parallel.moe.layout import ExpertLayout
from trainrt.parallel.moe.strategy import Strategy

BUCKETS_PER_OCTAVE = 2

Key = tuple[int, int]
"""Buckets of the rows that the rank with most of them has, and of those that the busiest rank computes."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """One mixture. row_bytes: of a row as it travels; expert_bytes: of an expert's weights; row_flops: forward, of a row.

    places: ranks of ep that a host has.
    """

    layout: ExpertLayout
    places: int
    row_bytes: int
    expert_bytes: int
    row_flops: float

    def key(self, count_WE: Counts) -> Key:
        """The bucket of a call: from the rows of all ranks, so it is the same on all of them."""
        layout = self.layout
        if layout.slices > 1:
            busiest = -(-int(count_WE.sum(0).max()) // layout.slices)
        else:
            busiest = int(np.add.reduceat(count_WE.sum(0), layout.firsts).max())
        return _bucket(int(count_WE.sum(1).max())), _bucket(busiest)

    def even(self, rows: int) -> Key:
        """The bucket where every rank has so many rows and every expert as many of them."""
        return _bucket(rows), _bucket(rows)


def _bucket(rows: int) -> int:
    return round(BUCKETS_PER_OCTAVE * math.log2(rows)) + 1 if rows else 0


def rows_of(bucket: int) -> float:
    """The middle of a bucket."""
    return 2.0 ** ((bucket - 1) / BUCKETS_PER_OCTAVE) if bucket else 0.0


@dataclass(frozen=True, slots=True)
class Rates:
    """Seconds: of a message, of a byte between hosts and inside one, of an operation, of an expert that a chunk is computed
    with beside its operations, and of a pass beside all that."""

    message: float
    byte: float
    inside_byte: float
    flop: float
    expert: float
    call: float

    @classmethod
    def of(cls, device: Device) -> Rates:
        """What a device's profile says, before anything of this job was measured."""
        byte = 1.0 / device.link_bytes_per_second
        latency = device.latency_seconds
        return cls(latency, byte, byte, 1.0 / (SUSTAINED * device.flops), latency, latency)


@dataclass(frozen=True, slots=True)
class _Pass:
    """One pass of a rank: seconds of the weights on their way, bytes of rows one way, operations, experts it computes with."""

    gather: float
    volume: float
    flops: float
    experts: float

    def seconds(self, sizes: Sizes, rates: Rates, strategy: Strategy, degree: int, times: int) -> float:
        """times: how often the operations of the forward pass are done."""
        compute = times * self.flops * rates.flop
        chunk = times * self.experts * rates.expert
        if not self.volume:
            return rates.call + self.gather + compute + chunk
        return (
            rates.call
            + self.gather
            + _pipelined(sizes, rates, strategy.hierarchical, self.volume, compute, chunk, degree)
        )


def predict(key: Key, strategy: Strategy, sizes: Sizes, rates: Rates, *, recomputed: bool) -> tuple[float, float]:
    """Seconds of the forward and of the backward pass."""
    one = _pass(rows_of(key[0]), rows_of(key[1]), strategy, sizes, rates)
    again = recomputed or strategy.degree != strategy.backward_degree
    return (
        one.seconds(sizes, rates, strategy, strategy.degree, 1),
        one.seconds(sizes, rates, strategy, strategy.backward_degree, 3 if again else 2),
    )


def _pass(sent: float, busiest: float, strategy: Strategy, sizes: Sizes, rates: Rates) -> _Pass:
    """Of the busiest rank; gradients of weights go back the way that the weights came."""
    layout, ranks = sizes.layout, sizes.layout.ranks
    if strategy.r == 0:
        gather = _weights(sizes, rates, layout.experts * sizes.expert_bytes * (ranks - 1) / ranks)
        return _Pass(gather, 0.0, sent * sizes.row_flops, layout.experts)
    # Weights of the other slices of a group of S / r.
    lacking = sizes.expert_bytes / layout.slices * (layout.slices / strategy.r - 1)
    # The busiest link is that of the rank that sends most or of the one that receives most.
    travelling = max(sent, busiest) * strategy.r
    if strategy.hot:
        lacking = strategy.hot * sizes.expert_bytes
        travelling, busiest = _without_hottest(sent, busiest, ranks), min(sent, busiest)
    return _Pass(
        _weights(sizes, rates, lacking), travelling * sizes.row_bytes * (ranks - 1) / ranks, busiest * sizes.row_flops,
        layout.experts / ranks * layout.slices,
    )  # fmt: skip


def _weights(sizes: Sizes, rates: Rates, volume: float) -> float:
    """Seconds for three weights that together have so many bytes."""
    return 3 * _way(sizes, rates, volume / 3, False) if volume else 0.0


def _without_hottest(sent: float, busiest: float, ranks: int) -> float:
    """Rows of a rank that still travel if those of the hottest expert do not. All others are taken to have the same."""
    rows = sent * ranks
    even = max(rows - busiest, 0.0) / max(ranks - 1, 1)
    return sent * (1 - max(busiest - even, 0.0) / max(rows, 1.0))


def _pipelined(
    sizes: Sizes, rates: Rates, hierarchical: bool, volume: float, compute: float, chunk: float, degree: int
) -> float:
    """When the last of `degree` chunks is back. compute: seconds of all of them, chunk: of each beside."""
    way = _way(sizes, rates, volume / degree, hierarchical)
    done, link = 0.0, degree * way
    for k in range(degree):
        done = max(done, (k + 1) * way) + compute / degree + chunk
        link = max(link, done) + way
    return link


def _way(sizes: Sizes, rates: Rates, volume: float, hierarchical: bool) -> float:
    """Seconds of one all-to-all in which a rank sends so many bytes to the others."""
    ranks, places = sizes.layout.ranks, sizes.places
    hosts = ranks // places
    between = volume * (ranks - places) / max(ranks - 1, 1)
    if hierarchical:
        inside = volume * ranks / max(ranks - 1, 1) * (places - 1) / places
        messages = places - 1 + hosts - 1
    else:
        inside, messages = volume - between, ranks - 1
    return messages * rates.message + between * rates.byte + inside * rates.inside_byte


@dataclass(frozen=True, slots=True)
class Observation:
    """What one strategy took for loads of one bucket, forward and backward, in seconds."""

    key: Key
    strategy: Strategy
    forward: float
    backward: float


def fit(observations: Sequence[Observation], sizes: Sizes, start: Rates, *, recomputed: bool) -> Rates:
    """The rates with which predictions come closest, in ratios; outliers count less. Rates stay near `start` where nothing
    that was observed says otherwise."""
    from scipy.optimize import least_squares

    first = np.log(astuple(start))

    def errors(logs: np.ndarray) -> np.ndarray:
        rates = Rates(*np.exp(logs))
        found = []
        for o in observations:
            forward, backward = predict(o.key, o.strategy, sizes, rates, recomputed=recomputed)
            found += [math.log(forward / o.forward), math.log(backward / o.backward)]
        return np.concatenate((found, 0.02 * (logs - first)))

    found = least_squares(errors, first, loss="soft_l1", f_scale=0.2, max_nfev=40)
    return Rates(*(float(rate) for rate in np.exp(found.x)))
