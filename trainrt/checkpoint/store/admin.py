"""The driver's and the agents' side of the stores: start one, tell it who belongs, ask what it holds."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trainrt
from trainrt.checkpoint.store.group import Group
from trainrt.checkpoint.store.inventory import Holding
from trainrt.checkpoint.store.protocol import Connection
from trainrt.checkpoint.store.slots import shared_folder
from trainrt.errors import StoreError

START_SECONDS = 20.0
REBUILD_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class StoreAddress:
    """Where a store listens: a Unix socket for its node's trainers, host:port for everyone else."""

    node: str
    pid: int
    socket: str
    address: str


def spawn(run_id: str, node: str, *, grace_seconds: float, token: str, host: str = "127.0.0.1") -> StoreAddress:
    """Start this node's store of a run, or adopt the one that lives. Raises StoreError if none comes up."""
    folder = shared_folder(run_id, node)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder.parent / f".{node}.lock"
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            living = _living(folder, node, token)
            if living is not None:
                return living
            (folder / "store.json").unlink(missing_ok=True)
            _start(run_id, node, token, folder=folder, grace_seconds=grace_seconds, host=host)
            deadline = time.monotonic() + START_SECONDS
            while time.monotonic() < deadline:
                living = _living(folder, node, token)
                if living is not None:
                    return living
                time.sleep(0.01)
        finally:
            path.unlink(missing_ok=True)
    log = folder / "store.log"
    raise StoreError(f"the store of {node} did not start: {log.read_text()[-500:] if log.exists() else 'no log'}")


def _start(run_id: str, node: str, token: str, *, folder: Path, grace_seconds: float, host: str) -> None:
    for stale in folder.glob("*-slot-*"):
        stale.unlink()
    options = {
        "run_id": run_id, "node": node, "token": token, "grace_seconds": grace_seconds, "host": host,
        "log": str(folder / "store.log"),
    }  # fmt: skip
    # The token goes over stdin: a command line is everybody's to read.
    home = str(Path(trainrt.__file__).parent.parent)
    path = os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, "-m", "trainrt.checkpoint.store.daemon"],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": path},
        start_new_session=True, cwd="/",
    )  # fmt: skip
    process.communicate(json.dumps(options).encode() + b"\n")


def _living(folder: Path, node: str, token: str) -> StoreAddress | None:
    try:
        facts = json.loads((folder / "store.json").read_text())
        admin = StoreAdmin(facts["address"], token)
        admin.renew()
    except (OSError, ValueError, StoreError):
        return None
    return StoreAddress(node, facts["pid"], str(folder / "store.sock"), facts["address"])


class StoreAdmin:
    """Requests to one store over TCP, each on a connection of its own. All raise StoreError if it is gone."""

    def __init__(self, address: str, token: str) -> None:
        self._address, self._token = address, token

    def _request(self, op: str, *, seconds: float = 5.0, **fields: Any) -> dict[str, Any]:
        connection = Connection(self._address, token=self._token, timeout_seconds=5)
        try:
            return connection.request(op, wait_seconds=seconds - 5, **fields)[0]
        finally:
            connection.close()

    def configure(
        self, *, incarnation: int, configuration: int, stores: Mapping[str, str], nodes_of_ranks: Mapping[int, str], leader: str,
        groups: Sequence[Group], checkpoints: str, keep: int, spill: str,
    ) -> None:  # fmt: skip
        """Who belongs to an incarnation; older ones are refused from now on, unsealed generations dropped.

        `configuration` grows each time, so that votes of a store that died and was started anew do not count.
        """
        self._request(
            "configure", incarnation=incarnation, configuration=configuration,
            stores=dict(stores), nodes_of_ranks=dict(nodes_of_ranks),
            leader=leader, groups=[group.to_json() for group in groups], checkpoints=checkpoints, keep=keep, spill=spill,
        )  # fmt: skip

    def status(self) -> dict[str, Any]:
        """{"node", "pid", "incarnation", "generations", "checkpoints", "bytes", "repaired"}."""
        return self._request("status")

    def rebuild(self, holding: Holding, node: str, *, stores: Mapping[str, str]) -> int:
        """Have this store decode a lost node's data of a generation. Returns the bytes. Raises StoreError if it cannot."""
        group = holding.group_of(node)
        data = {other: held for other in group.nodes if (held := holding.where(other)) is not None}
        answer = self._request(
            "rebuild", step=holding.step, incarnation=holding.incarnation, of=node, group=group.to_json(),
            groups=[group.to_json() for group in holding.groups], seating=holding.seating, data=data,
            parity=sorted(holding.parity & set(group.nodes)), stores=dict(stores), seconds=REBUILD_SECONDS,
        )  # fmt: skip
        return int(answer["bytes"])

    def scrub(self, holding: Holding | None = None) -> dict[str, int]:
        """Have a generation, else the newest committed one, compared with its checksums and repaired.

        Returns the blocks repaired, of data and of parity. Raises StoreError where it cannot be repaired.
        """
        which = {} if holding is None else {"step": holding.step, "incarnation": holding.incarnation}
        return self._request("scrub", seconds=REBUILD_SECONDS, **which)

    def renew(self) -> dict[str, list[float]]:
        """Put off the end of the lease. Returns what the store measured: node to (step, bytes, seconds), see `ParityKeeper`."""
        return self._request("renew")["links"]

    def shutdown(self) -> None:
        """End the store and remove its shared memory."""
        self._request("shutdown")
