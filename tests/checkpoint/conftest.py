"""Checkpoints of other frameworks, each made once in a session."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoint.frameworks import make

Made = Callable[..., tuple[Path, dict[str, np.ndarray]]]


@pytest.fixture(scope="session")
def _made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, dict[str, np.ndarray]]]:
    kept: dict[str, tuple[Path, dict[str, np.ndarray]]] = {}

    def made(framework: str, **options: Any) -> tuple[Path, dict[str, np.ndarray]]:
        key = json.dumps([framework, options], sort_keys=True)
        if key not in kept:
            folder = tmp_path_factory.mktemp(framework)
            kept[key] = folder / "checkpoint", make(framework, folder, **options)
        return kept[key]

    return made


@pytest.fixture
def made(_made: Made, tmp_path: Path) -> Made:
    """(framework, options) to a copy of the checkpoint that it made, and what it says is in it.

    Beside the copy, in `losses.npy`, the losses of the framework's next steps, where it takes any.
    """

    def copy(framework: str, **options: Any) -> tuple[Path, dict[str, np.ndarray]]:
        path, expected = _made(framework, **options)
        shutil.copytree(path, tmp_path / "made" / path.name)
        if (path.parent / "losses.npy").exists():
            shutil.copy(path.parent / "losses.npy", tmp_path / "made")
        return tmp_path / "made" / path.name, expected

    return copy
