"""The states of a warm process: what may happen in each, and what it comes to."""

from __future__ import annotations

from itertools import product
from typing import get_args

import pytest

from workerd.handlers.warm.lifecycle import TRANSITIONS, Input, Lifecycle, State

STATES: tuple[State, ...] = get_args(State)
INPUTS: tuple[Input, ...] = get_args(Input)


@pytest.mark.parametrize(("state", "event"), list(product(STATES, INPUTS)))
def test_what_is_not_in_the_table_raises_and_changes_nothing(state: State, event: Input) -> None:
    life = Lifecycle()
    life.state = state
    after = TRANSITIONS[state].get(event)
    if after is None:
        with pytest.raises(AssertionError, match=f"'{event}' of a process that is {state}"):
            life.move(event)
        assert life.state == state
    else:
        life.move(event)
        assert life.state == after


def test_every_state_is_in_the_table_and_can_come_to_its_end() -> None:
    assert set(TRANSITIONS) == set(STATES)
    reached: set[State] = set()
    new: set[State] = {"starting"}
    while new:
        reached |= new
        new = {after for state in new for after in TRANSITIONS[state].values()} - reached
    assert reached == set(STATES)
    for state in reached - {"ended"}:
        next_ones = set(TRANSITIONS[state].values())
        assert "ended" in next_ones.union(*(TRANSITIONS[each].values() for each in next_ones))


def test_nothing_follows_the_end() -> None:
    assert TRANSITIONS["ended"] == {}
