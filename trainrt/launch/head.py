"""The Ray head, watched from outside of Ray: without it every call into Ray blocks, and Ray ends the process after a minute.

So the driver does not wait for that. What an embedded cluster ran is started anew by a successor: the same process with
a new program, which takes over the stores as any driver does after its predecessor's death. A cluster that others run is
theirs to bring back; until then the stores keep the state for `driver_grace_seconds`.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NoReturn

from trainrt.errors import TrainrtError
from trainrt.launch.display import Display
from trainrt.launch.publish import Status
from trainrt.launch.request import Request, to_document

PERIOD_SECONDS = 0.5
REFUSED_SECONDS = 1.5
"""A head that refuses connections for so long is gone."""
SILENT_SECONDS = 10.0
"""One that cannot be reached may be behind a link that comes back."""


class HeadWatch:
    """Calls `lost(seconds)` from its own thread, once, when the head is gone; the main thread may be stuck in Ray."""

    def __init__(self, address: str, *, lost: Callable[[float], None]) -> None:
        self._host, _, port = address.rpartition(":")
        self._port, self._lost = int(port), lost
        self._over = threading.Event()
        threading.Thread(target=self._run, name="head", daemon=True).start()

    def close(self) -> None:
        self._over.set()

    def _run(self) -> None:
        answered = time.monotonic()
        while not self._over.wait(PERIOD_SECONDS):
            patience = SILENT_SECONDS
            try:
                socket.create_connection((self._host, self._port), timeout=2).close()
                answered = time.monotonic()
            except ConnectionRefusedError:
                patience = REFUSED_SECONDS
            except OSError:
                pass
            silent = time.monotonic() - answered
            if silent > patience and not self._over.is_set():
                self._lost(silent)
                return


def leave(request: Request, lost: str, *, embedded: bool, status: Status, display: Display) -> NoReturn:
    """Without a head: hand over, where the cluster was this run's own; else end, with the state in memory.

    lost: what was lost, for messages.
    """
    step = status.fields["step"]
    display.leave()
    if request.own_process and embedded:
        display.line(f"node_loss: {lost}; a new cluster is started, and the stores keep step {step}")
        status.set(state="recovering", message=lost)
        succeed(request)
    grace = request.config.cluster.driver_grace_seconds
    message = (
        f"{lost}; the stores keep step {step} for {grace:.0f} s: within them, {request.command} goes on from memory, on a "
        "cluster of the same hosts; later, from the newest checkpoint"
    )
    status.set(state="failed", message=message)
    print(f"trainrt: {message}", file=sys.stderr, flush=True)
    # Ray would end this process too, later and without a word.
    os._exit(TrainrtError.exit_code)


def succeed(request: Request) -> NoReturn:
    """Become the driver that takes this run over, in the same process; does not return."""
    read, write = os.pipe()
    os.write(write, to_document(replace(request, handed_over=True)).encode())
    os.close(write)
    os.dup2(read, 0)
    os.execv(sys.executable, [sys.executable, "-m", "trainrt.launch.detached"])
