"""Hosts with links of their own: network namespaces on one bridge. Needs root."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from contextlib import suppress
from itertools import count
from pathlib import Path

NUMBERS = count()
"""Of the bridges of this process: there may be several at a time."""
NOWHERE = "02:00:00:00:00:99"
"""A hardware address that nobody has: what is sent there is lost without a word."""


def can_make_hosts() -> bool:
    """Root alone is not enough: a container may forbid it namespaces."""
    if os.geteuid() or not all(map(shutil.which, ("ip", "tc", "unshare"))):
        return False
    return subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode == 0


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


class Hosts:
    """A bridge, whose first address is this machine's, and hosts 1, 2, ... behind it."""

    def __init__(self) -> None:
        number = next(NUMBERS)
        self._bridge = f"tb{os.getpid()}{chr(ord('a') + number % 26)}"
        self._net = f"10.{77 + os.getpid() % 100}.{(os.getpid() // 100 + number) % 250}"
        self._count = 0

    @property
    def address(self) -> str:
        """This machine's, as the hosts see it."""
        return self.address_of(0)

    def address_of(self, host: int) -> str:
        return f"{self._net}.{host + 1}"

    def prefix(self, host: int) -> list[str]:
        """What a command begins with that is to run on a host; nothing for this machine."""
        return ["ip", "netns", "exec", self._name(host)] if host else []

    def __enter__(self) -> Hosts:
        ip("link", "add", self._bridge, "type", "bridge")
        ip("addr", "add", f"{self.address}/24", "dev", self._bridge)
        ip("link", "set", self._bridge, "up")
        return self

    def __exit__(self, *_: object) -> None:
        for host in range(1, self._count + 1):
            for pid in ip("netns", "pids", self._name(host)).split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            ip("link", "del", self._link(host))
            ip("netns", "del", self._name(host))
            shutil.rmtree(self._files(host))
        ip("link", "del", self._bridge)

    def add(self) -> int:
        """One more host."""
        self._count += 1
        host, link = self._count, self._link(self._count)
        ip("netns", "add", self._name(host))
        # What resolves names on a host: no server, and every address has a name.
        self._files(host).mkdir(parents=True)
        names = "".join(f"{self.address_of(other)} host{other}\n" for other in range(100))
        (self._files(host) / "hosts").write_text(Path("/etc/hosts").read_text() + names)
        (self._files(host) / "resolv.conf").touch()
        ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", self._name(host))
        ip("link", "set", link, "master", self._bridge, "up")
        for words in (
            ("link", "set", "lo", "up"),
            ("addr", "add", f"{self.address_of(host)}/24", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
            ("route", "add", "default", "via", self.address),
        ):
            ip("-n", self._name(host), *words)
        return host

    def host_of(self, pid: int) -> int:
        """The host on which a process runs."""
        name = ip("netns", "identify", str(pid)).strip()
        return next((host for host in range(1, self._count + 1) if self._name(host) == name), 0)

    def limit(self, host: int, megabits: float) -> None:
        """The rate at which a host sends, in Mbit/s."""
        where, name = (["-n", self._name(host)], "eth0") if host else ([], self._bridge)
        device = ["tc", *where, "qdisc", "replace", "dev", name, "root"]
        bucket = ["tbf", "rate", f"{round(megabits * 1000)}kbit", "burst", "64kb", "latency", "50ms"]
        subprocess.run([*device, *bucket], check=True, capture_output=True)

    def limit_to(self, host: int, other: int, megabits: float) -> None:
        """The rate at which a host sends to one other host, in Mbit/s: over a wire of its own; answers come by the bridge."""
        here, there = self._name(host), self._name(other)
        wire = f"wire{other}"
        ip("-n", here, "link", "add", wire, "type", "veth", "peer", "name", f"wire{host}", "netns", there)
        ip("-n", here, "link", "set", wire, "up")
        ip("-n", there, "link", "set", f"wire{host}", "up")
        ip("-n", here, "route", "add", f"{self.address_of(other)}/32", "dev", wire, "src", self.address_of(host))
        bucket = f"tbf rate {round(megabits * 1000)}kbit burst 64kb latency 50ms".split()
        device = ["tc", "-n", here, "qdisc", "replace", "dev", wire, "root", *bucket]
        subprocess.run(device, check=True, capture_output=True)

    def unlimit_to(self, host: int, other: int) -> None:
        ip("-n", self._name(host), "link", "del", f"wire{other}")

    def cut(self, host: int) -> None:
        """A dead link: nothing comes from a host, nothing reaches it, nobody is told."""
        ip("link", "set", self._link(host), "down")

    def mend(self, host: int) -> None:
        ip("link", "set", self._link(host), "up")

    def silence(self, host: int) -> None:
        """A link that is dead in one direction: the host hears everything, and nobody hears it."""
        for other in range(self._count + 1):
            if other != host:
                self.lose(host, other)

    def lose(self, host: int, other: int) -> None:
        """What a host sends to another one is lost."""
        where = ("-n", self._name(host)) if host else ()
        device = "eth0" if host else self._bridge
        ip(*where, "neigh", "replace", self.address_of(other), "lladdr", NOWHERE, "dev", device, "nud", "permanent")

    def _name(self, host: int) -> str:
        return f"{self._bridge}-{host}"

    def _files(self, host: int) -> Path:
        return Path("/etc/netns") / self._name(host)

    def _link(self, host: int) -> str:
        return f"{self._bridge}v{host}"

    def left(self) -> list[str]:
        """What of it still exists."""
        return [path.name for path in Path("/sys/class/net").glob(f"{self._bridge}*")]
