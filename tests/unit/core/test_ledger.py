"""The rules of the ledger: which run a redelivery rejoins, what is settled from memory, drains."""

from __future__ import annotations

import re
import sys

import pytest

from tests.harness.ledgers import NAMED, NAMELESS, OTHER, Channel, a_ledger
from workerd.core.decisions import Rejoined, Settle
from workerd.core.job import ATTEMPT, REPLAY, Message
from workerd.core.ledger import Ledger
from workerd.core.retry import Verdict
from workerd.core.states import IllegalInput

either = pytest.mark.parametrize("message", [NAMED, NAMELESS], ids=["named", "nameless"])
finally_ = pytest.mark.parametrize("verdict", [Verdict.DONE, Verdict.DEAD])


# 1. A redelivery rejoins the run whose own delivery was lost.


@either
def test_a_redelivery_rejoins_the_job_that_is_still_running(message: Message) -> None:
    ledger = a_ledger()
    first = Channel(ledger, 1)
    run = first.run(message)
    first.lose()
    second = Channel(ledger, 2)
    assert second.deliver(message, redelivered=True) == Rejoined(run)
    assert ledger.running == {run}
    assert ledger.finished(run, Verdict.DONE) == Settle(second.last, Verdict.DONE)


def test_a_job_may_rejoin_again_and_again() -> None:
    ledger = a_ledger()
    channel = Channel(ledger, 1)
    run = channel.run()
    for serial in range(2, 5):
        channel.lose()
        channel = Channel(ledger, serial)
        assert channel.deliver(redelivered=True) == Rejoined(run)
    assert ledger.finished(run, Verdict.DEAD) == Settle(channel.last, Verdict.DEAD)


def test_a_message_that_was_never_delivered_before_joins_nothing() -> None:
    ledger = a_ledger()
    first = Channel(ledger, 1)
    first.run()
    first.lose()
    Channel(ledger, 2).run()
    assert len(ledger.running) == 2


@either
def test_a_run_that_can_settle_its_own_delivery_is_joined_by_none(message: Message) -> None:
    ledger = a_ledger()
    channel = Channel(ledger, 1)
    channel.run(message)
    channel.run(message, redelivered=True)
    assert len(ledger.running) == 2


@pytest.mark.parametrize(
    "other",
    [
        Message(b"body", message_id="id", headers={ATTEMPT: 1}),
        Message(b"body", message_id="id", headers={REPLAY: "2026-01-01"}),
        Message(b"other body", message_id="id"),
        Message(b"body", message_id="ID"),
        Message(b"body", message_id="id", timestamp=1),
        NAMELESS,
    ],
    ids=["attempt", "replay", "body", "id", "time", "no id"],
)
def test_another_attempt_or_message_neither_rejoins_nor_is_settled(other: Message) -> None:
    ledger = a_ledger(concurrency=3)
    first = Channel(ledger, 1)
    run = first.run()
    first.lose()
    second = Channel(ledger, 2)
    second.run(other, redelivered=True)
    ledger.finished(run, Verdict.DONE)
    second.run(other, redelivered=True)
    assert isinstance(second.deliver(NAMED, redelivered=True), Settle)


def test_the_same_message_in_another_queue_is_another_job() -> None:
    ledger = a_ledger()
    first = Channel(ledger, 1)
    run = first.run()
    first.lose()
    Channel(ledger, 2, "other").run(redelivered=True)
    ledger.finished(run, Verdict.DONE)
    Channel(ledger, 3, "other").run(redelivered=True)


@either
def test_of_two_equal_jobs_each_is_settled_by_a_run_of_its_own(message: Message) -> None:
    ledger = a_ledger()
    first = Channel(ledger, 1)
    runs = {first.run(message), first.run(message)}
    first.lose()
    second = Channel(ledger, 2)
    rejoined = [second.deliver(message, redelivered=True) for _ in range(2)]
    assert {each.run for each in rejoined if isinstance(each, Rejoined)} == runs
    orders = [ledger.finished(run, Verdict.DONE) for run in runs]
    assert {order.delivery.tag for order in orders if order} == {1, 2}
    # A third one, as when its first delivery never arrived here, is run.
    second.run(message, redelivered=True)


@either
def test_an_equal_job_that_waited_is_run_beside_the_one_that_is_rejoined(message: Message) -> None:
    ledger = a_ledger(concurrency=1)
    first = Channel(ledger, 1)
    run = first.run(message)
    assert first.deliver(message) is None
    first.lose()
    second = Channel(ledger, 2)
    assert second.deliver(message, redelivered=True) == Rejoined(run)
    assert second.deliver(message, redelivered=True) is None
    assert ledger.finished(run, Verdict.DONE)
    assert ledger.next()


# 2. A redelivery of a finished job is settled from memory.


@finally_
def test_a_finished_job_whose_ack_may_be_lost_is_settled_without_a_run(verdict: Verdict) -> None:
    ledger = a_ledger()
    first = Channel(ledger, 1)
    assert ledger.finished(first.run(), verdict) == Settle(first.last, verdict)
    first.lose()
    second = Channel(ledger, 2)
    # Its dead letter was confirmed before; now as then it is to be acknowledged.
    assert second.deliver(redelivered=True) == Settle(second.last, Verdict.DONE)


@finally_
def test_a_verdict_without_a_channel_is_kept_for_the_redelivery(verdict: Verdict) -> None:
    ledger = a_ledger()
    first = Channel(ledger, 1)
    run = first.run()
    first.lose()
    assert ledger.finished(run, verdict) is None
    second = Channel(ledger, 2)
    assert second.deliver(redelivered=True) == Settle(second.last, Verdict.DONE)


def test_a_job_is_settled_as_often_as_the_broker_forgets_it() -> None:
    ledger = a_ledger()
    channel = Channel(ledger, 1)
    ledger.finished(channel.run(), Verdict.DONE)
    for serial in range(2, 5):
        channel.lose()
        channel = Channel(ledger, serial)
        assert channel.deliver(redelivered=True) == Settle(channel.last, Verdict.DONE)


def test_while_the_channel_of_its_verdict_lives_an_equal_redelivery_is_another_job() -> None:
    ledger = a_ledger()
    channel = Channel(ledger, 1)
    ledger.finished(channel.run(), Verdict.DONE)
    channel.run(redelivered=True)


def test_one_finished_job_settles_one_redelivery() -> None:
    ledger = a_ledger()
    first = Channel(ledger, 1)
    ledger.finished(first.run(), Verdict.DONE)
    first.lose()
    second = Channel(ledger, 2)
    assert isinstance(second.deliver(redelivered=True), Settle)
    second.run(redelivered=True)


def test_a_finished_job_without_an_id_is_run_again() -> None:
    ledger = a_ledger()
    first = Channel(ledger, 1)
    ledger.finished(first.run(NAMELESS), Verdict.DONE)
    first.lose()
    Channel(ledger, 2).run(NAMELESS, redelivered=True)


def test_a_new_message_is_run_although_an_equal_one_is_finished() -> None:
    ledger = a_ledger()
    first = Channel(ledger, 1)
    ledger.finished(first.run(), Verdict.DONE)
    first.lose()
    Channel(ledger, 2).run()


@pytest.mark.parametrize("verdict", [Verdict.RETURN, Verdict.REJECT])
def test_a_job_that_was_given_back_or_rejected_is_not_settled_from_memory(verdict: Verdict) -> None:
    ledger = a_ledger()
    first = Channel(ledger, 1)
    ledger.finished(first.run(), verdict)
    first.lose()
    Channel(ledger, 2).run(redelivered=True)


# What went back unfinished is run, whatever has become of its equals.


def test_a_job_lost_while_it_waited_is_run_though_an_equal_one_was_finished() -> None:
    ledger = a_ledger(concurrency=1)
    first = Channel(ledger, 1)
    run = first.run()
    first.deliver()
    ledger.finished(run, Verdict.DONE)
    first.lose()
    Channel(ledger, 2).run(redelivered=True)


def test_a_job_lost_while_it_waited_is_run_though_an_equal_one_is_finished_later() -> None:
    ledger = a_ledger(concurrency=1)
    first = Channel(ledger, 1)
    run = first.run()
    first.deliver()
    first.lose()
    second = Channel(ledger, 2)
    assert second.deliver(redelivered=True) == Rejoined(run)
    ledger.finished(run, Verdict.DONE)
    second.lose()
    Channel(ledger, 3).run(redelivered=True)


def test_a_job_given_back_by_a_cancelled_consumer_is_not_settled_by_its_running_equal() -> None:
    ledger = a_ledger(concurrency=1)
    first = Channel(ledger, 1)
    run = first.run()
    first.deliver()
    assert ledger.retired(1, stale_before=0.0) == [first.last]
    ledger.finished(run, Verdict.DONE)
    Channel(ledger, 2).run(redelivered=True)


def test_a_job_given_back_by_a_drain_is_not_settled_by_an_equal_one_that_ends_in_it() -> None:
    ledger = a_ledger()
    first = Channel(ledger, 1)
    interrupted, slow = first.run(), first.run()
    ledger.drain()
    ledger.finished(interrupted, Verdict.RETURN)
    ledger.finished(slow, Verdict.DEAD)
    first.lose()
    second = Channel(ledger, 2)
    assert second.deliver(redelivered=True) is None
    assert ledger.unstarted() == [second.last]


def test_a_job_that_went_back_runs_once_more_and_is_then_remembered() -> None:
    ledger = a_ledger()
    channel = Channel(ledger, 1)
    ledger.finished(channel.run(), Verdict.RETURN)
    ledger.finished(channel.run(redelivered=True), Verdict.DONE)
    channel.lose()
    assert isinstance(Channel(ledger, 2).deliver(redelivered=True), Settle)


# 5. A drain.


def test_nothing_starts_in_a_drain() -> None:
    ledger = a_ledger(concurrency=1)
    channel = Channel(ledger, 1)
    run = channel.run()
    channel.deliver(OTHER)
    ledger.drain()
    assert channel.deliver(Message(message_id="late")) is None
    ledger.finished(run, Verdict.DONE)
    assert ledger.next() is None
    assert not ledger.running


def test_what_waits_is_given_back_in_the_order_in_which_it_came() -> None:
    ledger = a_ledger(concurrency=1)
    channels = [Channel(ledger, 1), Channel(ledger, 2, "other")]
    ledger.drain()
    came = []
    for channel in reversed(channels):
        for number in range(3):
            channel.deliver(Message(b"%d" % number))
            came.append(channel.last)
    assert ledger.unstarted() == [*came[3:], *came[:3]]
    assert ledger.unstarted() == []


def test_a_redelivery_in_a_drain_still_rejoins_its_run() -> None:
    ledger = a_ledger()
    first = Channel(ledger, 1)
    run = first.run()
    first.lose()
    ledger.drain()
    assert Channel(ledger, 2).deliver(redelivered=True) == Rejoined(run)


def test_a_redelivery_in_a_drain_is_still_settled_from_memory() -> None:
    ledger = a_ledger()
    first = Channel(ledger, 1)
    ledger.finished(first.run(), Verdict.DONE)
    first.lose()
    ledger.drain()
    assert isinstance(Channel(ledger, 2).deliver(redelivered=True), Settle)


def test_a_delivery_on_a_channel_that_is_gone_is_a_mistake() -> None:
    ledger = a_ledger()
    channel = Channel(ledger, 1)
    channel.lose()
    with pytest.raises(IllegalInput, match="channel that is gone"):
        channel.deliver()


def test_a_channel_on_which_something_is_to_be_settled_was_not_closed() -> None:
    ledger = a_ledger()
    channel = Channel(ledger, 1)
    run = channel.run()
    with pytest.raises(IllegalInput, match="with a delivery to settle"):
        ledger.closed(channel.serial)
    # Nothing has changed by that.
    assert ledger.finished(run, Verdict.DONE) == Settle(channel.last, Verdict.DONE)
    channel.run(redelivered=True)


def test_all_that_others_may_use_stands_in_the_description() -> None:
    described = set(re.findall(r"[a-z_]+", str(sys.modules[Ledger.__module__].__doc__)))
    names = {*vars(Ledger), *vars(a_ledger())}
    assert {name for name in names if not name.startswith("_")} <= described
