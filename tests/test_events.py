"""What ranks record of real steps: events nest, collectives are counted alike, summaries add up, losses stay what they are."""

from __future__ import annotations

import gc
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest

from tests.jobs import engine, job, train
from tests.ranks import run_ranks
from trainrt.diagnostics.recording.summary import exclusive, summary
from trainrt.diagnostics.table import AXES, PARTS, SUMMARY, WORK
from trainrt.events import Event, EventRing, ring

MESHES: dict[str, tuple[int, dict[str, int], dict[str, Any]]] = {
    "fsdp2": (2, {"fsdp": 2}, {}),
    "tp2": (2, {"tp": 2}, {}),
    "ep2": (2, {"fsdp": 2, "ep": 2}, {}),
    "checkpointing": (2, {"fsdp": 2}, {"model": {"activation_checkpointing": True}}),
    "all": (4, {"tp": 2, "fsdp": 2}, {"model": {"activation_checkpointing": True}}),
}
GROUPS = {"fsdp2": {"fsdp"}, "tp2": {"tp"}, "ep2": {"ep"}, "checkpointing": {"fsdp"}, "all": {"tp", "fsdp"}}
STEPS = 3


def recorded(rank: int, mesh: dict[str, int], sections: dict[str, Any]) -> list[tuple[list[Any], bytes, float, float]]:
    """Of each step: its events, its summary, its seconds by a clock outside, and its loss."""
    config = job("moe_lm", mesh=mesh, **sections)
    made = engine(config, rank)
    ring.clear()
    found = []
    for step in range(1, STEPS + 1):
        start = time.perf_counter()
        with ring.span("step", kind="step"):
            loss = train(made, config, steps=1, first=step)[0].loss
        seconds = time.perf_counter() - start
        events, work = ring.drain(), {"tokens": 1.0, "squares": 1.0, "rows": float(ring.rows)}
        ring.rows = 0
        record = summary(events, step=step, rank=rank, incarnation=1, epoch=0.0, work=work, memory=1)
        found.append(([tuple(event) for event in events], record.tobytes(), seconds, loss))
    return found


@pytest.fixture(scope="module")
def runs() -> Any:
    known: dict[str, Any] = {}

    def run(name: str) -> Any:
        if name not in known:
            ranks, mesh, sections = MESHES[name]
            known[name] = run_ranks(ranks, recorded, mesh, sections)
        return known[name]

    return run


def events_of(run: Any) -> list[list[Event]]:
    return [[Event(*event) for event in events] for steps in run for events, *_ in steps]


@pytest.mark.parametrize("name", MESHES)
def test_an_event_lies_inside_the_one_it_began_in(name: str, runs: Any) -> None:
    for events in events_of(runs(name)):
        assert events[-1].kind == "step" and events[-1].depth == 0
        for index, event in enumerate(events[:-1]):
            parent = next(other for other in events[index + 1 :] if other.depth == event.depth - 1)
            assert parent.start <= event.start
            assert event.start + event.seconds <= parent.start + parent.seconds + 1e-9, (event, parent)


@pytest.mark.parametrize("name", MESHES)
def test_layers_are_timed_forward_and_backward_in_every_round(name: str, runs: Any) -> None:
    _, mesh, sections = MESHES[name]
    rounds = range(4 // mesh.get("fsdp", 1))
    names = [f"block.{block}" for block in range(2)]
    for events in events_of(runs(name)):
        seen = Counter(
            (event.name, event.kind, event.microbatch) for event in events if event.name.startswith("block.")
        )
        wanted = Counter((name, kind, turn) for name in names for kind in ("forward", "backward") for turn in rounds)
        if sections:
            wanted.update((f"{name}.recompute", "backward", turn) for name in names for turn in rounds)
        assert seen == wanted
        backwards = [event.name for event in events if event.kind == "backward" and event.microbatch == 0]
        assert backwards.index("block.1") < backwards.index("block.0")


@pytest.mark.parametrize("name", MESHES)
def test_collectives_are_counted_alike_on_all_members(name: str, runs: Any) -> None:
    seen = []
    for steps in runs(name):
        of_rank: dict[str, list[tuple[int, str]]] = {}
        for events, *_ in steps:
            for event in map(Event._make, events):
                if event.kind == "collective":
                    of_rank.setdefault(event.group, []).append((event.sequence, event.name))
        seen.append({group: sorted(found) for group, found in of_rank.items()})
    assert set(seen[0]) >= GROUPS[name] | {"world"}
    for group, found in seen[0].items():
        assert [number for number, _ in found] == list(range(len(found))), group
    assert all(other == seen[0] for other in seen[1:])


@pytest.mark.parametrize("name", MESHES)
def test_parts_and_collectives_add_up_to_the_step(name: str, runs: Any) -> None:
    for steps in runs(name):
        for events, record, seconds, _ in steps[1:]:
            (line,) = np.frombuffer(record, dtype=SUMMARY)
            total = sum(float(line[part]) for part in (*PARTS, *AXES))
            assert total == pytest.approx(float(line["seconds"]), rel=1e-3)
            assert float(line["seconds"]) == pytest.approx(seconds, rel=0.02)
            assert line["other"] < 0.6 * line["seconds"], "most of a step is told apart"
            assert all(line[group] > 0 for group in GROUPS[name]) and line["forward"] > 0 and line["backward"] > 0
            assert line["bytes"] == sum(event[5] for event in events if event[1] == "collective") > 0
            # Two rounds or four of two sequences of 16 tokens, in two layers, to two experts each; over ep they meet elsewhere.
            assert name == "ep2" or line["rows"] == 8 // MESHES[name][1].get("fsdp", 1) * 16 * 2 * 2


def test_rows_over_ep_are_all_rows(runs: Any) -> None:
    rows = [np.frombuffer(record, dtype=SUMMARY)["rows"][0] for steps in runs("ep2") for _, record, *_ in steps]
    assert sum(rows) == STEPS * 8 * 16 * 2 * 2


def unrecorded(rank: int, mesh: dict[str, int], sections: dict[str, Any]) -> list[float]:
    """Losses without hooks, and with a ring that records nothing."""
    import trainrt.training.engines.native as native

    native.time_blocks = lambda blocks: None
    ring.enabled = False
    config = job("moe_lm", mesh=mesh, **sections)
    found = [result.loss for result in train(engine(config, rank), config, steps=STEPS)]
    assert not ring.drain()
    return found


@pytest.mark.parametrize("name", ["tp2", "ep2", "checkpointing"])
def test_losses_are_those_of_an_engine_that_records_nothing(name: str, runs: Any) -> None:
    ranks, mesh, sections = MESHES[name]
    with_hooks = [loss for *_, loss in runs(name)[0]]
    assert run_ranks(ranks, unrecorded, mesh, sections)[0] == with_hooks
    other = {**sections, "run": {"seed": 1}}
    assert run_ranks(ranks, unrecorded, mesh, other)[0] != with_hooks, "negative control"


def collected(rank: int) -> list[Any]:
    from trainrt.events import record_garbage

    record_garbage()
    record_garbage()
    ring.clear()
    gc.collect()
    with ring.span("step", kind="step"):
        gc.collect()
        gc.collect(1)
    return [tuple(event) for event in ring.drain()]


def test_garbage_collection_is_recorded_with_its_generation() -> None:
    events = [Event(*event) for event in run_ranks(1, collected)[0]]
    found = [event.name for event in events if event.kind == "garbage_collection" and not event.name.endswith(".0")]
    assert found == ["garbage_collection.2", "garbage_collection.1"]
    nothing = dict.fromkeys(WORK, 0.0)
    (record,) = summary(events, step=1, rank=0, incarnation=1, epoch=0.0, work=nothing, memory=0)
    assert 0 < record["garbage_collection"] <= record["seconds"]


def compiled(rank: int) -> list[Any]:
    import torch
    import torch._dynamo

    from trainrt.training.compiling import record_compilation

    record_compilation()
    record_compilation()
    ring.clear()
    double = torch.compile(lambda x: x * 2, backend="eager")
    for _ in range(2):
        with ring.span("step", kind="step"), ring.span("forward", kind="forward"):
            double(torch.ones(3))
    return [tuple(event) for event in ring.drain()]


def test_a_compilation_is_recorded() -> None:
    events = [Event(*event) for event in run_ranks(1, compiled)[0]]
    kinds = [(event.kind, event.depth) for event in events if event.kind != "garbage_collection"]
    assert kinds == [("compile", 2), ("forward", 1), ("step", 0), ("forward", 1), ("step", 0)]


def test_time_belongs_to_the_innermost_event_though_some_were_overwritten() -> None:
    source = EventRing(capacity=3)
    with source.span("step", kind="step"):
        for name in ("forward", "backward"):
            with source.span(name, kind=name), source.collective("all_gather", group="fsdp", bytes=8):
                time.sleep(0.002)
    events = source.drain()
    assert [event.name for event in events] == ["all_gather", "backward", "step"] and source.dropped == 2
    own = exclusive(events)
    assert sum(own) == pytest.approx(events[-1].seconds) and own[1] < 0.001 and min(own) >= 0


def test_what_an_exception_leaves_open_is_ended() -> None:
    source = EventRing()
    with pytest.raises(ValueError), source.span("forward", kind="forward"):
        source.begin("block.0", "forward")
        raise ValueError
    assert source.depth == 0 and [event.depth for event in source.drain()] == [1, 0]
