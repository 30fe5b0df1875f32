"""All that the driver hears, in one queue: events of agents, signals, and the request to stop in the run directory."""

from __future__ import annotations

import queue
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from trainrt.launch.machine import Event, StopAsked, Tick
from trainrt.run_dir import RunDir

TERMINATED, CTRL_C = 75, 130
SIGNALS = {signal.SIGTERM: StopAsked("SIGTERM", TERMINATED), signal.SIGINT: StopAsked("Ctrl-C", CTRL_C)}


class Inbox:
    """Anybody puts events in, from any thread; the driver takes them out one after the other."""

    def __init__(self, run_dir: RunDir) -> None:
        self._stop_request = run_dir.stop_request
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def put(self, event: Event) -> None:
        self._events.put(event)

    def next(self, *, seconds: float) -> Event:
        """The next event; a Tick where none comes for so long."""
        try:
            return self._events.get(timeout=seconds)
        except queue.Empty:
            return Tick()

    def take_stop(self) -> StopAsked | None:
        """The newest request to stop that is waiting, if there is one; all other events stay, in their order."""
        stop, kept = None, []
        while not self._events.empty():
            event = self._events.get()
            if isinstance(event, StopAsked):
                stop = event
            else:
                kept.append(event)
        for event in kept:
            self._events.put(event)
        return stop

    def look_for_request(self) -> None:
        """`trainrt stop` leaves a file: it becomes an event."""
        if self._stop_request.exists():
            self.put(StopAsked("trainrt stop", TERMINATED))
            self._stop_request.unlink(missing_ok=True)

    @contextmanager
    def signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C become events; not possible outside of the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        self.listen()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def listen(self) -> None:
        """Handle the signals (again, where somebody else has put handlers of its own on them)."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, lambda number, _: self.put(SIGNALS[signal.Signals(number)]))
