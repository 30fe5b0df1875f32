"""The live page as a subprocess of the driver: it reads the run directory and nothing else."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import trainrt
from trainrt.run_dir import RunDir

HOST = "127.0.0.1"
PORTS_TRIED = 100
PAGE = """
import ctypes, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
from trainrt.diagnostics.page.server import serve
serve(sys.argv[1], host=sys.argv[2], port=int(sys.argv[3]), token=None)
"""
"""Ends with the driver (prctl 1: PR_SET_PDEATHSIG)."""


class Dashboard:
    """A page at the wanted port, or the next free one."""

    def __init__(self, run_dir: RunDir, *, port: int) -> None:
        self.port = free_from(port)
        self.address = f"http://{HOST}:{self.port}"
        path = os.pathsep.join([str(Path(trainrt.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
        with (run_dir.logs / "dashboard.log").open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", PAGE, str(run_dir), HOST, str(self.port)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env={**os.environ, "PYTHONPATH": path},
            )  # fmt: skip

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def free_from(port: int) -> int:
    """The first free port from `port` on."""
    for candidate in range(port, min(port + PORTS_TRIED, 65536)):
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((HOST, candidate))
            return int(probe.getsockname()[1])
    return port
