"""The driver's states: the table in the docs is the table in the code, and nothing else may happen."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainrt.launch.machine import (
    TRANSITIONS,
    Failed,
    Final,
    Finished,
    Interrupted,
    Recovering,
    Running,
    Starting,
    State,
    check,
    published,
    transition_table,
)

PAGE = Path(__file__).parents[2] / "docs" / "launch.md"


def test_the_page_shows_the_table() -> None:
    assert transition_table() in PAGE.read_text()


def test_every_state_can_be_reached_and_final_ones_are_left_by_nothing() -> None:
    assert {transition.target for transition in TRANSITIONS} | {Starting} == set(State.__args__)
    assert not {transition.source for transition in TRANSITIONS} & set(Final)


def test_what_is_not_in_the_table_is_a_bug() -> None:
    check(Starting(0.0), Running(1.0))
    check(Running(0.0), Running(1.0))
    with pytest.raises(AssertionError):
        check(Starting(0.0), Recovering(1.0))
    with pytest.raises(AssertionError):
        check(Finished("done"), Running(1.0))


def test_states_have_the_names_of_status_json() -> None:
    names = {published(Starting(0.0)), published(Interrupted("", 75)), published(Failed("")), published(Finished(""))}
    assert names == {"starting", "interrupted", "failed", "finished"}
