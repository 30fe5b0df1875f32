"""A short form of the campaigns in every run of the tests, and conversion in bounded memory."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file

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


LIMIT = 700 << 20


@pytest.mark.campaign
def test_a_source_larger_than_the_memory_allowed_is_converted_in_it(tmp_path: Path) -> None:
    """The proportional set size of all processes of a conversion, measured from outside, against `--memory`."""
    rows = 300_000
    tensors = {f"model.layers.{n}.weight": torch.full((rows, 256), float(n)) for n in range(4)}
    (tmp_path / "hf").mkdir()
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    del tensors
    size = (tmp_path / "hf" / "model.safetensors").stat().st_size
    assert size > 1.5 * LIMIT
    words = ["convert", str(tmp_path / "hf"), str(tmp_path / "there"), "--to", "universal", "--memory", f"{LIMIT}B"]
    process = psutil.Popen([sys.executable, "-m", "trainrt.cli", *words])
    peak = 0
    while process.poll() is None:
        peak = max(peak, _proportional(process))
        time.sleep(0.02)
    assert process.returncode == 0
    assert 100 << 20 < peak <= LIMIT


def _proportional(process: psutil.Process) -> int:
    total = 0
    with suppress(psutil.Error, FileNotFoundError):
        for one in [process, *process.children(recursive=True)]:
            with suppress(psutil.Error, FileNotFoundError):
                total += one.memory_full_info().pss
    return total
