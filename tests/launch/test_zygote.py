"""The zygote: real forks, exits and orphans. Its workers here are tiny functions instead of a trainer."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.launch.runs import alive, environment


def obey(connection: socket.socket) -> None:
    """A worker: exits with the code it is told, or waits."""
    print("hello from the worker", flush=True)
    word = connection.recv(100).decode()
    if word:
        sys.exit(int(word))
    time.sleep(60)


class Zygote:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control.settimeout(20)
        words = ["--control", str(theirs.fileno()), "--entry", "tests.launch.test_zygote:obey"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "trainrt.launch.zygote", *words], pass_fds=[theirs.fileno()], env=environment()
        )
        theirs.close()

    def hear(self) -> dict[str, Any]:
        return json.loads(self.control.recv(65536))

    def fork(self, rank: int) -> tuple[int, socket.socket]:
        ours, theirs = socket.socketpair()
        order = json.dumps({"op": "fork", "rank": rank, "log": str(self.folder / f"{rank}.log")}).encode()
        socket.send_fds(self.control, [order], [theirs.fileno()])
        theirs.close()
        answer = self.hear()
        assert (answer["op"], answer["rank"]) == ("forked", rank)
        return answer["pid"], ours


@pytest.fixture
def zygote(tmp_path: Path) -> Iterator[Zygote]:
    zygote = Zygote(tmp_path)
    assert zygote.hear()["op"] == "ready"
    yield zygote
    zygote.control.close()
    zygote.process.wait(10)


def test_a_worker_writes_to_its_log_and_its_exit_code_is_told(zygote: Zygote, tmp_path: Path) -> None:
    pid, connection = zygote.fork(3)
    connection.send(b"7")
    assert zygote.hear() == {"op": "exited", "pid": pid, "code": 7}
    assert (tmp_path / "3.log").read_text() == "hello from the worker\n"


def test_a_killed_worker_is_told_with_its_signal_and_others_stay(zygote: Zygote) -> None:
    first, _first_line = zygote.fork(0)
    second, _second_line = zygote.fork(1)
    os.kill(first, 9)
    assert zygote.hear() == {"op": "exited", "pid": first, "code": -9}
    assert alive(second)


def test_it_forks_with_one_thread(zygote: Zygote) -> None:
    assert len(os.listdir(f"/proc/{zygote.process.pid}/task")) == 1


def test_without_its_agent_it_ends_and_its_workers_too(zygote: Zygote) -> None:
    pid, _line = zygote.fork(0)
    zygote.control.close()
    assert zygote.process.wait(10) == 0
    assert not alive(pid)
