"""`trainrt status`, `stop` and `evict`: over files of the run directory, so from any host that shares it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from trainrt.errors import RunDirError, TrainrtError, nearest
from trainrt.launch.record import Folder, Record
from trainrt.run_dir import RunDir, replace

STOP_SECONDS = 600.0
SIGN_OF_LIFE_SECONDS = 10.0
LIVE_STATES = ("starting", "running", "diagnosing", "recovering")


def status(path: str | Path) -> dict[str, Any]:
    """status.json, with `live` (a driver holds the directory), the last metrics line and the incidents' number.

    Raises RunDirError where there is no run.
    """
    run_dir = existing(path)
    document = run_dir.read_status()
    assert document is not None
    live = run_dir.locked()
    if not live and document["state"] in LIVE_STATES:
        document["message"] = (
            "the driver is gone; agents and stores wait for the same `trainrt launch`, "
            "which goes on from memory, or later from the newest checkpoint"
            if Folder(run_dir).record.exists()
            else "the driver is gone; the same `trainrt launch` goes on from the newest checkpoint"
        )
    metrics = run_dir.read_metrics()
    return {
        **document, "live": live, "last": metrics[-1] if metrics else None, "incidents": len(run_dir.read_incidents()),
    }  # fmt: skip


def stop(path: str | Path, *, timeout_seconds: float = STOP_SECONDS) -> str:
    """Ask a run to end with a checkpoint, and wait until it has. Returns what became of it.

    Where the driver is dead and its agents wait for another one, they are ended. Raises RunDirError
    where there is no run, TrainrtError where it does not end in time.
    """
    run_dir = existing(path)
    folder = Folder(run_dir)
    live = run_dir.locked()
    if not live and not folder.record.exists():
        return f"{run_dir} is not running"
    run_dir.stop_request.touch()
    deadline = time.monotonic() + timeout_seconds
    while run_dir.locked() or (not live and leftovers(folder)):
        if time.monotonic() > deadline:
            raise TrainrtError(f"{run_dir} did not stop within {timeout_seconds:.0f} s; it goes on trying")
        time.sleep(0.1)
    run_dir.stop_request.unlink(missing_ok=True)
    document = run_dir.read_status() or {}
    if not live:
        _end_stores(folder)
        folder.forget_cluster()
        return f"{run_dir}: what a dead driver had left behind is ended; the newest checkpoint stays"
    return f"{run_dir}: {document.get('state')} at step {document.get('step')}"


def evict(path: str | Path, host: str) -> str:
    """Ask a run to go on without a host, after the step that it is at. Returns what was asked.

    Raises RunDirError where there is no run, where none is live, or where it has no such host.
    """
    run_dir = existing(path)
    if not run_dir.locked():
        raise RunDirError(f"{run_dir} is not running: there is nothing to evict {host} from")
    processes = (run_dir.read_cluster() or {"processes": []})["processes"]
    hosts = sorted({process["node"] for process in processes if process["role"] == "agent"})
    if host not in hosts:
        raise RunDirError(f"{host}: no host of {run_dir}; allowed: {', '.join(hosts)}{nearest(host, hosts)}")
    replace(run_dir.evict_request, host)
    return f"{run_dir}: goes on without {host} after this step; incidents.jsonl says when it has"


def _end_stores(folder: Folder) -> None:
    """Agents end their stores; where an agent was killed, too, its store is ended from here."""
    from trainrt.launch.stores import end_stores, sweep_memory

    record = Record.load(folder)
    if record is not None:
        end_stores(record.stores, secret=folder.secret.read_text())
        sweep_memory(record.run_id)


def leftovers(folder: Folder) -> bool:
    """Whether agents or guards of a dead driver still wait: each touches a file of its own while it lives."""
    signs = [*folder.path.glob("agent-*"), *folder.path.glob("n*.json")]
    return any(time.time() - sign.stat().st_mtime < SIGN_OF_LIFE_SECONDS for sign in signs if sign.exists())


def existing(path: str | Path) -> RunDir:
    run_dir = RunDir(path)
    if run_dir.read_status() is None:
        raise RunDirError(f"{path}: no run is here (no status.json)")
    return run_dir
