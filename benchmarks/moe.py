"""The exchange of a mixture of experts between two hosts: what strategies take, what they send, what is hidden; beside its peers.

    python -m benchmarks.moe [--part speed|overlap|bytes|peers|model] [--pairs 30] [--short] [--json FILE]

Needs root: the hosts are network namespaces of this machine, each of which sends at a limited rate (tc tbf); they are removed
in the end. Ranks are processes of one thread, gloo; the layer is `Experts` spread over them: exchange, experts, exchange,
forward and backward, float32, width 256, inner width 512. Arms share the processes and take turns step by step. All ratios are
medians over pairs of runs next to each other, in brackets the bootstrap's 95 % interval; a time is that of the slowest rank.

Regimes: "balanced" is the rate at which the exchange takes as long as the experts (measured first), "link-bound" a quarter of it.

speed: loads of 32, 512 and 4096 rows a rank; uniform, Zipf, one hot expert, one rank with four times the rows; in turn.
The adaptive arm practises on other loads of these kinds first.
overlap: exchange alone, experts alone, both; also with experts that sleep as long, as an accelerator computes. "hidden" is the
share of the shorter of the two that the other one hides, the exchange being cut into as many chunks. Chunks alone make an
exchange faster (the link idles less): "with link use" has that gain in it.
bytes: on two ranks, and on four of which two share a host.
model: the cost model's error on loads that it was not fitted to, and what it says of larger clusters.
peers: a whole layer of four experts, top 2, with its router, under DeepSpeed-MoE (and Tutel where it is installed): same
weights, routing and capacity.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import Any

from benchmarks.moe_bytes import bytes_sent, formula
from benchmarks.moe_hosts import run_ranks, two_hosts
from benchmarks.moe_layer import RANKS
from benchmarks.moe_model import model
from benchmarks.moe_overlap import SHAPE, compute_seconds, even, overlap
from benchmarks.moe_peers import peers
from benchmarks.moe_speed import speed
from tests.launch.hosts import Hosts, can_make_hosts
from trainrt.parallel.moe.strategy import PLAIN

PARTS = ("speed", "overlap", "bytes", "peers", "model")
CALIBRATED = 1024
"""Rows a rank for which exchange and experts are to take the same time."""
SHORT_PAIRS = 2


def regimes(hosts: Hosts) -> dict[str, float]:
    """Mbit/s of each."""
    load = even(CALIBRATED)
    seconds = max(run_ranks(hosts, compute_seconds, load))
    balanced = 8e-6 * formula(SHAPE, load, PLAIN, ranks=RANKS, host=0) / seconds
    return {"link-bound": balanced / 4, "balanced": balanced}


def measured(part: str, hosts: Hosts, rates: dict[str, float], *, pairs: int, short: bool) -> Any:
    if part == "bytes":
        return bytes_sent(hosts, short=short)
    return {"speed": speed, "overlap": overlap, "peers": peers, "model": model}[part](
        hosts, rates, pairs=pairs, short=short
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, help="one of them; by default all")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--short", action="store_true", help=f"few and small loads, {SHORT_PAIRS} pairs: does it run")
    parser.add_argument("--json", type=Path, help="a file for all that was measured")
    options = parser.parse_args()
    if not can_make_hosts():
        print("network namespaces need root, ip and tc", file=sys.stderr)
        raise SystemExit(2)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    pairs = SHORT_PAIRS if options.short else options.pairs
    found: dict[str, Any] = {"pairs": pairs}
    with two_hosts() as hosts:
        chosen = [options.part] if options.part else list(PARTS)
        rates = {} if chosen == ["bytes"] else regimes(hosts)
        if options.short:
            rates.pop("link-bound", None)
        for part in chosen:
            found[part] = measured(part, hosts, rates, pairs=pairs, short=options.short)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
