"""Workers' lines on the driver's terminal, from real files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from trainrt.launch.logs import LogMonitor

TRACEBACK = (
    'Traceback (most recent call last):\n  File "mine.py", line 3, in loss\n    raise ValueError\nValueError: no\n'
)


class Logs:
    def __init__(self, folder: Path) -> None:
        self.folder, self.shown = folder, list[str]()
        self.write(0, "of an earlier launch\n")
        self.monitor = LogMonitor(folder, write=self.shown.append, node_of={0: "n0", 1: "n1"}.get)

    def write(self, rank: int, text: str) -> None:
        with (self.folder / f"rank-{rank:05d}.log").open("a") as log:
            log.write(text)


@pytest.fixture
def logs(tmp_path: Path) -> Iterator[Logs]:
    logs = Logs(tmp_path)
    yield logs
    logs.monitor.close()


def test_each_line_is_shown_once_with_rank_and_node(logs: Logs) -> None:
    logs.write(0, "one\ntwo\n")
    logs.write(1, "three\n")
    logs.write(0, "half a li")
    logs.monitor.close()
    assert logs.shown == ["[rank 0 n0] one", "[rank 0 n0] two", "[rank 1 n1] three"]


def test_the_same_line_of_several_ranks_is_shown_for_one_and_a_repetition_is_not_lost(logs: Logs) -> None:
    logs.write(0, "warning\nwarning\n")
    logs.write(1, "warning\n")
    logs.monitor.close()
    assert logs.shown == ["[rank 0 n0] warning", "[rank 0 n0] warning"]


def test_a_traceback_whose_error_was_reported_is_not_shown(logs: Logs) -> None:
    logs.monitor.report("ValueError: no")
    logs.write(0, f"before\n{TRACEBACK}after\n")
    logs.monitor.close()
    assert logs.shown == ["[rank 0 n0] before", "[rank 0 n0] after"]


def test_a_traceback_that_nobody_reported_is_shown_whole(logs: Logs) -> None:
    logs.write(1, TRACEBACK)
    logs.monitor.close()
    assert logs.shown == [f"[rank 1 n1] {line}" for line in TRACEBACK.splitlines()]


def test_chained_tracebacks_are_one(logs: Logs) -> None:
    logs.monitor.report("ValueError: no")
    chain = f"Traceback (most recent call last):\nKeyError: 1\n\nDuring handling of the above exception, another:\n\n{TRACEBACK}"
    logs.write(0, f"{chain}after\n")
    logs.monitor.close()
    assert logs.shown == ["[rank 0 n0] after"]
