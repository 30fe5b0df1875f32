"""What a driver leaves for its successor: the launcher's own folder of the run directory.

`RUN_DIR/.cluster/` holds the cluster's address, the run's secret, Ray's token and the lease. A driver
that takes a directory over finds agents and stores through it.
"""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainrt.run_dir import RunDir, read_json, replace

NAMESPACE = "trainrt"


@dataclass(frozen=True, slots=True)
class Shape:
    """What a cluster was started for; agents and stores of another shape cannot be taken over."""

    address: str
    nodes: int
    workers_per_node: int
    spare_nodes: int
    device: str


@dataclass(frozen=True, slots=True)
class Record:
    """A running cluster of this run. `names` are the nodes with agents, spares last; `stores` their stores."""

    run_id: str
    address: str
    embedded: bool
    names: list[str]
    shape: Shape
    stores: dict[str, str]

    def save(self, folder: Folder) -> None:
        replace(folder.record, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, folder: Folder) -> Record | None:
        document: dict[str, Any] | None = read_json(folder.record)
        if document is None:
            return None
        return cls(**{**document, "shape": Shape(**document["shape"])})


class Folder:
    """Paths below RUN_DIR/.cluster."""

    def __init__(self, run_dir: RunDir) -> None:
        self.path = run_dir.path / ".cluster"
        self.record = self.path / "record.json"
        self.secret = self.path / "secret"
        self.ray_token = self.path / "ray_token"
        self.proof = self.path / "proof"
        self.lease = self.path / "lease"
        self.orders = self.path / "orders.json"
        self.open_incidents = self.path / "open_incidents.json"

    def create(self) -> None:
        self.path.mkdir(mode=0o700, exist_ok=True)
        for path in (self.secret, self.ray_token, self.proof):
            if not path.exists():
                write_secret(path, secrets.token_hex(32))

    def renew_lease(self) -> None:
        self.lease.touch()

    def forget_cluster(self) -> None:
        """The cluster is gone: nothing is left to take over, and the next one gets tokens of its own."""
        for path in self.path.iterdir():
            path.unlink(missing_ok=True)


def write_secret(path: Path, text: str) -> None:
    """Write a file that only its owner may read."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def new_run_id() -> str:
    """Short: it is part of the paths of sockets."""
    return secrets.token_hex(4)
