"""The Ray cluster: an embedded one of `ray start` processes under guards, or one that runs already.

Both give the same thing: Ray nodes, each with a name, to put an agent on. Everything after that is the
same code for both.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trainrt
from trainrt.errors import ConfigError, TrainrtError
from trainrt.launch.guard import NodeOrders, Orders, alive
from trainrt.launch.record import NAMESPACE, Folder
from trainrt.run_dir import RunDir, read_json

START_SECONDS = 90.0
JOIN_SECONDS = 60.0
CLOSE_SECONDS = 10.0
OBJECT_STORE_BYTES = 80 * 2**20
LONGEST_SCRATCH = 24
"""Ray puts Unix sockets below the scratch directory, and their paths may have 107 bytes."""

RAY_SETTINGS = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
    "RAY_prestart_worker_first_driver": "0",
}
"""A dead raylet is noticed in 1.1 s; a busy one may be silent for 7 s."""


RACK_LABEL = "rack"
"""`ray start --labels rack=r7` says which rack a node stands in: parity is spread over racks then."""


@dataclass(frozen=True, slots=True)
class Site:
    """A Ray node to put an agent on. `node_id` is Ray's, `host` its address, `rack` the node's label, where it has one."""

    name: str
    node_id: str
    host: str
    rack: str = ""

    @property
    def place(self) -> str:
        """Where it stands, the largest thing that can fail as one first."""
        return f"{self.rack}/{self.host}" if self.rack else self.host


class Embedded:
    """A cluster of this run alone, on this machine: `ray start` processes below guards with a lease."""

    def __init__(self, run_dir: RunDir, *, run_id: str, names: list[str], port: int) -> None:
        self.address = f"127.0.0.1:{port}"
        self._folder = Folder(run_dir)
        self._run_dir, self._names, self._port = run_dir, names, port
        root = tempfile.gettempdir() if len(tempfile.gettempdir()) <= LONGEST_SCRATCH else "/tmp"
        self._scratch = Path(root) / f"trainrt-{run_id}"
        self._nursery: subprocess.Popen[bytes] | None = None

    def start(self, *, cpus: int, gpus: int, grace_seconds: float) -> None:
        """Start all nodes at once; returns while they come up."""
        for name in self._names:
            self._record(name).unlink(missing_ok=True)
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._scratch.mkdir(mode=0o700)
        self._folder.renew_lease()
        Orders(
            nodes=[self._node(name, index, cpus, gpus) for index, name in enumerate(self._names)],
            scratch=str(self._scratch), directory=str(self._folder.path), logs=str(self._run_dir.logs),
            lease=str(self._folder.lease), stop_request=str(self._run_dir.stop_request), port=self._port,
            grace_seconds=grace_seconds,
        ).save(self._folder.orders)  # fmt: skip
        path = os.pathsep.join([str(Path(trainrt.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, **RAY_SETTINGS, **self._authentication(), "PYTHONPATH": path}
        with (self._run_dir.logs / "guards.log").open("w") as log:
            self._nursery = subprocess.Popen(
                [sys.executable, "-m", "trainrt.launch.guard", str(self._folder.orders)],
                env={**environment, "OPENBLAS_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def connect(self, *, check: Callable[[], None], runtime_env: dict[str, Any] | None) -> None:
        """Connect this process, as soon as a raylet is up. `check` may raise to give up."""
        deadline = time.monotonic() + START_SECONDS
        while not any(pid for pid in self.raylets().values()):
            self._check_start(deadline)
            check()
            time.sleep(0.05)
        os.environ.update(self._authentication())
        init(self.address, runtime_env)

    def sites(self, *, check: Callable[[], None]) -> list[Site]:
        """All nodes, once they are up."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            found = {site.name: site for site in self.alive()}
            if len(found) == len(self._names):
                return [found[name] for name in self._names]
            self._check_start(deadline)
            check()
            time.sleep(0.05)

    def alive(self) -> list[Site]:
        """The nodes that Ray holds for alive."""
        import ray

        found = []
        for node in ray.nodes():
            names = [name for name in self._names if f"node_{name}" in node["Resources"]]
            if node["Alive"] and names:
                found.append(Site(names[0], node["NodeID"], node["NodeManagerAddress"]))
        return found

    def raylets(self) -> dict[str, int]:
        """Pids of the raylets that are alive, by node."""
        found = {}
        for name in self._names:
            record = read_json(self._record(name)) or {}
            if record.get("raylet") and alive(record["raylet"]):
                found[name] = record["raylet"]
        return found

    def adoptable(self) -> bool:
        """Whether the guards and the head of an earlier driver are still there."""
        return answers(self.address) and bool(self.raylets())

    def close(self) -> None:
        """End every node and wait until nothing of them is left."""
        disconnect()
        guards = [record["guard"] for name in self._names if (record := read_json(self._record(name)))]
        # The process that forked them, an earlier driver's perhaps, ends after them.
        guards += {nursery for guard in guards if (nursery := nursery_of(guard)) is not None}
        self._folder.lease.unlink(missing_ok=True)
        if self._nursery is not None:
            try:
                self._nursery.wait(CLOSE_SECONDS)
            except subprocess.TimeoutExpired:
                self._nursery.kill()
                self._nursery.wait()
        deadline = time.monotonic() + CLOSE_SECONDS
        while any(alive(guard) for guard in guards) and time.monotonic() < deadline:
            time.sleep(0.02)
        # Guards that were killed have left it.
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _node(self, name: str, index: int, cpus: int, gpus: int) -> NodeOrders:
        scratch = self._scratch / name
        place = ["--head", "--port", str(self._port), "--include-dashboard", "false", "--no-monitor"]
        arguments = [
            *(place if index == 0 else ["--address", self.address]),
            "--node-ip-address", "127.0.0.1", "--disable-usage-stats", "--include-log-monitor", "false",
            "--dashboard-agent-listen-port", "0", "--num-cpus", str(cpus), "--num-gpus", str(gpus),
            "--object-store-memory", str(OBJECT_STORE_BYTES), "--temp-dir", str(scratch),
            "--resources", json.dumps({f"node_{name}": 1000}),
        ]  # fmt: skip
        environment = {}
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(str(index * gpus + gpu) for gpu in range(gpus))
        return NodeOrders(name, arguments, str(scratch), environment)

    def _authentication(self) -> dict[str, str]:
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self._folder.ray_token)}

    def _record(self, name: str) -> Path:
        return self._folder.path / f"{name}.json"

    def _check_start(self, deadline: float) -> None:
        failed = [name for name in self._names if (read_json(self._record(name)) or {}).get("failed")]
        ended = self._nursery is not None and self._nursery.poll() is not None
        if not failed and not ended and time.monotonic() < deadline:
            return
        log = self._run_dir.logs / (f"ray-{failed[0]}.log" if failed else "guards.log")
        said = log.read_text(errors="replace").strip().splitlines()[-5:] if log.exists() else []
        what = f"node {failed[0]}" if failed else "the embedded Ray cluster"
        raise TrainrtError("\n".join([f"{what} did not start; the end of {log}:", *said]))


def nursery_of(guard: int) -> int | None:
    """The process that forked a guard; None where one of them has ended."""
    import psutil

    try:
        parent = psutil.Process(guard).parent()
        return parent.pid if parent is not None and "trainrt.launch.guard" in parent.cmdline() else None
    except psutil.Error:
        return None


class Joined:
    """A cluster that others run: `auto` finds it as Ray does, HOST:PORT names it."""

    def __init__(self, address: str, *, cpus: int, gpus: int, count: int) -> None:
        self.address = address
        self._needs = {"CPU": cpus, "GPU": gpus}
        self._count = count

    def connect(self, *, check: Callable[[], None], runtime_env: dict[str, Any] | None) -> None:
        check()
        host, _, port = self.address.rpartition(":")
        if host and port.isdigit():
            # Ray itself would try for minutes.
            try:
                socket.create_connection((host, int(port)), timeout=5).close()
            except OSError as error:
                raise ConfigError(
                    f'cluster.address = "{self.address}": {error.strerror or error}; '
                    "start a cluster with `ray start --head`, or leave the key out for an embedded one"
                ) from error
        try:
            init(self.address, runtime_env)
        except ConnectionError as error:
            raise ConfigError(
                f'cluster.address = "{self.address}": no running Ray cluster was found; '
                "start one with `ray start --head`, or leave the key out for an embedded one"
            ) from error
        import ray

        self.address = ray.get_runtime_context().gcs_address

    def sites(self, *, check: Callable[[], None]) -> list[Site]:
        """As many nodes with room as the job wants, without names yet; waits a while for those that are still joining."""
        deadline = time.monotonic() + JOIN_SECONDS
        while True:
            found = self.alive()
            if len(found) >= self._count:
                return found[: self._count]
            if time.monotonic() > deadline:
                needs = " and ".join(f"{n} {key}" for key, n in self._needs.items() if n)
                raise ConfigError(
                    f"cluster.nodes + cluster.spare_nodes = {self._count}: the Ray cluster at {self.address} has "
                    f"{len(found)} nodes with {needs} each after {JOIN_SECONDS:.0f} s"
                )
            check()
            time.sleep(0.5)

    def alive(self) -> list[Site]:
        """The nodes that are alive and large enough, in the order of their addresses. They have no names yet."""
        import ray

        fitting = [
            Site("", node["NodeID"], node["NodeManagerAddress"], node.get("Labels", {}).get(RACK_LABEL, ""))
            for node in ray.nodes()
            if node["Alive"] and all(node["Resources"].get(key, 0) >= need for key, need in self._needs.items())
        ]
        return sorted(fitting, key=lambda site: (site.host, site.node_id))

    def raylets(self) -> dict[str, int]:
        """Not this run's processes."""
        return {}

    def adoptable(self) -> bool:
        """Whether the head of an earlier driver is still there."""
        return answers(self.address)

    def close(self) -> None:
        disconnect()


def answers(address: str) -> bool:
    """Whether somebody listens at HOST:PORT."""
    host, _, port = address.rpartition(":")
    with suppress(OSError):
        socket.create_connection((host, int(port)), timeout=2).close()
        return True
    return False


def init(address: str, runtime_env: dict[str, Any] | None) -> None:
    """Connect this process to a Ray cluster, quietly. Ray uploads a local `working_dir` for a whole job only."""
    import ray
    import ray._private.worker as worker
    import ray._raylet as raylet

    with suppress(AttributeError):
        # A process may launch one run after another, each with a token of its own.
        raylet.AuthenticationTokenLoader.instance().reset_cache()  # type: ignore[attr-defined]
    # Ray prints dumps of dead raylets on standard output; what they mean is said as an incident.
    worker.print_to_stdstream = lambda *_, **__: None
    ray.init(
        address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.CRITICAL, configure_logging=False,
        include_dashboard=False, runtime_env=runtime_env,
    )  # fmt: skip


def disconnect() -> None:
    if "ray" in sys.modules:
        import ray

        with suppress(Exception):
            ray.shutdown()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def local_gpus() -> int:
    """GPUs of this machine, without loading a library for it."""
    with suppress(OSError):
        return len(os.listdir("/proc/driver/nvidia/gpus"))
    return 0


Cluster = Embedded | Joined
