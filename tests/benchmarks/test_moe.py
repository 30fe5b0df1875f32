"""`benchmarks.moe` runs, and what goes over the wire is what its formula says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.hosts import can_make_hosts

ROOT = Path(__file__).parents[2]


@pytest.mark.campaign
@pytest.mark.timeout(1200)
def test_every_part_runs_and_the_bytes_are_those_of_the_formula(tmp_path: Path) -> None:
    if not can_make_hosts():
        pytest.skip("network namespaces need root, ip and tc")
    words = [sys.executable, "-m", "benchmarks.moe", "--short", "--json", str(tmp_path / "found.json")]
    subprocess.run(words, cwd=ROOT, check=True)
    found = json.loads((tmp_path / "found.json").read_text())
    assert all(found[part] for part in ("speed", "overlap", "bytes", "peers"))
    assert {row["ranks"] for row in found["bytes"]} == {2, 4} and {row["r"] for row in found["bytes"]} == {0, 1, 2, 4}
    assert [row for row in found["bytes"] if abs(row["error"]) > 0.01] == []


def test_where_no_hosts_can_be_made_it_says_so() -> None:
    """Without ip and tc on the path, root or not."""
    words = [sys.executable, "-m", "benchmarks.moe", "--part", "bytes"]
    ended = subprocess.run(words, cwd=ROOT, env=os.environ | {"PATH": "/nowhere"}, capture_output=True, text=True)
    assert ended.returncode == 2 and "namespaces need root, ip and tc" in ended.stderr
