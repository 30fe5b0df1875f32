"""When a host leaves the run: because a verdict says so, or because somebody asks for it.

`[diagnostics] evict = "advise"` prints the command that does it; `"automatic"` does it. No host is evicted for work that is
unevenly spread or for what all hosts share, on a verdict below CONFIDENCE or said only once, within PAUSE_SECONDS of the last
eviction, or where it is the last one. What a person asks for (`trainrt evict`) is done at once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from trainrt.diagnostics.verdict import Diagnosis, Verdict
from trainrt.run_dir import RunDir

CONFIDENCE = 0.9
PAUSE_SECONDS = 600.0
TWICE = 2
"""Diagnoses in a row, each with new steps, that must name the host."""
OF_HARDWARE = ("slow_worker", "slow_host", "slow_nic", "drift")


@dataclass(frozen=True, slots=True)
class Eviction:
    """A host that is to leave, and why. ranks: those that a verdict blames."""

    host: str
    why: str
    ranks: tuple[int, ...] = ()


class Evictions:
    """Decides on evictions, one at a time. automatic: verdicts are carried out, else the command is told."""

    def __init__(self, run_dir: RunDir, *, automatic: bool, tell: Callable[[str], None]) -> None:
        self._run_dir, self._automatic, self._tell = run_dir, automatic, tell
        self._said: dict[str, int] = {}
        self._seen: Diagnosis | None = None
        self._advised: set[str] = set()
        self.last_at: float | None = None

    def wanted(self, diagnosis: Diagnosis | None, *, hosts: Collection[str], now: float) -> Eviction | None:
        """The host that is to leave now. hosts: those of the run, spare ones too; now: of `time.monotonic()`."""
        return self._asked(hosts) or self._judged(diagnosis, hosts, now)

    def done(self, now: float) -> None:
        """The host has left, or cannot."""
        self._run_dir.evict_request.unlink(missing_ok=True)
        self.last_at, self._said = now, {}

    def _asked(self, hosts: Collection[str]) -> Eviction | None:
        try:
            host = self._run_dir.evict_request.read_text().strip()
        except FileNotFoundError:
            return None
        if host in hosts and len(hosts) > 1:
            return Eviction(host, "trainrt evict")
        self._run_dir.evict_request.unlink(missing_ok=True)
        self._tell(
            f"evict host={host}: not done; allowed: one of {', '.join(sorted(hosts))}, where another one is left"
        )
        return None

    def _judged(self, diagnosis: Diagnosis | None, hosts: Collection[str], now: float) -> Eviction | None:
        if diagnosis is None or diagnosis is self._seen:
            return None
        self._seen = diagnosis
        named = {host: verdict for verdict in diagnosis.verdicts if (host := evictable(verdict)) in hosts and host}
        self._said = {host: self._said.get(host, 0) + 1 for host in named}
        ready = [host for host, times in self._said.items() if times >= TWICE]
        if not ready or len(hosts) < 2 or (self.last_at is not None and now - self.last_at < PAUSE_SECONDS):
            return None
        worst = max(ready, key=lambda host: named[host].share)
        if not self._automatic:
            self._advise(worst)
            return None
        return Eviction(
            worst, named[worst].sentence, tuple(c.rank for c in named[worst].culprits if c.rank is not None)
        )

    def _advise(self, host: str) -> None:
        if host not in self._advised:
            self._advised.add(host)
            self._tell(f"advice action=evict host={host}: trainrt evict {self._run_dir} {host}")


def evictable(verdict: Verdict) -> str | None:
    """The one host that a verdict says to evict, or None."""
    hosts = {culprit.host for culprit in verdict.culprits}
    if (
        verdict.action != "evict"
        or verdict.cause not in OF_HARDWARE
        or verdict.confidence < CONFIDENCE
        or len(hosts) != 1
    ):
        return None
    return hosts.pop()
