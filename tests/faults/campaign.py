"""Many seeded random kills in one run, whose end must be that of an undisturbed one, bit for bit.

    python -m tests.faults.campaign [--kills 200] [--seed 0] [--write]

Four nodes with one worker each, P+Q parity (2 + 2). Prints a table by kind of fault; `--write` puts it into docs/recovery.md.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.faulty import FaultyRun, compare_with_undisturbed
from tests.launch.runs import REPOSITORY

NODES, PARITY = 4, 2
EXPECTED = ("worker_exit", "store_loss", "driver_loss")
PAGE = REPOSITORY / "docs" / "recovery.md"
BEGIN, END = "<!-- campaign -->", "<!-- end of campaign -->"


class Campaign:
    """One run, and a stream of faults from a seed."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.run = FaultyRun(folder, nodes=NODES, spares=0, m=PARITY)
        self.incidents: dict[str, list[dict[str, Any]]] = defaultdict(list)

    def faults(self) -> dict[str, Callable[[], None]]:
        places = ("forward", "collective", "optimizer", "copy")
        return {
            **{f"worker in {place}": lambda place=place: self.run.order(place, self.rank()) for place in places},
            "worker at any moment": lambda: self.kill(workers=1),
            "two workers": lambda: self.kill(workers=2),
            "store": lambda: self.kill(stores=1),
            "worker and store of a node": lambda: self.kill(workers=1, stores=1),
            "workers and stores of two nodes": lambda: self.kill(workers=2, stores=2),
            "driver": self.kill_driver,
        }

    def rank(self) -> int:
        return self.random.randrange(NODES)

    def kill(self, *, workers: int = 0, stores: int = 0) -> None:
        """SIGKILL stores and workers of the same nodes at once, after a random moment within a step or two."""
        ranks = self.random.sample(range(NODES), max(workers, stores))
        time.sleep(self.random.uniform(0.0, 0.1))
        pids = [self.run.pids("store")[self.run.seat(rank), None] for rank in ranks[:stores]]
        pids += [self.run.pids("worker")[self.run.seat(rank), rank] for rank in ranks[:workers]]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    def kill_driver(self) -> None:
        self.run.signal(signal.SIGKILL)
        self.run.wait()
        self.run.launch()

    def play(self, kills: int) -> None:
        kinds = self.faults()
        weights = [0.3 if kind == "driver" else 1.0 for kind in kinds]
        for number in range(kills):
            seen, _ = self.run.fault()
            kind = self.random.choices(list(kinds), weights)[0]
            kinds[kind]()
            self.run.incident(seen)
            self.run.settled()
            found = self.run.lines("incidents")[seen:]
            print(
                f"{number + 1:4d} {kind}: " + ", ".join(f"{i['kind']} from {i['restored_from']}" for i in found),
                flush=True,
            )
            strange = [incident["message"] for incident in found if incident["kind"] not in EXPECTED]
            print("".join(f"     {message}\n" for message in strange), end="", flush=True)
            assert all(incident["steps_lost"] <= 1 for incident in found), found
            assert all(incident["restored_from"] in ("memory", "parity", "none") for incident in found), found
            self.incidents[kind] += found

    def table(self) -> str:
        rows = ["| fault | incidents | restored from | most steps done again | seconds to the next step (median, most) |",
                "|---|---|---|---|---|"]  # fmt: skip
        for kind, found in sorted(self.incidents.items()):
            seconds = [incident["recovered_seconds"] for incident in found if incident["recovered_seconds"] is not None]
            sources = sorted({i["restored_from"] for i in found if i["restored_from"] != "none"}) or [
                "nothing to restore"
            ]
            lost = max(incident["steps_lost"] for incident in found)
            took = f"{statistics.median(seconds):.2f}, {max(seconds):.2f}" if seconds else "-"
            rows.append(f"| {kind} | {len(found)} | {', '.join(sources)} | {lost} | {took} |")
        return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(Path(folder), options.seed)
        run = campaign.run
        run.launch()
        try:
            run.until_step(5)
            campaign.play(options.kills)
            run.signal(signal.SIGTERM)
            assert run.wait() == 75, run.text
        finally:
            run.end()
        step = run.document("status")["step"]
        print(f"an undisturbed run to step {step}, to compare with", flush=True)
        compare_with_undisturbed(run)
        assert run.leftovers() == []
    summary = (
        f"`python -m tests.faults.campaign --kills {options.kills} --seed {options.seed}`: {options.kills} faults in {step} "
        f"steps; losses and final state equal those of an undisturbed run, bit for bit."
    )
    print(f"{summary}\n\n{campaign.table()}")
    if options.write:
        text = PAGE.read_text()
        head, tail = text.split(BEGIN)[0], text.split(END)[1]
        PAGE.write_text(f"{head}{BEGIN}\n{summary}\n\n{campaign.table()}\n{END}{tail}")


if __name__ == "__main__":
    main()
