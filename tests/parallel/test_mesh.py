"""Which way ranks talk to each other."""

from __future__ import annotations

import os

import psutil
import pytest

from trainrt.parallel.mesh import talk_over_the_way_to


def test_ranks_talk_over_the_interface_that_leads_to_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    loopback = next(
        name for name, held in psutil.net_if_addrs().items() if "127.0.0.1" in {address.address for address in held}
    )
    # Set, then removed, so that both are as before when the test is over.
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "chosen")
    talk_over_the_way_to("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == loopback
    assert os.environ["NCCL_SOCKET_IFNAME"] == "chosen", "what the environment says stays"
