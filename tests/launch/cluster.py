"""A Ray cluster as somebody else runs it: separate `ray start --block` processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.launch.hosts import Hosts, can_make_hosts
from tests.launch.runs import alive, environment
from trainrt.launch.cluster import free_port
from trainrt.launch.guard import descendants

HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "1000", "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "2000", "RAY_health_check_failure_threshold": "3",
}  # fmt: skip
"""As docs/cluster.md advises."""


class RayCluster:
    """Nodes of separate `ray start --block` processes, without authentication, as by hand.

    With `hosts` each but the head's runs on a host of its own, and with `shared_memory` (a size such as 256m) has a /dev/shm
    of its own, too.
    """

    def __init__(self, scratch: Path, *, hosts: Hosts | None = None, shared_memory: str = "") -> None:
        self.port, self.scratch, self._hosts = free_port(), scratch, hosts
        self._shared_memory = shared_memory
        self.short = Path(f"/tmp/joined-{os.getpid()}-{self.port}")
        self.nodes: list[subprocess.Popen[bytes]] = []

    @property
    def address(self) -> str:
        return f"{self._place(0)}:{self.port}"

    def _place(self, host: int) -> str:
        return self._hosts.address_of(host) if self._hosts is not None else "127.0.0.1"

    def add(self) -> subprocess.Popen[bytes]:
        host = self._hosts.add() if self._hosts is not None and self.nodes else 0
        words = self._hosts.prefix(host) if self._hosts is not None else []
        if host and self._shared_memory:
            mount = f'mount -t tmpfs -o size={self._shared_memory} tmpfs /dev/shm && exec "$@"'
            words += ["sh", "-c", mount, "sh"]
        words += [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        words += ["--dashboard-agent-listen-port", "0", "--num-cpus", "2", "--temp-dir", str(self.short)]
        words += ["--object-store-memory", str(80 * 2**20), "--node-ip-address", self._place(host)]
        head = ["--head", "--port", str(self.port), "--include-dashboard", "false"]
        head += ["--ray-client-server-port", str(free_port())]
        words += ["--address", self.address] if self.nodes else head
        environ = {**environment(), "RAY_AUTH_MODE": "disabled", **HEALTH_CHECKS}
        path = self.scratch / f"{len(self.nodes)}.log"
        with path.open("w") as log:
            self.nodes.append(subprocess.Popen(words, env=environ, stdout=log, stderr=log, start_new_session=True))
        # One after the other: nodes of one machine that start together may take each other's sockets.
        deadline = time.monotonic() + 60
        while "Ray runtime started" not in path.read_text():
            assert time.monotonic() < deadline and self.nodes[-1].poll() is None, path.read_text()
            time.sleep(0.1)
        return self.nodes[-1]

    def kill(self, node: subprocess.Popen[bytes], *, but: Collection[int] = ()) -> None:
        """SIGKILL all processes of a node, those of runs too."""
        for pid in [*descendants(node.pid), node.pid]:
            if alive(pid) and pid not in but:
                os.kill(pid, signal.SIGKILL)
        node.wait()

    @contextmanager
    def running(self, *, nodes: int) -> Iterator[RayCluster]:
        """The cluster with so many nodes, and its end."""
        for _ in range(nodes):
            self.add()
        before = os.environ.get("RAY_AUTH_MODE")
        os.environ["RAY_AUTH_MODE"] = "disabled"
        try:
            yield self
        finally:
            # Another cluster of the test may still be running.
            if before is None:
                del os.environ["RAY_AUTH_MODE"]
            for node in self.nodes:
                self.kill(node)
            subprocess.run(["rm", "-rf", str(self.short)], check=True)


@contextmanager
def cluster_of_hosts(folder: Path, *, nodes: int, shared_memory: str = "") -> Iterator[tuple[Hosts, RayCluster]]:
    """Nodes on hosts with links of their own; skips where there can be none."""
    if not can_make_hosts():
        pytest.skip("network namespaces need root")
    with Hosts() as hosts, RayCluster(folder, hosts=hosts, shared_memory=shared_memory).running(nodes=nodes) as cluster:
        yield hosts, cluster
    assert hosts.left() == []
