"""The driver from a request on standard input: `--detach` (a daemon, and a command that returns once the run is under way),
and the successor of a driver that lost its Ray head."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import trainrt
from trainrt.launch.request import Request, from_document, look_back, to_document

UNDER_WAY = ("running", "finished")


def run_detached(request: Request) -> int:
    """Start the driver; return 0 once steps are completed, or the driver's exit code where it ended before."""
    request.run_dir.create()
    request.run_dir.lock()
    try:
        look_back(request)
    finally:
        request.run_dir.unlock()
    log = request.run_dir.logs / "driver.log"
    shown = log.stat().st_size if log.exists() else 0
    started = time.time()
    path = os.pathsep.join([str(Path(trainrt.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    with log.open("a") as output:
        driver = subprocess.Popen(
            [sys.executable, "-m", "trainrt.launch.detached"],
            stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True,
            env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
    assert driver.stdin is not None
    driver.stdin.write(to_document(request).encode())
    driver.stdin.close()
    while driver.poll() is None:
        status = request.run_dir.read_status()
        if status is not None and status["state"] in UNDER_WAY and status["time"] > started:
            print(f"driver {driver.pid} runs in the background; its output: {log}")
            print(f"trainrt status {request.run_dir}\ntrainrt stop {request.run_dir}")
            return 0
        time.sleep(0.1)
    with log.open() as output:
        output.seek(shown)
        sys.stderr.write(output.read())
    return driver.returncode


def main() -> int:
    """Read the request from standard input and be the driver."""
    from trainrt.errors import TrainrtError
    from trainrt.launch.driver import run

    request = from_document(sys.stdin.read())
    try:
        return run(request)
    except TrainrtError as error:
        print(f"trainrt: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
