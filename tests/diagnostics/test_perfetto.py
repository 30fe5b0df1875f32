"""Traces: slices nest strictly in whole nanoseconds, flows lead from who came last to who waited."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.diagnostics.run_directories import SLOW_RANK, WrittenRun
from trainrt.diagnostics.page.arrows import arrows
from trainrt.diagnostics.page.perfetto import Slice, nest, perfetto, walk
from trainrt.diagnostics.page.reader import RunReader
from trainrt.diagnostics.page.timeline import companions, timeline
from trainrt.diagnostics.telemetry import NOBODY


def nanoseconds(microseconds: float) -> int:
    """As Perfetto reads a time of JSON."""
    return round(microseconds * 1000)


def check_nested(slices: list[Slice], begin: int, end: int) -> None:
    at = begin
    for piece in slices:
        assert at <= piece.begin <= piece.end <= end, (piece, at, end)
        check_nested(piece.children, piece.begin, piece.end)
        at = piece.end


def read(run: WrittenRun) -> RunReader:
    reader = RunReader(run.run_dir)
    reader.refresh()
    return reader


def test_the_trace_of_a_run_nests_and_its_flows_join_slices(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path)
    run.steps(3)
    trace = json.loads(json.dumps(perfetto(read(run), 2)))["traceEvents"]
    names = {(e["pid"], e.get("tid")): e["args"]["name"] for e in trace if e["ph"] == "M"}
    assert names[1, None] == "n0" and names[3, 5] == "rank 5" and len(names) == 12
    by_thread: dict[Any, list[tuple[int, int, str]]] = defaultdict(list)
    for event in trace:
        if event["ph"] == "X":
            begin = nanoseconds(event["ts"])
            by_thread[event["pid"], event["tid"]].append((begin, begin + nanoseconds(event["dur"]), event["name"]))
    assert len(by_thread) == 8
    for slices in by_thread.values():
        open_until: list[int] = []
        for begin, end, name in slices:  # in the order of the file, parents first
            while open_until and open_until[-1] <= begin:
                open_until.pop()
            assert not open_until or end <= open_until[-1], name
            open_until.append(end)
        assert {"step", "forward", "all_reduce"} <= {name for _, _, name in slices}
    flows = defaultdict(dict)
    for event in trace:
        if event["ph"] in "sf":
            flows[event["id"]][event["ph"]] = event
    assert flows and all(set(pair) == {"s", "f"} for pair in flows.values())
    for pair in flows.values():
        assert nanoseconds(pair["s"]["ts"]) <= nanoseconds(pair["f"]["ts"])
        for end in pair.values():
            at = nanoseconds(end["ts"])
            assert any(begin <= at <= until for begin, until, _ in by_thread[end["pid"], end["tid"]])
    assert perfetto(read(run), 99)["traceEvents"] == []


@st.composite
def rounded_trees(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Events that nest in exact arithmetic, starts and lengths each rounded to 100 ns as events files hold them."""
    events: list[dict[str, Any]] = []

    def grow(begin: float, end: float, depth: int) -> None:
        cuts = sorted(draw(st.lists(st.floats(begin, end), max_size=6)) if depth < 4 else [])
        for first, last in zip(cuts[::2], cuts[1::2], strict=False):
            grow(first, last, depth + 1)
        events.append({"depth": depth, "start": round(begin, 7), "seconds": round(end - begin, 7)})

    grow(0.0, draw(st.floats(0, 0.3)), 0)
    return events


MOVED = [
    (3, 2.39e-05, 0.0038824),
    (4, 0.0039062, 0.2460938),
    (3, 0.0039062, 0.2460938),
    (2, 0.0, 0.25),
    (1, 0.0, 0.25),
    (0, 0.0, 0.25),
]
"""The second of depth 3 is moved behind the first, and its child with it."""


@settings(max_examples=500)
@example([{"depth": depth, "start": start, "seconds": seconds} for depth, start, seconds in MOVED], 0.0)
@given(rounded_trees(), st.floats(0, 2))
def test_rounded_events_nest_strictly(events: list[dict[str, Any]], offset: float) -> None:
    slices = nest(events, offset=offset)
    check_nested(slices, 0, 1 << 62)
    found = list(walk(slices))
    assert sorted(piece.index for piece in found) == list(range(len(events))) and len(slices) == 1
    for piece in found:
        exact = (offset + events[piece.index]["start"]) * 1e9
        assert (
            abs(piece.begin - exact) <= 400 * len(events)
            and piece.end - piece.begin <= events[piece.index]["seconds"] * 1e9 + 1
        )


def test_arrows_lead_from_the_last_to_come(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path)
    run.steps(2)
    reader = read(run)
    found = arrows(reader.windows.lines(2), reader.summaries.roles)
    assert found[0].waited >= found[-1].waited
    neighbour = SLOW_RANK - 1
    assert {arrow.source for arrow in found if arrow.group == "tp" and arrow.target in (neighbour, SLOW_RANK)} == {
        SLOW_RANK
    }
    assert arrows(reader.windows.lines(2), NOBODY) == [], "without seats nobody knows who is in one group"
    groups = {axis: reader.summaries.roles.groups(axis) for axis in ("tp", "pp", "fsdp", "ep")}
    for arrow in found:
        assert (
            groups[arrow.group][arrow.source] == groups[arrow.group][arrow.target]
            and arrow.source_time <= arrow.target_time
        )
    document = timeline(reader, 2)
    assert len(document["arrows"]) == len(found) and document["arrows"][0]["from"] == found[0].source
    assert document["names"][document["ranks"][0]["kind"][0]] == "step"


def test_of_many_ranks_the_groups_of_one_are_shown(tmp_path: Path) -> None:
    from trainrt.config import MeshSize

    run = WrittenRun(tmp_path, size=MeshSize(pp=4, dp=8, tp=8), host_ranks=8)
    run.step(events=range(256))
    reader = read(run)
    document = timeline(reader, 1, 70)
    shown = [row["rank"] for row in document["ranks"]]
    groups = {axis: reader.summaries.roles.groups(axis) for axis in ("tp", "pp", "dp")}
    wanted = {r for r in range(256) if any(groups[axis][r] == groups[axis][70] for axis in groups)}
    assert set(shown) == wanted and len(shown) == 8 + 3 + 7
    assert len(companions(reader.summaries.roles, 70, range(256), number=5)) == 5
