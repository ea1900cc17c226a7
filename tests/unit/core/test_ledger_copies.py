"""A job that workerd itself has published is one job, however often it comes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.harness.ledgers import COPIED, NAMED, OTHER, Channel, a_ledger
from workerd.core.decisions import Rejoined, Settle
from workerd.core.dedup import Dedup, Elsewhere
from workerd.core.job import COPY
from workerd.core.ledger import PATIENCE, Ledger
from workerd.core.retry import Verdict

again = pytest.mark.parametrize("redelivered", [False, True], ids=["new", "redelivered"])


@again
def test_a_copy_that_comes_twice_is_settled_while_the_first_runs(redelivered: bool) -> None:
    ledger = a_ledger()
    channel = Channel(ledger, 1)
    run = channel.run(COPIED)
    assert channel.deliver(COPIED, redelivered) == Settle(channel.last, Verdict.DONE)
    assert ledger.running == {run}


@again
def test_a_copy_that_comes_twice_is_settled_while_the_first_waits(redelivered: bool) -> None:
    ledger = a_ledger(concurrency=1)
    channel = Channel(ledger, 1)
    channel.run(OTHER)
    assert channel.deliver(COPIED) is None
    assert channel.deliver(COPIED, redelivered) == Settle(channel.last, Verdict.DONE)
    assert ledger.slots.waiting("queue") == 1


@again
@pytest.mark.parametrize("verdict", [each for each in Verdict if each.remembered])
def test_a_copy_that_comes_twice_is_settled_once_the_first_is_finished(
    verdict: Verdict, redelivered: bool
) -> None:
    ledger = a_ledger()
    channel = Channel(ledger, 1)
    ledger.finished(channel.run(COPIED), verdict)
    for _ in range(3):
        assert channel.deliver(COPIED, redelivered) == Settle(channel.last, Verdict.DONE)


def test_a_redelivered_copy_rejoins_its_run_and_its_twin_is_settled() -> None:
    ledger = a_ledger()
    first = Channel(ledger, 1)
    run = first.run(COPIED)
    first.lose()
    second = Channel(ledger, 2)
    assert second.deliver(COPIED, redelivered=True) == Rejoined(run)
    assert isinstance(second.deliver(COPIED, redelivered=True), Settle)
    assert ledger.running == {run}


def test_a_copy_that_went_back_is_run_and_then_its_twin_is_settled() -> None:
    ledger = a_ledger()
    channel = Channel(ledger, 1)
    ledger.finished(channel.run(COPIED), Verdict.RETURN)
    ledger.finished(channel.run(COPIED, redelivered=True), Verdict.DONE)
    assert isinstance(channel.deliver(COPIED), Settle)


def test_two_copies_are_two_jobs_when_their_marks_differ() -> None:
    channel = Channel(a_ledger(), 1)
    channel.run(COPIED)
    channel.run(replace(COPIED, headers={COPY: "another mark"}))


class Sibling(Dedup):
    """The memory of a host whose other instance says this of every job."""

    def __init__(self, says: Elsewhere) -> None:
        super().__init__()
        self._says = says

    def elsewhere(self, key: bytes) -> Elsewhere:
        return self._says


@pytest.mark.parametrize(
    "says", [each for each in Elsewhere if each.name not in ("UNKNOWN", "MAY_RUN")]
)
def test_a_copy_whose_twin_came_to_a_sibling_is_settled(says: Elsewhere) -> None:
    ledger = Ledger({"queue": 2}, Sibling(says))
    channel = Channel(ledger, 1)
    assert channel.deliver(COPIED) == Settle(channel.last, Verdict.DONE)
    channel.run(NAMED)


def test_what_a_newer_sibling_may_run_is_held_when_it_comes_again_and_otherwise_run() -> None:
    ledger = Ledger({"queue": 2}, Sibling(Elsewhere.MAY_RUN))
    channel = Channel(ledger, 1)
    channel.run(COPIED)
    assert channel.deliver(OTHER, redelivered=True) is None
    assert ledger.look_again(10 * PATIENCE) == []
    assert ledger.held == [channel.last]
