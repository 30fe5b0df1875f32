"""Options of the whole suite."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-conformance", action="store_true", help="write docs/conformance.md from this run")
    parser.addoption("--write-cases", action="store_true", help="write the cases of docs/checkpoint.md from this run")
    parser.addoption("--campaign", action="store_true", help="run the long forms of the campaigns")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--campaign"):
        for item in items:
            if item.get_closest_marker("campaign"):
                item.add_marker(pytest.mark.skip(reason="the long form runs with --campaign"))
