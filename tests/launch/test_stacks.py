"""Stacks from outside, and who is named by them; and what silence counts as a hang."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from trainrt.launch import stacks
from trainrt.launch.hangs import FEW, STARTING_SECONDS, STORE_SECONDS, Ask, Verdict, Watch
from trainrt.launch.stacks import Frame, Stack, find_culprits, render

PROGRAM = """
import ctypes, faulthandler, signal, sys, threading, time
faulthandler.register(signal.SIGUSR1, file=open(sys.argv[1], "a"), all_threads=True)
threading.Thread(target=lambda: time.sleep(600), daemon=True).start()

def innermost():
    print("up", flush=True)
    while True:
        ctypes.PyDLL(None).sleep(600)

def outer():
    innermost()

outer()
"""


@pytest.fixture
def stuck(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """A process that sleeps in C code with the GIL held, and where it dumps its stacks."""
    dump = tmp_path / "dump"
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    process = subprocess.Popen([sys.executable, str(program), str(dump)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"up\n"
    try:
        yield process.pid, dump
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_py_spy_sees_through_a_held_gil_and_through_a_stop(stuck: tuple[int, Path]) -> None:
    pid, dump = stuck
    taken = stacks.take(pid, dump)
    assert (taken.source, [frame.name for frame in taken.frames[:2]]) == ("py-spy", ["innermost", "outer"])
    assert not taken.stopped and dump.read_text() == ""
    os.kill(pid, signal.SIGSTOP)
    until(lambda: stacks.kernel_state(pid) == "T")
    taken = stacks.take(pid, dump)
    assert taken.stopped and taken.frames[0].name == "innermost"
    assert stacks.kernel_state(pid) == "T", "looking does not wake it"


def test_a_signal_has_faulthandler_write_them_whoever_holds_the_gil(stuck: tuple[int, Path]) -> None:
    pid, dump = stuck
    for _ in range(2):
        frames = stacks.by_signal(pid, dump)
        assert frames is not None and [frame.name for frame in frames[:2]] == ["innermost", "outer"]


def test_a_process_without_a_handler_is_not_signalled_and_a_dead_one_is_no_error(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"],
                               stdout=subprocess.PIPE)  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == b"up\n"
    try:
        assert stacks.by_signal(process.pid, tmp_path / "none") is None
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert stacks.take(process.pid, tmp_path / "none") == Stack("")


# Who is named.

GATHER = Stack(
    "S", (Frame("all_reduce", "/x/torch/distributed/distributed_c10d.py", 3252), Frame("run", "/x/loop.py", 9))
)
RECEIVE = Stack("S", (Frame("recv", "/x/torch/distributed/distributed_c10d.py", 2799), Frame("run", "/x/loop.py", 9)))
COMPUTE = Stack("R", (Frame("loss", "/x/mine.py", 4), Frame("run", "/x/loop.py", 9)))
STORE = Stack("S", (Frame("recv", "/x/trainrt/checkpoint/store/protocol.py", 4), Frame("run", "/x/loop.py", 9)))


@pytest.mark.parametrize(
    ("found", "culprits", "cause"),
    [
        ([GATHER, Stack("T", GATHER.frames), GATHER], (1,), "stopped"),
        ([GATHER, COMPUTE], (1,), "elsewhere"),
        ([COMPUTE, GATHER, COMPUTE], (0, 2), "elsewhere"),
        ([GATHER, GATHER, RECEIVE], (2,), "minority"),
        ([GATHER, RECEIVE], (), "alike"),
        ([GATHER, GATHER], (), "alike"),
        ([COMPUTE, COMPUTE, COMPUTE], (), "alike"),
        ([GATHER, STORE, GATHER], (1,), "store"),
        ([COMPUTE, STORE, GATHER], (0,), "elsewhere"),
        ([GATHER, Stack("T", STORE.frames)], (1,), "stopped"),
    ],
)
def test_who_keeps_the_others_waiting(found: list[Stack], culprits: tuple[int, ...], cause: str) -> None:
    result = find_culprits(dict(enumerate(found)))
    assert (result.culprits, result.cause) == (culprits, cause)


def test_lines_inside_the_collective_library_make_no_difference_others_do() -> None:
    line = Frame("all_reduce", GATHER.frames[0].file, 3260)
    assert len(stacks.group({0: GATHER, 1: Stack("S", (line, GATHER.frames[1]))})) == 1
    assert len(stacks.group({0: GATHER, 1: Stack("S", (GATHER.frames[0], Frame("run", "/x/loop.py", 10)))})) == 2


def test_what_records_calls_is_no_place() -> None:
    recorder = Frame("wait", f"/x{stacks.RECORDER}", 5)
    assert stacks.without_recorder((recorder, *GATHER.frames)) == GATHER.frames


def test_a_backward_pass_in_a_thread_of_its_own_is_part_of_the_stack() -> None:
    def thread(number: int, *names: tuple[str, str]) -> dict[str, Any]:
        frames = [{"name": name, "filename": file, "line": 1} for name, file in names]
        return {"os_thread_id": number, "frames": frames}

    threads = [
        thread(11, ("recv", "/lib/socket.py")),
        thread(12, ("wait", "/x/torch/distributed/fsdp/f.py")),
        thread(10, ("_engine_run_backward", "/x/torch/autograd/graph.py"), ("run", "/x/loop.py")),
    ]
    frames = stacks.frames_of(threads, 10)
    assert frames is not None and [frame.name for frame in frames] == ["wait", "_engine_run_backward", "run"]


def test_the_page_shows_culprits_first() -> None:
    text = render("title", find_culprits({0: GATHER, 1: GATHER, 2: COMPUTE, 3: GATHER}))
    assert text.index("rank 2: culprit, state R") < text.index("ranks 0, 1, 3: waits, state S")
    assert "    loss (/x/mine.py:4)" in text


# What silence counts.


class Scene:
    """A watch, a clock, and ranks that speak when told to."""

    def __init__(self, ranks: int = 2, *, least: float = 3.0) -> None:
        self.now, self.ranks = 100.0, ranks
        self.watch = Watch(least_seconds=least)
        self.begin()

    def begin(self) -> None:
        self.watch.begin(dict.fromkeys(range(self.ranks), "n0"), self.now)

    def say(self, op: str, *ranks: int, **fields: Any) -> None:
        for rank in ranks or range(self.ranks):
            self.watch.heard(rank, {"op": op, **fields}, self.now)

    def come_up(self, first: float = 1.0) -> None:
        self.say("phase", name="restore", seconds=0.1)
        assert self.go(first) is None
        self.say("phase", name="first_step", seconds=first)
        self.say("step")

    def steps(self, count: int, seconds: float) -> None:
        for _ in range(count):
            assert self.go(seconds) is None
            self.say("step")

    def go(self, seconds: float, *, answers: bool = True) -> Ask | Verdict | None:
        """Let time pass until something is found."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(self.now + 0.1, end)
            found = self.watch.look(self.now, completed=7, agents_answer=answers)
            if found is not None:
                return found
        return None

    def hang(self, seconds: float, **stack: Stack) -> Verdict | None:
        """Go until stacks are asked for, give them, and go on."""
        asked = self.go(seconds)
        if not isinstance(asked, Ask):
            return None
        self.watch.stacks(asked.number, {int(name[1:]): each for name, each in stack.items()})
        found = self.go(seconds)
        assert not isinstance(found, Ask)
        return found


def test_a_silence_is_a_hang_after_three_seconds_or_three_slow_steps() -> None:
    for seconds, limit in ((0.1, 3.0), (4.0, 12.0)):
        scene = Scene()
        scene.come_up(first=seconds)
        scene.steps(30, seconds)
        assert scene.watch.limit() == pytest.approx(limit)
        found = scene.hang(limit, r0=GATHER, r1=COMPUTE)
        assert found is not None and found.hang.ranks == (1,)
        assert 0.8 * limit < found.hang.seconds <= limit
        assert (
            "rank 1 (n0) made no progress" in found.hang.message
            and "after step 7: in loss (mine.py:4)" in found.hang.message
        )


def test_one_slow_step_in_a_hundred_is_allowed_for_and_few_are_not_trusted() -> None:
    scene = Scene()
    scene.come_up(first=6.0)
    scene.steps(FEW - 1, 0.1)
    assert scene.watch.limit() == pytest.approx(18.0)
    scene.steps(1, 0.1)
    assert scene.watch.limit() == 3.0
    scene.steps(200, 0.1)
    scene.steps(2, 1.5)
    assert scene.watch.limit() == 3.0
    scene.steps(1, 1.5)
    assert scene.watch.limit() == pytest.approx(4.5)


def test_without_stacks_it_is_declared_at_the_limit() -> None:
    scene = Scene()
    scene.come_up()
    scene.steps(20, 0.1)
    assert isinstance(scene.go(3.0), Ask)
    found = scene.go(3.0)
    assert isinstance(found, Verdict) and found.hang.ranks == (0, 1)
    assert found.hang.seconds == pytest.approx(3.0, abs=0.15)


def test_a_sign_of_life_ends_the_suspicion() -> None:
    scene = Scene()
    scene.come_up()
    scene.steps(20, 0.1)
    assert isinstance(scene.go(2.5), Ask)
    scene.say("step")
    assert scene.go(1.5) is None


def test_long_phases_have_limits_of_their_own() -> None:
    scene = Scene()
    assert scene.watch.limit() == STARTING_SECONDS
    scene.come_up(first=2.0)
    scene.steps(20, 2.0)
    scene.say("busy", 0, name="evaluation", worth=4.0)
    assert scene.watch.limit() == pytest.approx(3 * 2.0 * 4), "the peer that waits for it has the same limit"
    scene.steps(1, 2.0)
    assert scene.watch.limit() == pytest.approx(6.0)
    scene.say("busy", 1, name="checkpoint", worth=1.0)
    assert scene.watch.limit() == math.inf and scene.go(500) is None
    scene.begin()
    scene.say("phase", name="restore", seconds=1.0)
    assert scene.watch.limit() == pytest.approx(10.0), "the first step of another incarnation, by the one before"


def test_another_number_of_ranks_is_another_job() -> None:
    scene = Scene(4)
    scene.come_up()
    scene.steps(20, 0.1)
    scene.ranks = 1
    scene.begin()
    scene.say("phase", name="restore", seconds=1.0)
    assert scene.watch.limit() == STARTING_SECONDS


def test_time_in_which_nothing_was_heard_because_nobody_listened_does_not_count() -> None:
    scene = Scene()
    scene.come_up()
    scene.steps(20, 0.1)
    scene.now += 60.0
    assert scene.go(0.3) is None, "this process was paused"
    assert scene.go(60.0, answers=False) is None, "an agent did not answer"
    scene.say("step")
    assert scene.watch.limit() == 3.0, "nor is it held for a slow step"


def test_a_stopped_process_is_a_hang_in_any_phase() -> None:
    scene = Scene()
    scene.watch.stopped(1, True, scene.now)
    found = scene.hang(3.0, r0=COMPUTE, r1=Stack("T", COMPUTE.frames))
    assert found is not None and found.hang.ranks == (1,) and found.hang.signature is None
    scene = Scene()
    scene.go(100.0)
    scene.watch.stopped(1, True, scene.now)
    found = scene.hang(3.0, r0=COMPUTE, r1=Stack("T", COMPUTE.frames))
    assert found is not None and found.hang.seconds <= 3.0, "it was not stopped before"
    scene = Scene()
    scene.watch.stopped(1, True, scene.now)
    assert isinstance(scene.go(2.0), Ask)
    scene.watch.stopped(1, False, scene.now)
    assert scene.go(5.0) is None


def test_ranks_that_wait_for_their_store_are_given_the_time_it_takes_once() -> None:
    scene = Scene()
    scene.come_up()
    scene.steps(20, 0.1)
    assert scene.hang(3.0, r0=STORE, r1=GATHER) is None
    assert scene.watch.limit() == pytest.approx(3.0 + STORE_SECONDS)
    found = scene.hang(STORE_SECONDS, r0=STORE, r1=GATHER)
    assert found is not None and found.hang.ranks == (0,)


def test_a_stopped_store_counts_as_dead_after_the_same_time() -> None:
    scene = Scene()
    assert not scene.watch.store_stopped("n0", True)
    scene.go(1.0)
    assert not scene.watch.store_stopped("n0", False)
    assert not scene.watch.store_stopped("n0", True)
    scene.go(2.8)
    assert scene.watch.store_stopped("n0", True)


def test_the_same_hang_has_the_same_signature_and_zero_seconds_turn_the_watch_off() -> None:
    signatures = set()
    for _ in range(2):
        scene = Scene()
        scene.come_up()
        scene.steps(20, 0.1)
        found = scene.hang(3.0, r0=GATHER, r1=COMPUTE)
        assert found is not None
        signatures.add(found.hang.signature)
    assert len(signatures) == 1 and None not in signatures
    scene = Scene(least=0.0)
    scene.come_up()
    scene.steps(20, 0.1)
    scene.watch.stopped(1, True, scene.now)
    assert scene.go(1000.0) is None
