"""Cases of a test of which every run takes some, and a run with `--campaign` all."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import pytest


def cases(every: Iterable[Any], short: Container[Any]) -> list[Any]:
    """The parameters of a test, those that are not in the short form marked as of the campaign."""
    return [pytest.param(case, marks=() if case in short else (pytest.mark.campaign,)) for case in every]
