"""The guard of a simulated node: how old its lease is."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from trainrt.launch.guard import Lease


def test_a_clock_that_is_set_by_an_hour_makes_no_lease_old(tmp_path: Path) -> None:
    path = tmp_path / "lease"
    path.touch()
    lease = Lease(str(path))
    assert lease.age() < 1
    for shift in (-3600, 3600):
        # What the file's time looks like beside a clock that was set.
        os.utime(path, (time.time() + shift, time.time() + shift))
        assert lease.age() < 1
    time.sleep(0.05)
    assert lease.age() >= 0.05, "nobody touches it any more"
    path.unlink()
    with pytest.raises(OSError):
        lease.age()
