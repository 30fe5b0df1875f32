"""A short form of the campaigns in every run of the tests, and conversion in bounded memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoint.campaign import PHASES, Flips, Kills


@pytest.mark.parametrize("seed", [7])
def test_conversions_that_are_killed_go_on_to_the_same_end(seed: int, tmp_path: Path) -> None:
    kills = Kills(tmp_path, seed)
    kills.play(2 * len(PHASES))
    assert {phase for phase, _ in kills.hit} == set(PHASES)


@pytest.mark.parametrize("seed", [7])
def test_flipped_bits_and_truncations_are_found(seed: int, tmp_path: Path) -> None:
    flips = Flips(tmp_path, seed)
    flips.play(60)
    assert sum(flips.found.values()) == 60
