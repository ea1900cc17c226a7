"""The states of a run: what is no step from one to the next raises, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.harness.ledgers import NAMED, OTHER, Channel
from workerd.core.dedup import Dedup
from workerd.core.job import Run
from workerd.core.ledger import Ledger
from workerd.core.retry import Verdict
from workerd.core.states import BEGINS, ENDS, FINISH, WITHDRAW, IllegalInput, State

CHANNEL = 1

Verb = Callable[[Ledger, Run], object]
VERBS: dict[str, Verb] = {
    "begins": lambda ledger, run: ledger.begins(run),
    "withdraw": lambda ledger, run: ledger.withdraw(CHANNEL),
    "ends": lambda ledger, run: ledger.ended(run),
    "finish": lambda ledger, run: ledger.finished(run, Verdict.DONE),
}
TABLES = {"begins": BEGINS, "withdraw": WITHDRAW, "ends": ENDS, "finish": FINISH}
#: How a run comes to each state.
PATHS = {
    State.DISPATCHED: [],
    State.READY: [],
    State.RECALLED: ["withdraw"],
    State.WITHDRAWN: ["withdraw"],
    State.BEGUN: ["begins"],
    State.ENDED: ["begins", "ends"],
    State.FINISHED: ["begins", "ends", "finish"],
}


class Told(Dedup):
    """A memory that writes down what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []

    def begun(self, key: bytes) -> None:
        self.told.append("begun")

    def settled(self, key: bytes, channel: int, ran: bool = True) -> None:
        self.told.append("settled")
        super().settled(key, channel, ran)


def a_run(state: State) -> tuple[Ledger, Run]:
    """A run in this state, and its ledger."""
    ledger = Ledger({"queue": 1}, Told(), lambda _job: False, lambda _job: 2)
    channel = Channel(ledger, CHANNEL)
    if state in (State.DISPATCHED, State.RECALLED):
        VERBS["begins"](ledger, channel.run(OTHER))
    run = channel.run(NAMED)
    for verb in PATHS[state]:
        VERBS[verb](ledger, run)
    assert run.state is state
    return ledger, run


def all_of(ledger: Ledger, run: Run) -> object:
    """Everything that an input could change."""
    assert isinstance(ledger.dedup, Told)
    slots = ledger.slots
    figures = (slots.busy("queue"), slots.waiting("queue"), slots.in_use, slots.has_free_slot)
    told = list(ledger.dedup.told)
    return run.state, run.delivery, set(ledger.running), figures, ledger.owes(), told


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("verb", VERBS)
def test_an_input_moves_a_run_as_the_table_says_or_raises_and_changes_nothing(
    verb: str, state: State
) -> None:
    ledger, run = a_run(state)
    before = all_of(ledger, run)
    if state in TABLES[verb]:
        VERBS[verb](ledger, run)
        assert run.state is TABLES[verb][state]
    elif verb == "withdraw":  # is told of a channel, and leaves what it does not concern alone
        assert ledger.withdraw(CHANNEL) == []
        assert all_of(ledger, run) == before
    else:
        with pytest.raises(IllegalInput, match=f"that is {state} cannot be told: {verb}"):
            VERBS[verb](ledger, run)
        assert all_of(ledger, run) == before


def test_what_is_told_twice_is_a_bug_only_where_it_would_count_twice() -> None:
    assert {name: sorted(set(State) - set(table)) for name, table in TABLES.items()} == {
        "begins": [State.ENDED, State.FINISHED],
        "withdraw": [State.BEGUN, State.ENDED, State.FINISHED],
        "ends": [State.ENDED, State.FINISHED],
        "finish": [State.FINISHED],
    }


@pytest.mark.parametrize("state", [State.RECALLED, State.WITHDRAWN])
def test_one_that_had_begun_when_it_was_withdrawn_has_a_slot_and_is_an_attempt(
    state: State,
) -> None:
    ledger, run = a_run(state)
    assert not ledger.slots.may_begin(run)
    ledger.begins(run)
    assert (run.begun, run.withdrawn, run.dispatched) == (True, False, False)
    assert isinstance(ledger.dedup, Told)
    assert ledger.dedup.told[-1] == "begun"
    assert ledger.slots.waiting("queue") == 0


@pytest.mark.parametrize("state", [each for each in State if each is not State.FINISHED])
def test_whatever_a_run_was_its_slot_is_free_when_it_is_finished(state: State) -> None:
    ledger, run = a_run(state)
    busy = len(ledger.running) - 1
    ledger.finished(run, Verdict.DONE)
    assert (ledger.slots.busy("queue"), ledger.slots.waiting("queue")) == (busy, 0)


def test_nothing_is_withdrawn_that_came_on_another_channel() -> None:
    ledger, run = a_run(State.READY)
    other = Channel(ledger, CHANNEL + 1)
    other.run(OTHER)
    assert ledger.withdraw(CHANNEL) == [run]
