"""A channel that consumes no more, and what is still owed to the broker without one."""

from __future__ import annotations

from tests.harness.ledgers import NAMELESS, OTHER, Channel, a_ledger
from workerd.core.decisions import Rejoined, Settle
from workerd.core.dedup import Dedup
from workerd.core.job import Run
from workerd.core.retry import Verdict

# A consumer that the broker cancelled, on a channel that stays open.


def test_a_run_is_settled_on_the_channel_whose_consumer_was_cancelled() -> None:
    ledger = a_ledger()
    channel = Channel(ledger, 1)
    run = channel.run()
    assert ledger.retired(1, stale_before=0.0) == []
    assert ledger.holds(1)
    assert ledger.finished(run, Verdict.DONE) == Settle(channel.last, Verdict.DONE)
    assert not ledger.holds(1)


def test_a_delivery_that_timed_out_is_never_settled() -> None:
    ledger = a_ledger(concurrency=1)
    channel = Channel(ledger, 1)
    run = channel.deliver(received=1.0)
    assert isinstance(run, Run)
    channel.deliver(OTHER, received=2.0)
    channel.deliver(NAMELESS, received=3.0)
    assert ledger.retired(1, stale_before=3.0) == [channel.last]
    assert not ledger.holds(1)
    assert ledger.finished(run, Verdict.DONE) is None


def test_what_a_cancelled_consumer_runs_can_be_rejoined() -> None:
    ledger = a_ledger()
    first = Channel(ledger, 1)
    run = first.run()
    ledger.retired(1, stale_before=0.0)
    second = Channel(ledger, 2)
    assert second.deliver(redelivered=True) == Rejoined(run)
    assert not ledger.holds(1)
    first.lose()
    assert ledger.finished(run, Verdict.DONE) == Settle(second.last, Verdict.DONE)


def test_a_run_that_cannot_settle_is_rejoined_before_one_that_still_could() -> None:
    ledger = a_ledger()
    channel = Channel(ledger, 1)
    could = channel.deliver(received=2.0)
    cannot = channel.deliver(received=1.0)
    assert isinstance(cannot, Run)
    ledger.retired(1, stale_before=2.0)
    assert Channel(ledger, 2).deliver(redelivered=True) == Rejoined(cannot)
    assert isinstance(could, Run)
    assert could.delivery


def test_a_verdict_sent_after_the_consumer_was_cancelled_settles_the_redelivery_too() -> None:
    ledger = a_ledger()
    run = Channel(ledger, 1).run()
    ledger.retired(1, stale_before=0.0)
    ledger.finished(run, Verdict.DONE)
    assert isinstance(Channel(ledger, 2).deliver(redelivered=True), Settle)


def test_a_run_that_was_retired_and_then_lost_is_rejoined_once() -> None:
    ledger = a_ledger()
    first = Channel(ledger, 1)
    run = first.run()
    ledger.retired(1, stale_before=0.0)
    first.lose()
    second = Channel(ledger, 2)
    assert second.deliver(redelivered=True) == Rejoined(run)
    second.run(redelivered=True)


# What is still owed to the broker.


def test_nothing_is_owed_as_long_as_everything_can_be_settled() -> None:
    ledger = a_ledger()
    channel = Channel(ledger, 1)
    run = channel.run()
    assert not ledger.owes()
    ledger.finished(run, Verdict.DONE)
    assert not ledger.owes()
    channel.lose()
    assert not ledger.owes()


def test_a_run_and_its_verdict_are_owed_until_a_redelivery_takes_them() -> None:
    ledger = a_ledger()
    first = Channel(ledger, 1)
    run = first.run()
    first.lose()
    assert ledger.owes()
    ledger.finished(run, Verdict.DONE)
    assert ledger.owes()
    Channel(ledger, 2).deliver(redelivered=True)
    assert not ledger.owes()


def test_two_equal_verdicts_are_owed_until_both_are_settled() -> None:
    ledger = a_ledger()
    first = Channel(ledger, 1)
    runs = [first.run(), first.run()]
    first.lose()
    for run in runs:
        ledger.finished(run, Verdict.DONE)
    second = Channel(ledger, 2)
    assert isinstance(second.deliver(redelivered=True), Settle)
    assert ledger.owes()
    assert isinstance(second.deliver(redelivered=True), Settle)
    assert not ledger.owes()


def test_a_verdict_is_owed_as_long_as_it_is_remembered() -> None:
    ledger = a_ledger()
    first = Channel(ledger, 1)
    run = first.run()
    first.lose()
    ledger.finished(run, Verdict.DONE)
    for _ in range(Dedup.GENERATIONS - 1):
        ledger.age()
        assert ledger.owes()
    ledger.age()
    assert not ledger.owes()
    Channel(ledger, 2).run(redelivered=True)


def test_a_run_whose_verdict_nobody_would_remember_is_not_owed() -> None:
    ledger = a_ledger()
    first = Channel(ledger, 1)
    run = first.run(NAMELESS)
    first.lose()
    ledger.finished(run, Verdict.DONE)
    assert not ledger.owes()
