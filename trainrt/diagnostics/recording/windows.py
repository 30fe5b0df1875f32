"""Which steps' events are written in full, and the lines of them (docs/reference/events.schema.json).

The first steps of an incarnation, every 50th, those that a file asks for, and those around one that was slow. Of other steps no
line is written: what they held stays in memory for as long as the two steps after them take.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from trainrt.events import Event

FIRST_STEPS = 3
EVERY = 50
BEFORE = 2
AFTER = 3
"""Steps around a slow one."""
SLOW = 1.5
USUAL_STEPS = 32
FEW = 8
"""With fewer steps than this nothing is known of what is usual."""


class Asked:
    """The steps that a file asks for: {"first": step, "last": step}. It is read when it has changed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int] | None = None
        self._steps = range(0)

    def __contains__(self, step: int) -> bool:
        try:
            facts = self._path.stat()
        except OSError:
            return False
        if (mark := (facts.st_mtime_ns, facts.st_ino)) != self._seen:
            self._seen, self._steps = mark, _steps_of(self._path)
        return step in self._steps


def _steps_of(path: Path) -> range:
    """Nothing, where the file says nothing that is understood: nobody's training ends for that."""
    try:
        window = json.loads(path.read_text())
        return range(int(window["first"]), int(window["last"]) + 1)
    except (OSError, ValueError, TypeError, KeyError):
        return range(0)


class Windows:
    """Which of the steps are to be written."""

    def __init__(self, asked: Path) -> None:
        self._asked = Asked(asked)
        self._usual: deque[float] = deque(maxlen=USUAL_STEPS)
        self._steps = 0
        self._slow_until = 0

    def wanted(self, step: int, seconds: float) -> int:
        """How many of the last steps, this one included: 0, 1, or those before a slow one as well."""
        self._steps += 1
        slow = len(self._usual) >= FEW and seconds > SLOW * median(self._usual)
        self._usual.append(seconds)
        if slow:
            self._slow_until = step + AFTER
            return 1 + BEFORE
        return int(
            self._steps <= FIRST_STEPS or step % EVERY == 0 or step <= self._slow_until or step in self._asked
        )  # fmt: skip


class EventWriter:
    """Appends lines to the events file of a rank."""

    def __init__(self, path: Path, *, rank: int, node: str, incarnation: int, asked: Path) -> None:
        self._file = path.open("a", buffering=1)
        self._head = {"rank": rank, "node": node, "incarnation": incarnation}
        self._windows = Windows(asked)
        self._kept: deque[tuple[int, Sequence[Event], float, int]] = deque(maxlen=1 + BEFORE)
        self._written: deque[int] = deque(maxlen=1 + BEFORE)

    def step(self, step: int, events: Sequence[Event], *, epoch: float, dropped: int) -> None:
        """The events of a step, the last of which is the step itself; what is wanted of this one and those before is written.

        epoch: seconds since the epoch at zero of the events' clock.
        """
        self._kept.append((step, events, epoch, dropped))
        wanted = self._windows.wanted(step, events[-1].seconds)
        for kept in list(self._kept)[-wanted:] if wanted else ():
            if kept[0] not in self._written:
                self._write(*kept)
                self._written.append(kept[0])

    def _write(self, step: int, events: Sequence[Event], epoch: float, dropped: int) -> None:
        whole = events[-1]
        waiting = min(whole.seconds, sum(event.seconds for event in events if event.waiting))
        line = {
            "step": step, **self._head, "time": epoch + whole.start, "seconds": whole.seconds, "waiting_seconds": waiting,
            "self_seconds": whole.seconds - waiting, "dropped": dropped,
            "events": [_json(event, whole.start) for event in events],
        }  # fmt: skip
        self._file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        self._file.close()


def _json(event: Event, start: float) -> dict[str, Any]:
    known = event._asdict()
    del known["end"]
    return {**known, "start": round(event.start - start, 7), "seconds": round(event.seconds, 7)}
