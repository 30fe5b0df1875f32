"""A step as a Chrome trace, which Perfetto opens: a process a host, a thread a rank, slices that nest, flows for waits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainrt.diagnostics.page.arrows import arrows
from trainrt.diagnostics.page.reader import RunReader
from trainrt.diagnostics.page.timeline import lines_of

NANOSECONDS = 1_000_000_000


@dataclass(slots=True)
class Slice:
    """One event in whole nanoseconds of the trace, within its parent and after its elder siblings. index: in its line."""

    index: int
    begin: int
    end: int
    depth: int
    children: list[Slice] = field(default_factory=list)


def perfetto(reader: RunReader, step: int, rank: int | None = None) -> dict[str, Any]:
    """The trace of a step; of a large run, as the timeline, the groups of one rank. Empty where the step has no events."""
    lines = lines_of(reader, step, rank)
    start = min((line["time"] for line in lines.values()), default=0.0)
    hosts = {line["node"]: None for line in lines.values()}
    # Perfetto takes process 0 for the idle task.
    pids = {host: number for number, host in enumerate(sorted(hosts), 1)}
    events: list[dict[str, Any]] = [_named("process_name", pid, None, host) for host, pid in pids.items()]
    placed: dict[tuple[int, int], Slice] = {}
    for number, line in lines.items():
        pid = pids[line["node"]]
        events.append(_named("thread_name", pid, number, f"rank {number}"))
        for piece in walk(nest(line["events"], offset=line["time"] - start)):
            placed[number, piece.index] = piece
            events.append(_complete(line["events"][piece.index], piece, pid, number))
    events += _flows(lines, reader, placed, pids)
    about = {"step": step, "start": start, "run": str(reader.run_dir)}
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": about}


def nest(events: Sequence[Mapping[str, Any]], *, offset: float = 0.0) -> list[Slice]:
    """The events of one line as trees. Starts and lengths were rounded apart from each other, so a child may stand out of its
    parent by less than a microsecond: it is cut to it."""
    order = sorted(range(len(events)), key=lambda i: (events[i]["start"], events[i]["depth"], i))
    roots: list[Slice] = []
    path: list[Slice] = []
    for index in order:
        event = events[index]
        while path and path[-1].depth >= event["depth"]:
            path.pop()
        siblings = path[-1].children if path else roots
        begin = round((offset + event["start"]) * NANOSECONDS)
        end = begin + max(0, round(event["seconds"] * NANOSECONDS))
        if siblings:
            begin = max(begin, siblings[-1].end)
        if path:
            # A parent that was moved behind its elder sibling may begin after its child.
            begin, end = (min(max(at, path[-1].begin), path[-1].end) for at in (begin, end))
        made = Slice(index, begin, max(begin, end), event["depth"])
        siblings.append(made)
        path.append(made)
    return roots


def walk(slices: Sequence[Slice]) -> Iterator[Slice]:
    """Parents before their children."""
    for piece in slices:
        yield piece
        yield from walk(piece.children)


def _named(what: str, pid: int, tid: int | None, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": pid, **({} if tid is None else {"tid": tid}), "args": {"name": name}}


def _complete(event: Mapping[str, Any], piece: Slice, pid: int, tid: int) -> dict[str, Any]:
    told = {"bytes": event["bytes"], "group": event["group"], "sequence": event.get("sequence")}
    return {
        "ph": "X", "name": event["name"], "cat": event["kind"], "pid": pid, "tid": tid,
        "ts": piece.begin / 1000, "dur": (piece.end - piece.begin) / 1000,
        "args": {name: value for name, value in told.items() if value},
    }  # fmt: skip


def _flows(
    lines: Mapping[int, Mapping[str, Any]],
    reader: RunReader,
    placed: Mapping[tuple[int, int], Slice],
    pids: Mapping[str, int],
) -> Iterator[dict[str, Any]]:
    """A flow begins in the slice of the last to arrive, and ends within the slice that waited for it."""
    for number, arrow in enumerate(arrows(lines, reader.summaries.roles), 1):
        source, target = placed[arrow.source, arrow.source_event], placed[arrow.target, arrow.target_event]
        finish = max(target.begin, target.end - 1)
        if finish < source.begin:
            continue
        both = {"name": "held up", "cat": "wait", "id": number}
        yield {
            "ph": "s",
            **both,
            "pid": pids[lines[arrow.source]["node"]],
            "tid": arrow.source,
            "ts": source.begin / 1000,
        }
        yield {
            "ph": "f", "bp": "e", **both, "pid": pids[lines[arrow.target]["node"]], "tid": arrow.target, "ts": finish / 1000,
        }  # fmt: skip
