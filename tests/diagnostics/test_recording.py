"""Of which steps a rank writes the events."""

from __future__ import annotations

import json
from pathlib import Path

from tests.reference import validate
from trainrt.diagnostics.recording.windows import EventWriter
from trainrt.events import Event


def written(folder: Path, seconds: dict[int, float], *, steps: int) -> list[int]:
    """The steps of which there are lines; all take a second where nothing else is said."""
    path = folder / "rank-00000.jsonl"
    writer = EventWriter(path, rank=0, node="n0", incarnation=1, asked=folder / "window")
    for step in range(1, steps + 1):
        took = seconds.get(step, 1.0)
        inner = Event("block.0", "forward", 1, step + 0.1, step + 0.1 + took / 2, 0, "", False, -1, 0)
        writer.step(
            step, [inner, Event("step", "step", 0, step, step + took, 0, "", False, -1, -1)], epoch=1e9, dropped=0
        )
    writer.close()
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    for line in lines:
        validate("events", line)
        assert line["time"] == 1e9 + line["step"]
    path.unlink()
    return [line["step"] for line in lines]


def test_the_first_steps_and_every_fiftieth_are_written(tmp_path: Path) -> None:
    assert written(tmp_path, {}, steps=110) == [1, 2, 3, 50, 100]


def test_a_slow_step_is_written_with_those_around_it(tmp_path: Path) -> None:
    assert written(tmp_path, {20: 1.6}, steps=30) == [1, 2, 3, 18, 19, 20, 21, 22, 23]
    assert written(tmp_path, {20: 1.4}, steps=30) == [1, 2, 3]
    assert written(tmp_path, {20: 1.6, 22: 1.6, 51: 3.0}, steps=60) == [1, 2, 3, *range(18, 26), 50, 49, *range(51, 55)]
    assert written(tmp_path, {5: 9.0}, steps=10) == [1, 2, 3], "too early to know what is usual"


def test_a_window_that_is_asked_for_is_written(tmp_path: Path) -> None:
    asked = tmp_path / "window"
    asked.write_text('{"first": 10, "last": 12}')
    assert written(tmp_path, {}, steps=20) == [1, 2, 3, 10, 11, 12]
    for nonsense in ("", "{", "[]", '{"first": "x", "last": 3}', '{"first": null}'):
        asked.write_text(nonsense)
        assert written(tmp_path, {}, steps=20) == [1, 2, 3]
