"""Slots, and whose turn it is."""

from __future__ import annotations

import pytest

from tests.harness.ledgers import NAMED, NAMELESS, OTHER, Channel, a_ledger, order
from workerd.core.decisions import Settle
from workerd.core.decode import decode
from workerd.core.dedup import Dedup
from workerd.core.job import Message, Run
from workerd.core.ledger import Ledger
from workerd.core.retry import Verdict


def test_the_longest_waiting_starts_when_a_slot_becomes_free() -> None:
    ledger = a_ledger(concurrency=2)
    channel = Channel(ledger, 1)
    runs = [channel.run(Message(b"%d" % number)) for number in range(2)]
    assert [channel.deliver(Message(b"%d" % number)) for number in (2, 3)] == [None, None]
    assert (ledger.slots.busy("queue"), ledger.slots.waiting("queue")) == (2, 2)
    ledger.finished(runs[1], Verdict.DONE)
    started = ledger.next()
    assert isinstance(started, Run)
    assert started.job.body == b"2"
    assert ledger.next() is None
    assert (ledger.slots.busy("queue"), ledger.slots.waiting("queue")) == (2, 1)


def test_a_queue_has_slots_of_its_own() -> None:
    ledger = a_ledger(concurrency=1)
    Channel(ledger, 1).run()
    Channel(ledger, 2, "other").run()
    assert (ledger.slots.busy("queue"), ledger.slots.busy("other")) == (1, 1)


def test_a_run_without_a_channel_keeps_its_slot() -> None:
    ledger = a_ledger(concurrency=1)
    first = Channel(ledger, 1)
    run = first.run()
    first.lose()
    second = Channel(ledger, 2)
    assert second.deliver(OTHER) is None
    ledger.finished(run, Verdict.DONE)
    assert ledger.next()


def test_what_waits_is_forgotten_with_its_channel_and_no_other() -> None:
    ledger = a_ledger(concurrency=1)
    first, second = Channel(ledger, 1), Channel(ledger, 2)
    first.run()
    first.deliver(OTHER)
    second.deliver(Message(b"kept"))
    first.lose()
    assert ledger.slots.waiting("queue") == 1
    assert ledger.unstarted() == [second.last]


def test_jobs_that_come_due_start_before_those_that_were_never_delayed() -> None:
    ledger = a_ledger(concurrency=1)
    channel = Channel(ledger, 1)
    run = channel.run(Message(message_id="runs"))
    for name in ("backlog-1", "due-1", "backlog-2", "due-2"):
        channel.deliver(Message(message_id=name), delayed=name.startswith("due"))
    assert order(ledger, run) == ["runs", "due-1", "due-2", "backlog-1", "backlog-2"]


def test_nothing_of_a_paused_queue_starts_and_the_others_go_on() -> None:
    ledger = a_ledger()
    ledger.slots.paused = {"queue"}
    assert Channel(ledger, 1).deliver() is None
    Channel(ledger, 2, "other").run(OTHER)
    assert ledger.next() is None
    ledger.slots.paused = set()
    started = ledger.next()
    assert isinstance(started, Run)
    assert started.job.queue == "queue"


def test_one_at_a_time_is_so_across_queues_until_a_handler_has_ended() -> None:
    ledger = a_ledger()
    ledger.slots.one_at_a_time = True
    run = Channel(ledger, 1).run()
    assert Channel(ledger, 2, "other").deliver(OTHER) is None
    ledger.ended(run)  # its copy is still to be published
    assert ledger.next()
    assert ledger.next() is None


def test_what_ran_already_goes_on_when_one_is_started_at_a_time() -> None:
    ledger = a_ledger(concurrency=3)
    channel = Channel(ledger, 1)
    runs = [channel.run(NAMED), channel.run(OTHER)]
    ledger.slots.one_at_a_time = True
    assert channel.deliver(NAMELESS) is None
    ledger.finished(runs[0], Verdict.DONE)
    assert ledger.next() is None
    ledger.finished(runs[1], Verdict.DONE)
    assert ledger.next()


# Jobs whose last start ended with the daemon.


def cut_off(ledger: Ledger, message: Message, times: int = 1) -> None:
    """So many runs of this job have brought the daemon down, or were there when it died."""
    for _ in range(times):
        ledger.dedup.spent(decode(message, "queue").key)


def test_a_suspect_waits_until_no_handler_runs_and_none_starts_beside_it() -> None:
    ledger = a_ledger(concurrency=3)
    channel = Channel(ledger, 1)
    neighbour = channel.run(OTHER)
    cut_off(ledger, NAMED)
    assert channel.deliver(NAMED, redelivered=True) is None
    # Or it would wait for ever.
    assert channel.deliver(Message(message_id="later")) is None
    ledger.ended(neighbour)
    suspect = ledger.next()
    assert isinstance(suspect, Run)
    assert suspect.job.id == "id"
    assert ledger.next() is None
    assert Channel(ledger, 2, "other").deliver(NAMELESS) is None
    ledger.ended(suspect)
    assert ledger.next()
    assert ledger.next()
    assert ledger.next() is None


def test_two_suspects_run_one_after_the_other() -> None:
    ledger = a_ledger()
    channel = Channel(ledger, 1)
    for message in (NAMED, OTHER):
        cut_off(ledger, message)
    run = channel.run(NAMED, redelivered=True)
    assert channel.deliver(OTHER, redelivered=True) is None
    assert order(ledger, run) == ["id", "other"]


def test_the_starts_that_were_cut_off_are_attempts() -> None:
    ledger = a_ledger()
    cut_off(ledger, NAMED, times=2)
    run = Channel(ledger, 1).run(NAMED, redelivered=True)
    assert (run.job.attempt, run.job.lost_starts) == (3, 2)


def test_a_message_that_was_never_delivered_before_is_no_suspect() -> None:
    ledger = a_ledger()
    cut_off(ledger, NAMED)
    channel = Channel(ledger, 1)
    assert channel.run(NAMED).job.attempt == 1
    channel.run(OTHER)


def test_a_run_whose_copy_could_not_be_published_has_spent_its_attempt() -> None:
    ledger = a_ledger()
    channel = Channel(ledger, 1)
    run = channel.run()
    assert ledger.finished(run, Verdict.SPEND) == Settle(channel.last, Verdict.SPEND)
    run = channel.run(redelivered=True)
    assert run.job.attempt == 2
    # A drain takes nothing back of that, and adds nothing.
    ledger.finished(run, Verdict.RETURN)
    run = channel.run(redelivered=True)
    assert run.job.attempt == 2
    ledger.finished(run, Verdict.DONE)
    assert channel.run(redelivered=True).job.attempt == 1


def test_a_suspect_of_a_paused_queue_holds_up_no_other() -> None:
    ledger = a_ledger()
    ledger.slots.paused = {"queue"}
    cut_off(ledger, NAMED)
    assert Channel(ledger, 1).deliver(NAMED, redelivered=True) is None
    Channel(ledger, 2, "other").run(OTHER)


def test_a_suspect_that_waits_is_given_back_like_any_other() -> None:
    ledger = a_ledger()
    channel = Channel(ledger, 1)
    channel.run(OTHER)
    cut_off(ledger, NAMED)
    channel.deliver(NAMED, redelivered=True)
    ledger.drain()
    [back] = ledger.unstarted()
    assert (back.channel, back.tag) == (channel.serial, channel.tag)


def test_one_that_may_have_begun_when_the_daemon_died_runs_alone_and_has_spent_nothing() -> None:
    ledger = Ledger({"queue": 2}, Died())
    channel = Channel(ledger, 1)
    neighbour = channel.run(OTHER)
    assert channel.deliver(NAMED, redelivered=True) is None
    ledger.ended(neighbour)
    suspect = ledger.next()
    assert isinstance(suspect, Run)
    assert (suspect.job.attempt, suspect.job.lost_starts) == (1, 0)
    assert channel.deliver(Message(message_id="later")) is None


class Died(Dedup):
    """Of a daemon that died when its processes had jobs ahead of them."""

    def cut_off(self, key: bytes) -> int | None:
        return 0


# Jobs that are ahead of their slots, in the hands of a handler with warm processes.


def dispatched(capacity: int) -> tuple[Ledger, Channel]:
    ledger = Ledger({"queue": 1, "other": 1}, None, lambda _: False, lambda _: capacity)
    return ledger, Channel(ledger, 1)


def test_a_handler_with_room_gets_more_jobs_than_have_slots() -> None:
    ledger, channel = dispatched(3)
    runs = [channel.run(Message(message_id=str(n))) for n in range(3)]
    assert [run.dispatched for run in runs] == [False, True, True]
    assert channel.deliver(OTHER) is None
    assert (ledger.slots.busy("queue"), ledger.slots.waiting("queue")) == (1, 3)
    ledger.finished(runs[0], Verdict.DONE)
    assert ledger.next()


def test_a_job_that_is_ahead_begins_when_there_is_a_slot_or_behind_one_that_has_one() -> None:
    ledger, channel = dispatched(3)
    first, second, third = (channel.run(Message(message_id=str(n))) for n in range(3))
    assert ledger.slots.may_begin(first)
    assert not ledger.slots.may_begin(second)
    assert not ledger.slots.has_free_slot
    assert ledger.slots.may_begin(second, "queue")
    # What ends there is no slot of this queue.
    assert not ledger.slots.may_begin(second, "other")
    ledger.begins(second)  # its process has told of the end of the first
    assert ledger.slots.busy("queue") == 2
    ledger.finished(first, Verdict.DONE)
    assert not ledger.slots.may_begin(third)
    ledger.finished(second, Verdict.DONE)
    assert ledger.slots.has_free_slot
    assert ledger.slots.may_begin(third)


@pytest.mark.parametrize("trouble", ["pause", "drain", "suspect", "memory"])
def test_a_job_that_is_ahead_does_not_begin_where_nothing_may_start(trouble: str) -> None:
    ledger, channel = dispatched(3)
    first, second = (channel.run(Message(message_id=str(n))) for n in range(2))
    match trouble:
        case "pause":
            ledger.slots.paused = {"queue"}
        case "drain":
            ledger.drain()
        case "suspect":
            cut_off(ledger, NAMED)
            channel.deliver(NAMED, redelivered=True)
        case "memory":
            ledger.slots.one_at_a_time = True
    assert not ledger.slots.may_begin(second, "queue")
    assert channel.deliver(OTHER) is None
    # One that has its slot is not held up, or it would hold up others for ever.
    assert ledger.slots.may_begin(first)
