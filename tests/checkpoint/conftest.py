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

PAGE, BEGIN, END = Path(__file__).parents[2] / "docs" / "checkpoint.md", "<!-- cases -->", "<!-- end of cases -->"
CASES: dict[tuple[str, str, str], str] = {}
Made = Callable[..., tuple[Path, dict[str, np.ndarray]]]
Covers = Callable[[str, str, str], None]


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


@pytest.fixture
def covers(request: pytest.FixtureRequest) -> Covers:
    """(format, read or written, case): what a test is about, for the table that `--write-cases` puts into docs/checkpoint.md."""
    return lambda *case: request.node.user_properties.append(("case", case))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    outcome = yield
    report = outcome.get_result()
    case = dict(item.user_properties).get("case")
    if report.when == "call" and isinstance(case, tuple):
        CASES[case] = "yes" if report.passed else "NO"


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not session.config.getoption("--write-cases"):
        return
    rows = [f"| {form} | {direction} | {case} | {held} |" for (form, direction, case), held in sorted(CASES.items())]
    table = "\n".join(["| format | | case | holds |", "|---|---|---|---|", *rows])
    page = PAGE.read_text()
    PAGE.write_text(f"{page.split(BEGIN)[0]}{BEGIN}\n{table}\n{END}{page.split(END)[1]}")
