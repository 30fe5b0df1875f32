"""What ranks are doing, seen from outside their interpreters: the stack of each, and what all of them say together.

`take` runs on the ranks' node: py-spy reads the interpreter's memory, whoever holds the GIL, and the process may even
be stopped. Where the kernel does not permit that, a signal has faulthandler write the stack into a file. The rest is
pure: ranks with the same stack are one group, and whoever keeps the others waiting is named.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sysconfig
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PY_SPY_SECONDS = 5.0
DUMP_SECONDS = 1.0
STOPPED = "T"
WAITS_FOR_PEERS = re.compile(r"/torch/distributed/|/trainrt/parallel/collectives\.py$")
GATHERS = ("/trainrt/training/engines/native.py", "_gather")
"""On a GPU the step's gather is waited for where its numbers are read."""
WAITS_FOR_STORE = "/trainrt/checkpoint/store/"
STORE_DEPTH = 6
RECORDER = "/trainrt/parallel/recording.py"
BACKWARD = "_engine_run_backward"
DUMPED_FRAME = re.compile(r'^  File "(.+)", line (\d+) in (.+)$')


@dataclass(frozen=True, slots=True)
class Frame:
    """A call of a Python stack."""

    name: str
    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.name} ({self.file.rpartition('/')[2]}:{self.line})"


@dataclass(frozen=True, slots=True)
class Stack:
    """The main thread of a rank, innermost frame first. `state` is the kernel's letter for the process ("T": stopped),
    `source` is py-spy, faulthandler or none (then there are no frames).
    """

    state: str
    frames: tuple[Frame, ...] = ()
    source: str = "none"

    @property
    def stopped(self) -> bool:
        return self.state == STOPPED

    @property
    def waits_for_store(self) -> bool:
        return any(WAITS_FOR_STORE in frame.file for frame in self.frames[:STORE_DEPTH])

    @property
    def waits_for_peers(self) -> bool:
        """Whether it is inside a collective, or waits for one."""
        if not self.frames:
            return False
        top = self.frames[0]
        return bool(WAITS_FOR_PEERS.search(top.file)) or (top.file.endswith(GATHERS[0]) and top.name == GATHERS[1])

    def top(self, count: int = 3) -> str:
        """The innermost frames in one line."""
        return " < ".join(map(str, self.frames[:count])) or "unknown frames"

    def key(self) -> tuple[Any, ...]:
        """Equal for ranks that are at the same place; where inside the collective library is no difference."""
        places = tuple(
            (frame.name, frame.file, 0 if WAITS_FOR_PEERS.search(frame.file) else frame.line) for frame in self.frames
        )
        return self.stopped, places

    def to_json(self) -> dict[str, Any]:
        frames = [[frame.name, frame.file, frame.line] for frame in self.frames]
        return {"state": self.state, "frames": frames, "source": self.source}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Stack:
        frames = tuple(Frame(name, file, line) for name, file, line in document["frames"])
        return cls(document["state"], frames, document["source"])


# Taking a stack.


def take(pid: int, dump: Path) -> Stack:
    """What a process of this node does. `dump` is where its faulthandler writes when it is sent SIGUSR1."""
    state = kernel_state(pid)
    frames = by_py_spy(pid)
    if frames is not None:
        return Stack(state, without_recorder(frames), "py-spy")
    if state not in (STOPPED, ""):
        frames = by_signal(pid, dump)
    return Stack(state, without_recorder(frames), "faulthandler") if frames else Stack(state)


def without_recorder(frames: Sequence[Frame]) -> tuple[Frame, ...]:
    """What stands behind every collective call says nothing of it."""
    return tuple(frame for frame in frames if not frame.file.endswith(RECORDER))


def kernel_state(pid: int) -> str:
    """The kernel's letter for what a process does (R runs, S sleeps, D waits for a device, T is stopped), "" where it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def by_py_spy(pid: int) -> tuple[Frame, ...] | None:
    """The main thread's frames, read without stopping the process (one that is stopped already stays so); None where
    that is not permitted.
    """
    program = shutil.which("py-spy", path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")]))
    if program is None:
        return None
    command = [program, "dump", "--nonblocking", "--json", "--pid", str(pid)]
    try:
        output = subprocess.run(command, capture_output=True, timeout=PY_SPY_SECONDS, check=True).stdout
        return frames_of(json.loads(output), pid)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def frames_of(threads: Sequence[Mapping[str, Any]], pid: int) -> tuple[Frame, ...] | None:
    """The main thread's frames of py-spy's document. A backward pass that runs in autograd's own thread is put on top."""
    by_thread = {
        thread["os_thread_id"]: tuple(
            Frame(frame["name"], frame["filename"], int(frame["line"])) for frame in thread["frames"]
        )
        for thread in threads
    }
    main = by_thread.pop(pid, None)
    if main and main[0].name == BACKWARD:
        beside = [frames for frames in by_thread.values() if any("/torch/" in frame.file for frame in frames)]
        return (*(beside[0] if beside else ()), *main)
    return main


def by_signal(pid: int, dump: Path) -> tuple[Frame, ...] | None:
    """Have the process's faulthandler write its stacks (its handler needs no GIL); None where it has none."""
    try:
        if not _catches(pid, signal.SIGUSR1):
            return None
        before = dump.stat().st_size
        os.kill(pid, signal.SIGUSR1)
        deadline, last = time.monotonic() + DUMP_SECONDS, before
        while time.monotonic() < deadline:
            time.sleep(0.05)
            size = dump.stat().st_size
            if size > before and size == last:
                with dump.open("rb") as file:
                    file.seek(before)
                    return dumped_frames(file.read().decode(errors="replace"))
            last = size
    except OSError:
        return None
    return None


def dumped_frames(text: str) -> tuple[Frame, ...]:
    """The main thread's frames of faulthandler's text: the oldest thread comes last."""
    found = []
    for line in text.rpartition("hread 0x")[2].splitlines():
        matched = DUMPED_FRAME.match(line)
        if matched:
            found.append(Frame(matched[3], matched[1], int(matched[2])))
    return tuple(found)


def _catches(pid: int, number: int) -> bool:
    """Whether a process has a handler of its own for a signal: without one it would die of it."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


# What the stacks of all ranks say together.


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks that are at the same place."""

    ranks: tuple[int, ...]
    stack: Stack


@dataclass(frozen=True, slots=True)
class Finding:
    """`culprits` keep the others waiting; none where no rank differs. `cause` is stopped, elsewhere (than in a
    collective, where the others wait), minority (in another collective than most), alike, store (ranks wait for
    their store, which is no fault of theirs), or matched (named by their collective calls instead).
    """

    culprits: tuple[int, ...]
    cause: str
    groups: tuple[Group, ...]

    def places(self) -> dict[int, str]:
        """The innermost frames of each rank."""
        return {rank: one.stack.top() for one in self.groups for rank in one.ranks if one.stack.frames}


def group(stacks: Mapping[int, Stack]) -> tuple[Group, ...]:
    """Ranks by stack, the largest group first."""
    together: dict[tuple[Any, ...], list[int]] = {}
    for rank in sorted(stacks):
        together.setdefault(stacks[rank].key(), []).append(rank)
    made = [Group(tuple(ranks), stacks[ranks[0]]) for ranks in together.values()]
    return tuple(sorted(made, key=lambda one: (-len(one.ranks), one.ranks)))


def find_culprits(stacks: Mapping[int, Stack]) -> Finding:
    """Who keeps whom waiting: a stopped rank; else those outside of a collective while others are in one; else the
    minority. Where all are alike, or two groups equally large, nobody can be told from the others.
    """
    groups = group(stacks)
    stopped = tuple(sorted(rank for rank, stack in stacks.items() if stack.stopped))
    if stopped:
        return Finding(stopped, "stopped", groups)
    elsewhere = tuple(sorted(rank for rank, stack in stacks.items() if not stack.waits_for_peers))
    storing = [rank for rank in elsewhere if stacks[rank].waits_for_store]
    if storing and len(storing) == len(elsewhere):
        return Finding(tuple(storing), "store", groups)
    elsewhere = tuple(rank for rank in elsewhere if rank not in storing)
    if elsewhere and len(elsewhere) < len(stacks):
        return Finding(elsewhere, "elsewhere", groups)
    if len(groups) > 1 and len(groups[0].ranks) > len(groups[1].ranks):
        return Finding(tuple(sorted(set(stacks) - set(groups[0].ranks))), "minority", groups)
    return Finding((), "alike", groups)


def render(title: str, finding: Finding) -> str:
    """The stacks of all ranks as a page of text, one section per group, culprits first."""
    sections = [title, ""]
    for one in sorted(finding.groups, key=lambda one: not set(one.ranks) & set(finding.culprits)):
        state = f"state {one.stack.state or 'unknown'}{' (stopped)' if one.stack.stopped else ''}"
        role = "culprit" if set(one.ranks) & set(finding.culprits) else "waits" if finding.culprits else "blocked"
        sections.append(f"rank{'s' if len(one.ranks) > 1 else ''} {', '.join(map(str, one.ranks))}: {role}, {state}")
        sections += [f"    {frame.name} ({frame.file}:{frame.line})" for frame in one.stack.frames]
        if not one.stack.frames:
            sections.append("    no frames: neither py-spy nor a signal could read them")
        sections.append(f"    [{one.stack.source}]")
        sections.append("")
    return "\n".join(sections)
