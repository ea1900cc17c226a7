"""Several instances on one host: together they lose nothing and run nothing twice for nothing."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from tests.harness.ledgers import COPIED, NAMED, OTHER
from tests.harness.siblings import STEPS, Host
from tests.harness.waiting import examples
from workerd.core.decisions import Rejoined, Settle
from workerd.core.decode import decode
from workerd.core.job import Delivery, Message, Run
from workerd.core.ledger import PATIENCE, Ledger
from workerd.core.retry import Verdict
from workerd.runlog.writer import RunLog

LONG = Message(message_id="long")

EXAMPLES = examples(300, 50)


@pytest.fixture
def ledger(tmp_path: Path) -> Callable[[str], Ledger]:
    """Makes the ledger of an instance of one host."""
    return lambda name: Ledger({"queue": 1}, RunLog(tmp_path, name, 3600.0, pytest.fail))


def deliver(
    ledger: Ledger, channel: int, redelivered: bool = False, message: Message = NAMED
) -> tuple[Delivery, Run | Settle | Rejoined | None]:
    """The message arrives on a new channel."""
    ledger.opened(channel)
    job = decode(message, "queue", redelivered)
    delivery = Delivery(channel, 1, 0.0, job)
    return delivery, ledger.delivered(delivery)


def dies(ledger: Ledger) -> None:
    assert isinstance(ledger.dedup, RunLog)
    ledger.dedup.close()
    os.close(ledger.dedup._lock)


@pytest.mark.parametrize("stale_before", [0.0, 1.0], ids=["the worker did not know", "it knew"])
def test_a_job_that_timed_out_is_not_run_beside_the_instance_that_still_runs_it(
    ledger: Callable[[str], Ledger], stale_before: float
) -> None:
    one, two = ledger("1"), ledger("2")
    _, run = deliver(one, 1)
    assert isinstance(run, Run)
    one.retired(1, stale_before)
    delivery, decision = deliver(two, 1, redelivered=True)
    assert decision is None
    assert two.look_again(2 * PATIENCE) == []
    one.finished(run, Verdict.DONE)
    assert two.look_again(3 * PATIENCE) == [Settle(delivery, Verdict.DONE)]


def test_a_held_job_that_the_other_instance_gives_back_is_run_and_then_remembered(
    ledger: Callable[[str], Ledger],
) -> None:
    one, two = ledger("1"), ledger("2")
    _, run = deliver(one, 1)
    assert isinstance(run, Run)
    one.lost(1)
    _, decision = deliver(two, 1, redelivered=True)
    assert decision is None
    one.finished(run, Verdict.RETURN)
    (run_here,) = two.look_again(1.0)
    assert isinstance(run_here, Run)
    two.finished(run_here, Verdict.DONE)
    two.lost(1)
    delivery, decision = deliver(one, 2, redelivered=True)
    assert decision == Settle(delivery, Verdict.DONE)


def test_the_last_verdict_of_an_instance_that_died_settles_a_redelivery_at_once(
    ledger: Callable[[str], Ledger],
) -> None:
    one, two = ledger("1"), ledger("2")
    _, run = deliver(one, 1)
    assert isinstance(run, Run)
    one.finished(run, Verdict.DONE)
    dies(one)
    delivery, decision = deliver(two, 1, redelivered=True)
    assert decision == Settle(delivery, Verdict.DONE)


def freed(ledger: Ledger, message: Message, channel: int) -> Run:
    """Take the only slot of a ledger, on a channel of its own."""
    ledger.opened(channel)
    run = ledger.delivered(Delivery(channel, 1, 0.0, decode(message, "queue")))
    assert isinstance(run, Run)
    return run


def a_sibling_with_a_past(ledger: Callable[[str], Ledger]) -> tuple[Ledger, Ledger]:
    """Instance 1, where a message waits for a slot, and 2, restarted since it finished its equal.

    What 2 acknowledged may have been lost.
    """
    one, two = ledger("1"), ledger("2")
    _, run = deliver(two, 1)
    assert isinstance(run, Run)
    two.finished(run, Verdict.DONE)
    dies(two)
    freed(one, LONG, 1)
    _, decision = deliver(one, 2)
    assert decision is None
    return one, ledger("2")


def test_of_two_equal_messages_the_one_that_waited_with_a_killed_instance_is_run(
    ledger: Callable[[str], Ledger],
) -> None:
    one, two = a_sibling_with_a_past(ledger)
    # It is killed, and its guardian still holds its lock: nobody can know.
    assert isinstance(one.dedup, RunLog)
    one.dedup.close()
    _, decision = deliver(two, 1, redelivered=True)
    assert isinstance(decision, Run)


def test_one_that_had_begun_with_a_killed_instance_is_held_and_then_run(
    ledger: Callable[[str], Ledger],
) -> None:
    one, two = ledger("1"), ledger("2")
    _, run = deliver(two, 1)
    assert isinstance(run, Run)
    two.finished(run, Verdict.DONE)
    dies(two)
    two = ledger("2")
    deliver(one, 1)
    assert isinstance(one.dedup, RunLog)
    one.dedup.close()
    _, decision = deliver(two, 1, redelivered=True)
    assert decision is None
    os.close(one.dedup._lock)
    (run_here,) = two.look_again(1.0)
    assert isinstance(run_here, Run)


def test_what_an_instance_gives_back_late_was_taken_already_and_lets_nothing_run_again(
    ledger: Callable[[str], Ledger],
) -> None:
    one, two = a_sibling_with_a_past(ledger)
    # The broker has taken back what waits at 1, which is frozen, and gives it to 2.
    _, run = deliver(two, 1, redelivered=True)
    assert isinstance(run, Run)
    two.finished(run, Verdict.DONE)
    one.lost(2)
    # Both acks are lost, and nothing else is left: both are settled from memory.
    two.lost(1)
    for channel in (2, 3):
        delivery, decision = deliver(two, channel, redelivered=True)
        assert decision == Settle(delivery, Verdict.DONE)


def test_a_redelivery_taken_for_one_that_ended_there_leaves_the_next_return_alone(
    ledger: Callable[[str], Ledger],
) -> None:
    one, two = a_sibling_with_a_past(ledger)
    _, run = deliver(two, 1, redelivered=True)
    assert isinstance(run, Run)
    two.finished(run, Verdict.DONE)
    # It was another message: the one at 1 runs there, and a third one goes back.
    one.finished(next(iter(one.running)), Verdict.DONE)
    started = one.next()
    assert isinstance(started, Run)
    _, decision = deliver(one, 3)
    assert decision is None
    one.finished(started, Verdict.DONE)
    one.lost(3)
    two.lost(1)
    _, decision = deliver(two, 4, redelivered=True)
    assert isinstance(decision, Run)


def test_a_verdict_settled_from_memory_ends_no_run_of_an_equal_message(
    ledger: Callable[[str], Ledger],
) -> None:
    one, two = ledger("1"), ledger("2")
    _, run = deliver(one, 1)
    assert isinstance(run, Run)
    one.finished(run, Verdict.DONE)
    one.lost(1)
    deliver(one, 2)  # runs
    delivery, decision = deliver(one, 3, redelivered=True)
    assert decision == Settle(delivery, Verdict.DONE)
    one.lost(2)
    _, decision = deliver(two, 1, redelivered=True)
    assert decision is None  # it waits for the run at 1
    assert two.held


@pytest.mark.parametrize("sibling", ["starts", "finishes"])
def test_two_copies_that_wait_at_two_instances_are_run_once(
    sibling: str, ledger: Callable[[str], Ledger]
) -> None:
    one, two = ledger("1"), ledger("2")
    busy = [freed(one, LONG, 1), freed(two, OTHER, 1)]
    # They arrive in one instant: neither sees the other.
    look, two.dedup.look = two.dedup.look, lambda: None  # type: ignore[method-assign]
    for each in (one, two):
        assert deliver(each, 2, message=COPIED)[1] is None
    two.dedup.look = look  # type: ignore[method-assign]
    one.finished(busy[0], Verdict.DONE)
    run = one.next()
    assert isinstance(run, Run)
    if sibling == "finishes":
        one.finished(run, Verdict.DONE)
    two.finished(busy[1], Verdict.DONE)
    decision = two.next()
    assert isinstance(decision, Settle)
    assert (decision.delivery.channel, decision.verdict) == (2, Verdict.DONE)
    assert two.next() is None
    assert (two.slots.busy("queue"), two.slots.waiting("queue"), two.running) == (0, 0, set())


def test_a_copy_is_settled_when_its_twin_waits_at_a_sibling(
    ledger: Callable[[str], Ledger],
) -> None:
    one, two = ledger("1"), ledger("2")
    freed(one, LONG, 1)
    assert deliver(one, 2, message=COPIED)[1] is None
    delivery, decision = deliver(two, 1, message=COPIED)
    assert decision == Settle(delivery, Verdict.DONE)


def test_a_redelivered_copy_that_waited_is_held_while_its_run_goes_on_at_a_sibling(
    ledger: Callable[[str], Ledger],
) -> None:
    one, two = ledger("1"), ledger("2")
    busy = [freed(one, LONG, 1), freed(two, OTHER, 1)]
    assert deliver(one, 2, message=COPIED)[1] is None
    # Taken back from 1, which does not know, and given to 2.
    delivery, decision = deliver(two, 2, redelivered=True, message=COPIED)
    assert decision is None
    one.finished(busy[0], Verdict.DONE)
    run = one.next()
    assert isinstance(run, Run)
    two.finished(busy[1], Verdict.DONE)
    assert two.next() is None
    assert two.held == [delivery]
    one.lost(2)
    one.finished(run, Verdict.DONE)
    assert two.look_again(1.0) == [Settle(delivery, Verdict.DONE)]


@pytest.mark.campaign
@pytest.mark.timeout(1800)  # a campaign computes for a minute; on a busy machine that takes a while
@settings(max_examples=EXAMPLES, report_multiple_bugs=False)
@given(st.binary(min_size=50, max_size=50))
def test_two_instances_lose_no_job_and_run_none_twice_for_nothing(steps: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        host = Host(Path(folder))
        try:
            for step in steps:
                STEPS[step % len(STEPS)](host)
            host.conclude()
        finally:
            note("\n".join(host.story))
            host.close()
