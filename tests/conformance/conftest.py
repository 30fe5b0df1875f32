"""Collects what each cell came to; `--write-conformance` writes the table into docs/conformance.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conformance.rows import COLUMNS, ROWS

DOCUMENT = Path(__file__).parents[2] / "docs" / "conformance.md"
CELLS: dict[tuple[str, str], str] = {}


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):  # type: ignore[no-untyped-def]
    outcome = yield
    report = outcome.get_result()
    cell = dict(item.user_properties).get("cell")
    if report.when == "call" and isinstance(cell, tuple):
        CELLS[cell] = "yes" if report.passed else "NO"


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not session.config.getoption("--write-conformance"):
        return
    lines = [
        "# Conformance", "",
        "Every parallel form that is built, and what is proven of it. Generated from a run of the tests:",
        "`pytest tests/conformance --campaign --write-conformance`. What is not in the table is refused by name.", "",
        "- parity: losses and gradient norms of 5 steps against one process (float64: 1e-11 relative; bfloat16: 2e-2)",
        "- layout digest: the freshly made model, consolidated, has the digests of one process, bit for bit",
        "- resume on another mesh: a checkpoint, loaded on the mesh in brackets, has equal digests, and goes on alike",
        "- kill and restore: a real launch, a worker killed with SIGKILL, the final state equal bit for bit", "",
        "| form | ranks | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|",
    ]  # fmt: skip
    before = _written()
    for row in ROWS:
        other = " x ".join(f"{axis} {n}" for axis, n in row.other.items()) or "one rank"
        cells = [CELLS.get((row.name, column)) or before.get((row.name, column), "-") for column in COLUMNS]
        cells[2] += f" ({other})"
        lines.append(f"| {row.name} | {row.ranks} | " + " | ".join(cells) + " |")
    DOCUMENT.write_text("\n".join(lines) + "\n")


def _written() -> dict[tuple[str, str], str]:
    """The cells that stand there: those of rows that are not part of this run stay."""
    found = {}
    for line in DOCUMENT.read_text().splitlines():
        name, _, *cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("| ") else ["", ""]
        for column, cell in zip(COLUMNS, cells, strict=False):
            found[name, column] = cell.partition(" ")[0]
    return found
