"""Many seeded kills of conversions, and many flipped bits and truncations of a checkpoint.

    python -m tests.checkpoint.campaign [--kills 100] [--flips 1000] [--seed 0] [--write]

Every conversion is killed with SIGKILL in one of its phases, and given again: what comes out must be the same each time, and no
unit that was noted is done again. Every flip must be found by `verify`, and by whoever opens and reads the checkpoint. `--write`
puts the tables into docs/checkpoint.md.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.checkpoint.frameworks import llama
from trainrt.checkpoint import convert, writer
from trainrt.checkpoint.formats import open_any
from trainrt.checkpoint.inspect import verify
from trainrt.checkpoint.journal import Journal
from trainrt.checkpoint.source import digest
from trainrt.checkpoint.targets import Shape, files
from trainrt.errors import CheckpointError

ROOT = Path(__file__).parents[2]
PAGE, BEGIN, END = ROOT / "docs" / "checkpoint.md", "<!-- campaign -->", "<!-- end of campaign -->"
PHASES = ("planning", "preparing", "units", "sealing", "naming")
JOBS = 2
TARGETS = {
    "universal": Shape(), "hf": Shape(), "deepspeed": Shape(world=2, zero_stage=3), "deepspeed-universal": Shape(),
    "dcp": Shape(),
}  # fmt: skip
UNIT_BYTES = 4096


def killed_in(phase: str, moment: int) -> None:
    """From now on this process and its jobs end with SIGKILL at the given moment of a phase of a conversion."""

    def kill(*_: Any) -> None:
        os.kill(parent, signal.SIGKILL)

    def after(function: Callable[..., Any], counts: list[int], *, first: bool) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            counts[0] += 1
            if first and counts[0] > moment:
                kill()
            result = function(*arguments, **named)
            if not first and counts[0] > moment:
                kill()
            return result

        return counted

    parent, counts = os.getpid(), [0]
    if phase == "planning":
        convert.make_target = after(convert.make_target, [moment], first=bool(moment % 2))
    elif phase == "preparing":
        for owner in (writer.os, files.os):
            owner.posix_fallocate = after(os.posix_fallocate, counts, first=True)
    elif phase == "units":
        convert.write_range = after(convert.write_range, counts, first=bool(moment % 2))
    elif phase == "sealing":
        for owner in (writer, files):
            owner.sync = after(owner.sync, counts, first=True)
    else:
        convert.os.replace = after(os.replace, [moment], first=bool(moment % 2))


def convert_until_killed(source: Path, target: Path, to: str, phase: str, moment: int) -> None:
    """In a process of its own."""
    killed_in(phase, moment)
    convert.convert(source, target, to=to, shape=TARGETS[to], jobs=JOBS)


@contextmanager
def small_units() -> Iterator[None]:
    """Units so small that a tiny model has many."""
    before = writer.CHUNK_BYTES, files.CHUNK_BYTES
    writer.CHUNK_BYTES = files.CHUNK_BYTES = UNIT_BYTES
    try:
        yield
    finally:
        writer.CHUNK_BYTES, files.CHUNK_BYTES = before


class Kills:
    """Conversions that are killed, and go on. `hit`: how often in which phase."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder, self._random = folder, random.Random(seed)
        self._source = folder / "hf"
        llama().save_pretrained(self._source)
        self.hit: Counter[tuple[str, str]] = Counter()

    def play(self, kills: int) -> None:
        with small_units():
            for number in range(kills):
                self._once(PHASES[number % len(PHASES)], self._random.choice(list(TARGETS)))

    def _once(self, phase: str, to: str) -> None:
        """Kills until one has met the phase, then the same command to its end."""
        target = self._folder / "target"
        moment = self._random.randrange({"units": 10, "sealing": 4, "preparing": 1}.get(phase, 2))
        context = multiprocessing.get_context("fork")
        child = context.Process(target=convert_until_killed, args=(self._source, target, to, phase, moment))
        child.start()
        child.join()
        if child.exitcode == -signal.SIGKILL:
            self.hit[phase, to] += 1
        work = self._folder / ".target.converting"
        noted = self._noted(work)
        seen: list[tuple[int, int]] = []
        document = convert.convert(
            self._source, target, to=to, shape=TARGETS[to], jobs=JOBS, progress=lambda *at: seen.append(at)
        )
        # Nothing is reported of a target that was there already, under its name.
        assert not seen or seen[0][0] == noted, (phase, to, seen[0], noted)
        assert document["bytes_written"] <= document["bytes_read"] and not work.exists()
        assert digest(open_any(target).source) == self._expected()
        shutil.rmtree(target)

    def _noted(self, work: Path) -> int:
        journal = work / "journal.jsonl"
        return len(Journal(journal, "").read()) if journal.exists() else 0

    def _expected(self) -> dict[Any, str]:
        return digest(open_any(self._source).source)

    def table(self) -> str:
        rows = [f"| killed while | {' | '.join(TARGETS)} | all |", "|---|" + "---|" * (len(TARGETS) + 1)]
        for phase in PHASES:
            counts = [self.hit[phase, to] for to in TARGETS]
            rows.append(f"| {phase} | {' | '.join(map(str, counts))} | {sum(counts)} |")
        return "\n".join(rows)


class Flips:
    """Single bits and ends of files that change, each alone."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._random = random.Random(seed)
        llama(dtype="bfloat16").save_pretrained(folder / "model")
        convert.convert(folder / "model", folder / "zero", to="deepspeed", shape=Shape(world=2))
        self._checkpoint = folder / "checkpoint"
        convert.convert(folder / "zero", self._checkpoint, to="universal")
        self.found: Counter[tuple[str, str]] = Counter()

    def play(self, flips: int) -> None:
        places = sorted(path for path in self._checkpoint.rglob("*") if path.is_file())
        for _ in range(flips):
            path = self._random.choice(places)
            sound = path.read_bytes()
            kind = self._random.choice(("flip", "flip", "flip", "truncation"))
            at = self._random.randrange(len(sound))
            changed = sound[:at]
            if kind == "flip":
                changed += bytes([sound[at] ^ 1 << self._random.randrange(8)]) + sound[at + 1 :]
            path.write_bytes(changed)
            assert not verify(self._checkpoint)["ok"], (path, kind, at)
            assert self._refused(), (path, kind, at)
            path.write_bytes(sound)
            self.found[path.suffix.lstrip(".") or path.name, kind] += 1
        assert verify(self._checkpoint)["ok"]

    def _refused(self) -> bool:
        try:
            digest(open_any(self._checkpoint).source)
        except CheckpointError:
            return True
        return False

    def table(self) -> str:
        kinds = sorted({suffix for suffix, _ in self.found})
        rows = [f"| | {' | '.join(kinds)} | all |", "|---|" + "---|" * (len(kinds) + 1)]
        for kind in ("flip", "truncation"):
            counts = [self.found[suffix, kind] for suffix in kinds]
            rows.append(f"| {kind} | {' | '.join(map(str, counts))} | {sum(counts)} |")
        return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kills, flips = Kills(Path(folder), options.seed), Flips(Path(folder), options.seed)
        kills.play(options.kills)
        flips.play(options.flips)
    command = (
        f"python -m tests.checkpoint.campaign --kills {options.kills} --flips {options.flips} --seed {options.seed}"
    )
    text = (
        f"`{command}`: every conversion that was killed went on and ended with the same digests; all flips and truncations "
        f"were found.\n\n{kills.table()}\n\n{flips.table()}"
    )
    print(text)
    if options.write:
        page = PAGE.read_text()
        PAGE.write_text(f"{page.split(BEGIN)[0]}{BEGIN}\n{text}\n{END}{page.split(END)[1]}")


if __name__ == "__main__":
    main()
