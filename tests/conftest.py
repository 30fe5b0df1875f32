"""Options of the whole suite."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-conformance", action="store_true", help="write docs/conformance.md from this run")
    parser.addoption("--write-cases", action="store_true", help="write the cases of docs/checkpoint.md from this run")
    parser.addoption("--campaign", action="store_true", help="run the long forms of the campaigns")
