"""The agent's end of a zygote: starts it, asks for forks, hears of forks and exits, and of its end."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainrt.launch.orders import AgentOrders


class ZygoteHandle:
    """The agent's zygote process. Forks asked for before it is ready wait in its socket."""

    def __init__(
        self, orders: AgentOrders, *, on_message: Callable[[dict[str, Any]], None], on_end: Callable[[], None]
    ) -> None:
        import subprocess

        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._on_message, self._on_end = on_message, on_end
        log = Path(orders.run_dir) / "logs" / f"zygote-{orders.node}.log"
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", "trainrt.launch.zygote", "--control", str(theirs.fileno()),
                    "--entry", orders.entry, "--preload", ",".join(orders.preload),
                ],
                pass_fds=[theirs.fileno()], env=zygote_environment(), start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip
        theirs.close()
        self._control.setblocking(False)
        asyncio.get_running_loop().add_reader(self._control, self._read)

    def send(self, message: dict[str, Any], connection: socket.socket) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):
            socket.send_fds(self._control, [json.dumps(message).encode()], [connection.fileno()])

    def end(self) -> None:
        """Close the control socket: the zygote ends its workers and itself."""
        if self._control.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._control)
            self._control.close()
        try:
            self.process.wait(timeout=1)
        except Exception:
            self.process.kill()
            self.process.wait()

    def _read(self) -> None:
        try:
            data = self._control.recv(65536)
        except BlockingIOError:
            return
        except ConnectionError:
            data = b""
        if data:
            self._on_message(json.loads(data))
            return
        self.end()
        self._on_end()


def zygote_environment() -> dict[str, str]:
    """The agent's environment with its import path, and no library threads before the forks."""
    path = os.pathsep.join(dict.fromkeys(filter(None, [os.getcwd(), *sys.path])))
    single = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", **single}
