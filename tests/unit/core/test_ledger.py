"""The ledger: its rules, one by one, and then whatever may happen, in random order."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from tests.harness.episodes import STEPS, Episode
from tests.harness.waiting import examples
from workerd.core.decode import decode
from workerd.core.dedup import Dedup, Elsewhere
from workerd.core.job import ATTEMPT, COPY, REPLAY, Delivery, Message, Run
from workerd.core.ledger import Ledger, Rejoined, Settle
from workerd.core.retry import Verdict

NAMED = Message(b"body", message_id="id")
NAMELESS = Message(b"body")
OTHER = Message(b"body", message_id="other")
#: What workerd itself has published.
COPIED = Message(b"body", message_id="id", headers={COPY: "mark"})

either = pytest.mark.parametrize("message", [NAMED, NAMELESS], ids=["named", "nameless"])
finally_ = pytest.mark.parametrize("verdict", [Verdict.DONE, Verdict.DEAD])

EXAMPLES = examples(1500, 200)


class Channel:
    """A channel that consumes a queue. ``last`` is the latest delivery on it."""

    def __init__(self, ledger: Ledger, serial: int, queue: str = "queue") -> None:
        self.ledger = ledger
        self.serial = serial
        self.queue = queue
        self.tag = 0
        ledger.opened(serial)

    def deliver(
        self,
        message: Message = NAMED,
        redelivered: bool = False,
        received: float = 0.0,
        delayed: bool = False,
    ) -> Run | Settle | Rejoined | None:
        self.tag += 1
        job = decode(message, self.queue, redelivered)
        self.last = Delivery(self.serial, self.tag, received, job, delayed)
        return self.ledger.delivered(self.last)

    def run(self, message: Message = NAMED, redelivered: bool = False) -> Run:
        """Deliver what is to start at once."""
        run = self.deliver(message, redelivered)
        assert isinstance(run, Run)
        assert run.delivery
        assert (run.delivery.channel, run.delivery.tag) == (self.serial, self.tag)
        return run

    def lose(self) -> None:
        self.ledger.lost(self.serial)


def a_ledger(concurrency: int = 2) -> Ledger:
    return Ledger({"queue": concurrency, "other": concurrency})


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


# 4. A job that workerd itself has published is one, however often it comes.


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


@pytest.mark.parametrize("says", [each for each in Elsewhere if each is not Elsewhere.UNKNOWN])
def test_a_copy_whose_twin_came_to_a_sibling_is_settled(says: Elsewhere) -> None:
    ledger = Ledger({"queue": 2}, Sibling(says))
    channel = Channel(ledger, 1)
    assert channel.deliver(COPIED) == Settle(channel.last, Verdict.DONE)
    channel.run(NAMED)


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


# 6. Slots, and whose turn it is.


def test_the_longest_waiting_starts_when_a_slot_becomes_free() -> None:
    ledger = a_ledger(concurrency=2)
    channel = Channel(ledger, 1)
    runs = [channel.run(Message(b"%d" % number)) for number in range(2)]
    assert [channel.deliver(Message(b"%d" % number)) for number in (2, 3)] == [None, None]
    assert (ledger.slots.busy("queue"), ledger.slots.waiting("queue")) == (2, 2)
    ledger.finished(runs[1], Verdict.DONE)
    started = ledger.next()
    assert started
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


def test_a_delivery_on_a_channel_that_is_gone_is_a_mistake() -> None:
    ledger = a_ledger()
    channel = Channel(ledger, 1)
    channel.lose()
    with pytest.raises(AssertionError, match="channel that is gone"):
        channel.deliver()


def order(ledger: Ledger, run: Run | None) -> list[str]:
    """Finish this run and all that start after it, one by one; returns the jobs' ids."""
    ids = []
    while run:
        ids.append(run.job.id)
        ledger.finished(run, Verdict.DONE)
        run = ledger.next()
    return ids


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
    assert started
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
    assert suspect
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
    assert suspect
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


# The memory.


KEY = bytes(range(16))


def anywhere(_channel: int) -> bool:
    return True


def test_the_memory_keeps_the_newest_and_is_bounded() -> None:
    dedup = Dedup(size=100)
    for number in range(1000):
        dedup.settled(number.to_bytes(16, "little"), number % 3)
        assert len(dedup) <= 100
    kept = [number for number in range(1000) if dedup.take(number.to_bytes(16, "little"), anywhere)]
    assert kept == list(range(1000 - len(kept), 1000))
    assert len(kept) >= 75


def test_a_job_is_forgotten_after_four_ages() -> None:
    dedup = Dedup()
    dedup.settled(KEY, 1)
    for _ in range(Dedup.GENERATIONS - 1):
        dedup.age()
        assert len(dedup) == 1
    dedup.age()
    assert not dedup.take(KEY, anywhere)


def test_each_of_equal_jobs_is_remembered_with_its_channel() -> None:
    dedup = Dedup()
    for channel in (1, 1, 2):
        dedup.settled(KEY, channel)
    dedup.age()
    assert dedup.take(KEY, lambda channel: channel == 2)
    assert not dedup.take(KEY, lambda channel: channel == 2)
    assert [dedup.take(KEY, anywhere) for _ in range(3)] == [True, True, False]


def test_an_id_that_never_changes_costs_no_more_than_others() -> None:
    dedup = Dedup()
    tracemalloc.start()
    try:
        for _ in range(10_000):
            dedup.settled(KEY, 1)
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used < 20 * 10_000


# Everything at once.


@pytest.mark.campaign
@pytest.mark.timeout(1800)  # a campaign computes for a minute; on a busy machine that takes a while
@settings(max_examples=EXAMPLES, report_multiple_bugs=False)
@given(st.binary(min_size=60, max_size=60))
@pytest.mark.parametrize("capacity", [0, 5])
def test_no_job_is_lost_and_none_is_run_twice_for_nothing(capacity: int, steps: bytes) -> None:
    episode = Episode(capacity)
    try:
        for step in steps:
            STEPS[step % len(STEPS)](episode)
        episode.conclude()
    finally:
        note("\n".join(episode.story))
