"""`benchmarks.moe_plus` runs, and rows exchanged are those that the routing says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from benchmarks.moe_plus import by_the_routing, shrinks_by_the_share

ROOT = Path(__file__).parents[2]


def test_the_short_form_runs_and_rows_shrink_by_exactly_the_share(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "benchmarks.moe_plus", "--short"]
    files = ["--json", str(tmp_path / "found.json"), "--plot", str(tmp_path / "curves.svg")]
    ended = subprocess.run([*words, *files], cwd=ROOT, check=True, capture_output=True, text=True)
    found = json.loads((tmp_path / "found.json").read_text())
    plain, plus = found["rows"]
    assert shrinks_by_the_share(found["rows"]) and 0 == plain["share"] < plus["share"] < 1
    assert plain["rows exchanged"] == 4 * plain["choices"] == 4 * plus["choices"]
    (run,) = found["curves"]
    assert {arm: len(curve["loss"]) for arm, curve in run.items()} == {"plain": 4, "MoE++": 4}
    # The first batch is the same, and so are nearly all of the first weights.
    assert abs(run["plain"]["loss"][0] - run["MoE++"]["loss"][0]) < 0.01
    assert "| validation |" in ended.stdout
    assert ElementTree.parse(tmp_path / "curves.svg").getroot().tag.endswith("svg")


def test_rows_by_the_routing_of_a_step() -> None:
    """Rank 0 has 3 rows, rank 1 has 7; for experts of rank 0 are 1 + 3 of them, for those of rank 1 are 2 + 4."""
    assert by_the_routing(np.array([[[1, 2]], [[3, 4]]])).tolist() == [[2 * (3 + 4)], [2 * (7 + 6)]]


def test_a_row_that_should_have_stayed_is_seen() -> None:
    """Negative control."""
    plain = {"rows exchanged": 40, "of zero-computation experts": 0, "equal": True}
    plus = {"rows exchanged": 28, "of zero-computation experts": 3, "equal": True}
    assert shrinks_by_the_share([plain, plus])
    assert not shrinks_by_the_share([plain, {**plus, "rows exchanged": 29}])
    assert not shrinks_by_the_share([plain, {**plus, "equal": False}])
