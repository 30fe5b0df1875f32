"""What recording costs: nanoseconds an event, events a step, and steps with it against steps without.

    python -m benchmarks.events [--pairs 40] [--hidden 160]

One rank trains a small model with steps of about a second; recording is on and off in turn, and in turn first. Prints the ratio
of the medians with its interval of 95 % (bootstrap over pairs), by the clock and by the processor's time of the rank, which other
processes move less; and the difference in milliseconds. That does not depend on the width of the layers: with --hidden 16 there
are many more pairs in the same time, and what a step costs is known better. Besides, what events and hooks cost by themselves,
the least of many repeats.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tests.jobs import engine, job, train
from tests.ranks import run_ranks
from trainrt.events import EventRing, ring
from trainrt.parallel.timed import time_blocks
from trainrt.run_dir import RunDir
from trainrt.training.recorder import Recorder

WARM_UP = 3
LAYERS = ROUNDS = 4
DRAWS = 10000


def least(work: Callable[[], None], *, repeats: int) -> float:
    """Nanoseconds of the quickest repeat."""
    took = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        took.append((time.perf_counter() - start) * 1e9)
    return min(took)


def nanoseconds_a_span(events: int = 1000) -> float:
    """Of an event by itself: begun, ended, in the ring."""
    source = EventRing()

    def spans() -> None:
        for _ in range(events):
            with source.span("block.0", kind="forward"):
                pass

    return least(spans, repeats=100) / events


class _Layers(torch.nn.Module):
    """Layers that compute next to nothing."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(number))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def nanoseconds_a_layer(layers: int = 50) -> float:
    """Of the hooks of a layer in one round, with both of its events."""
    plain, timed = _Layers(layers), _Layers(layers)
    source = EventRing()
    time_blocks(timed.blocks, into=source)

    def run(model: _Layers) -> float:
        def once() -> None:
            with source.span("forward", kind="forward"):
                loss = model(torch.ones(1, 1, requires_grad=True)).sum()
            with source.span("backward", kind="backward"):
                loss.backward()

        return least(once, repeats=100)

    return (run(timed) - run(plain)) / layers


def nanoseconds_an_event_told(events: int = 1000, repeats: int = 50) -> float:
    """Of an event at the step's end: drained and accounted for."""
    with tempfile.TemporaryDirectory() as folder:
        source, recorder = _recorder(folder, EventRing())
        took = []
        for step in range(101, 101 + repeats):
            with source.span("step", kind="step"):
                for _ in range(events):
                    source.begin("block.0", "forward")
                    source.end()
            start = time.perf_counter()
            recorder.step(step, epoch=0.0)
            took.append((time.perf_counter() - start) / events * 1e9)
    return min(took)


def _recorder(folder: str, source: EventRing) -> tuple[EventRing, Recorder]:
    run_dir = RunDir(folder)
    run_dir.create()
    device = torch.device("cpu")
    return source, Recorder(run_dir, rank=0, node="n0", incarnation=1, device=device, source=source)


def steps(rank: int, pairs: int, hidden: int, folder: str) -> dict[str, Any]:
    """Seconds of steps by turns, by the clock and of the processor, and the events of one."""
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "layers": LAYERS,
        "heads": 4,
        "kv_heads": 2,
        "vocab_size": 64,
    }
    config = job(
        "moe_lm", model={"config": {**sizes, "max_position": 256}},
        data={"sequence_length": 256, "global_batch": 4 * ROUNDS, "microbatch": 4}, run={"steps": 2 * pairs + 2 * WARM_UP + 1},
    )  # fmt: skip
    made = engine(config, rank)
    _, recorder = _recorder(folder, ring)
    seconds: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    events = []
    for step in range(1, 2 * (pairs + WARM_UP) + 1):
        pair, second = divmod(step - 1, 2)
        ring.enabled = on = (pair + second) % 2 == 0
        start, worked = time.perf_counter(), time.process_time()
        with ring.span("step", kind="step"):
            train(made, config, steps=1, first=step)
        number = ring._written - ring._read
        recorder.step(step, epoch=0.0)
        if pair >= WARM_UP:
            seconds[on].append((time.perf_counter() - start, time.process_time() - worked))
            events.append(number)
    return {"on": np.array(seconds[True]), "off": np.array(seconds[False]), "events": max(events)}


def intervals(on: np.ndarray, off: np.ndarray) -> dict[str, list[float]]:
    """The ratio of the medians, their difference in ms, and the 2.5th and 97.5th percentile over pairs drawn again."""
    drawn = np.random.default_rng(0).integers(len(on), size=(DRAWS, len(on)))
    with_, without = (np.concatenate(([np.median(x)], np.median(x[drawn], axis=1))) for x in (on, off))
    found = {"ratio": with_ / without, "milliseconds": 1e3 * (with_ - without)}
    return {
        name: [round(float(x), 5) for x in (values[0], *np.quantile(values[1:], (0.025, 0.975)))]
        for name, values in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--hidden", type=int, default=160)
    options = parser.parse_args()
    span, layer, told = nanoseconds_a_span(), nanoseconds_a_layer(), nanoseconds_an_event_told()
    with tempfile.TemporaryDirectory() as folder:
        (found,) = run_ranks(1, steps, options.pairs, options.hidden, folder, timeout=900)
    step = float(np.median(found["off"][:, 0]))
    print(json.dumps({
        "nanoseconds_a_span": round(span), "nanoseconds_a_layer": round(layer), "nanoseconds_an_event_told": round(told),
        "events_a_step": found["events"],
        "step_seconds": round(step, 4), "pairs": options.pairs,
        "share_of_these": round(((span + told) * found["events"] + layer * LAYERS * ROUNDS) * 1e-9 / step, 6),
        **{name: intervals(found["on"][:, at], found["off"][:, at]) for at, name in enumerate(("by_clock", "by_processor"))},
    }))  # fmt: skip


if __name__ == "__main__":
    main()
