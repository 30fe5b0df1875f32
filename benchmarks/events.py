"""What recording costs: nanoseconds an event, events a step, and steps with it against steps without.

    python -m benchmarks.events [--pairs 40] [--hidden 160]

One rank trains a small model with steps of about a second; recording is on and off in turn, and in turn first. Prints the ratio
of the medians with its interval of 95 % (bootstrap over pairs), and what the events alone account for.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from statistics import median
from typing import Any

import numpy as np
import torch

from tests.jobs import engine, job, train
from tests.ranks import run_ranks
from trainrt.events import EventRing, ring
from trainrt.run_dir import RunDir
from trainrt.training.recorder import Recorder

WARM_UP = 3
DRAWS = 10000


def nanoseconds_a_span(events: int = 200_000) -> float:
    """Of an event by itself: begun, ended, in the ring."""
    source = EventRing()
    start = time.perf_counter()
    for _ in range(events):
        with source.span("block.0", kind="forward"):
            pass
    return (time.perf_counter() - start) / events * 1e9


def nanoseconds_an_event_told(events: int = 1000, repeats: int = 50) -> float:
    """Of an event at the step's end: drained and accounted for."""
    with tempfile.TemporaryDirectory() as folder:
        source, recorder = _recorder(folder, EventRing())
        took = []
        for step in range(100, 100 + repeats):
            with source.span("step", kind="step"):
                for _ in range(events):
                    source.begin("block.0", "forward")
                    source.end()
            start = time.perf_counter()
            recorder.step(step, epoch=0.0)
            took.append((time.perf_counter() - start) / events * 1e9)
    return median(took)


def _recorder(folder: str, source: EventRing) -> tuple[EventRing, Recorder]:
    run_dir = RunDir(folder)
    run_dir.create()
    device = torch.device("cpu")
    return source, Recorder(run_dir, rank=0, node="n0", incarnation=1, device=device, source=source)


def steps(rank: int, pairs: int, hidden: int, folder: str) -> dict[str, Any]:
    """Seconds of steps by turns, and the events of one."""
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "layers": 4,
        "heads": 4,
        "kv_heads": 2,
        "vocab_size": 64,
    }
    config = job(
        "moe_lm", model={"config": {**sizes, "max_position": 256}},
        data={"sequence_length": 256, "global_batch": 16, "microbatch": 4}, run={"steps": 2 * pairs + 2 * WARM_UP + 1},
    )  # fmt: skip
    made = engine(config, rank)
    _, recorder = _recorder(folder, ring)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    events = []
    for step in range(1, 2 * (pairs + WARM_UP) + 1):
        pair, second = divmod(step - 1, 2)
        ring.enabled = on = (pair + second) % 2 == 0
        start = time.perf_counter()
        with ring.span("step", kind="step"):
            train(made, config, steps=1, first=step)
        number = ring._written - ring._read
        recorder.step(step, epoch=0.0)
        if pair >= WARM_UP:
            seconds[on].append(time.perf_counter() - start)
            events.append(number)
    return {"on": seconds[True], "off": seconds[False], "events": max(events)}


def interval(on: list[float], off: list[float]) -> tuple[float, float, float]:
    """The ratio of the medians, and its 2.5th and 97.5th percentile over pairs drawn again."""
    with_, without = np.array(on), np.array(off)
    drawn = np.random.default_rng(0).integers(len(on), size=(DRAWS, len(on)))
    ratios = np.median(with_[drawn], axis=1) / np.median(without[drawn], axis=1)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(np.median(with_) / np.median(without)), float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--hidden", type=int, default=160)
    options = parser.parse_args()
    span, told = nanoseconds_a_span(), nanoseconds_an_event_told()
    with tempfile.TemporaryDirectory() as folder:
        (found,) = run_ranks(1, steps, options.pairs, options.hidden, folder, timeout=900)
    ratio, low, high = interval(found["on"], found["off"])
    step = median(found["off"])
    print(json.dumps({
        "nanoseconds_a_span": round(span), "nanoseconds_an_event_told": round(told), "events_a_step": found["events"],
        "step_seconds": round(step, 4), "pairs": options.pairs,
        "share_by_events": round((span + told) * found["events"] * 1e-9 / step, 6),
        "ratio": round(ratio, 5), "interval": [round(low, 5), round(high, 5)],
    }))  # fmt: skip


if __name__ == "__main__":
    main()
