"""The outbox: what a decision needs is confirmed before its verdict stands, or another one does."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from tests.harness.commands import in_loop
from tests.harness.pools import logged
from tests.harness.samples import MESSAGE
from workerd.config.model import Broker, Settings
from workerd.core.decode import decode
from workerd.core.job import Delivery, Message, Outcome, Report, Run
from workerd.core.republish import Publish
from workerd.core.retry import Decision, Verdict
from workerd.errors import BrokerError, ErrorKind, Unencodable
from workerd.worker.outbox import Outbox
from workerd.worker.stop import Stop

pytestmark = pytest.mark.pure

REPORT = Report(Outcome.FAILED, "exit-status", note="a note")
COPY = Publish("", "q.dead", Message(b"copy"))
DELAYED = Publish("workerd.delay.02", "0.1.q", Message(b"copy"))
DEAD = Decision(Verdict.DEAD, (COPY,), unconfirmed=Verdict.SPEND)
RETRY = Decision(Verdict.RETRY, (DELAYED,), delay=4, unconfirmed=Verdict.SPEND)
#: How the broker answers one publish.
Answer = Callable[[], Awaitable[None]]


async def confirms() -> None:
    """The broker has it."""


async def is_silent() -> None:
    await asyncio.get_running_loop().create_future()


def fails(error: Exception) -> Answer:
    async def answer() -> None:
        raise error

    return answer


FULL = fails(BrokerError(ErrorKind.BUSY, "q.dead is full"))
TOO_LARGE = fails(BrokerError(ErrorKind.TOO_LARGE, "larger than max_message_size"))
AWAY = fails(BrokerError(ErrorKind.AWAY, "the connection was lost"))


class World:
    """An outbox, and a broker that answers as it is said to; the last answer stays."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.published: list[Publish] = []
        #: Whether a queue was paused, each time that was looked at anew.
        self.refusals: list[bool] = []
        self.stop = Stop()
        self.levels = asyncio.Event()
        self.levels.set()
        self.missing: set[str] = set()
        consumer: Any = SimpleNamespace(
            missing=self.missing, declarations=SimpleNamespace(levels=self.levels)
        )
        publisher: Any = self
        settings = Settings(broker=Broker(reconnect_max=0.01))
        self.outbox = Outbox(
            settings,
            publisher,
            consumer,
            self.stop,
            lambda: self.refusals.append(bool(self.outbox.refused)),
        )
        job = decode(MESSAGE, "q")
        self.run = Run(job, Delivery(1, 1, 0.0, job))

    async def publish(self, exchange: str, key: str, message: Message) -> None:
        """As the publisher."""
        self.published.append(Publish(exchange, key, message))
        await (self.answers.pop(0) if len(self.answers) > 1 else self.answers[0])()

    async def verdict(self, decision: Decision) -> Verdict:
        return await self.outbox.publish(self.run, decision, REPORT)


def test_what_needs_nothing_is_not_kept_waiting() -> None:
    async def scenario() -> None:
        world = World(is_silent)
        assert await world.verdict(Decision(Verdict.DONE)) is Verdict.DONE
        assert world.published == []

    in_loop(scenario())


def test_a_verdict_stands_once_all_that_it_needs_is_confirmed() -> None:
    async def scenario() -> None:
        world = World(confirms)
        both = Decision(Verdict.RETRY, (COPY, DELAYED), delay=4)
        assert await world.verdict(both) is Verdict.RETRY
        assert world.published == [COPY, DELAYED]

    with logged() as events:
        in_loop(scenario())
    [event] = [each for each in events if each["event"] == "retry"]
    assert (event["seconds"], event["reason"], event["note"]) == (4, "exit-status", "a note")


def test_a_copy_that_is_refused_is_published_until_it_is_taken_and_pauses_its_queue() -> None:
    async def scenario() -> None:
        world = World(FULL, FULL, confirms)
        assert await world.verdict(DEAD) is Verdict.DEAD
        assert world.published == [COPY] * 3
        assert world.refusals == [True, True, False]

    with logged() as events:
        in_loop(scenario())
    refused = [each["text"] for each in events if each["event"] == "dead letter refused"]
    assert refused == ["q.dead is full"]


@pytest.mark.parametrize("answer", [TOO_LARGE, fails(Unencodable("a number of 100 digits"))])
def test_a_copy_that_the_broker_will_never_take_leaves_the_message_as_it_is(answer: Answer) -> None:
    async def scenario() -> None:
        world = World(answer)
        decision = Decision(Verdict.DEAD, (COPY,), refused=Verdict.REJECT)
        assert await world.verdict(decision) is Verdict.REJECT
        assert world.published == [COPY]
        assert world.refusals == []

    with logged() as events:
        in_loop(scenario())
    assert [each["reason"] for each in events if each["event"] == "moved untouched"] == [
        "exit-status"
    ]


@pytest.mark.parametrize("answer", [AWAY, TOO_LARGE, fails(Unencodable("100 digits"))])
def test_an_outage_or_one_odd_message_pauses_no_queue(answer: Answer) -> None:
    async def scenario() -> None:
        world = World(answer, confirms)
        assert await world.verdict(DEAD) is Verdict.DEAD
        assert world.refusals == []

    in_loop(scenario())


def test_without_a_confirm_before_running_jobs_must_end_the_job_goes_back() -> None:
    async def scenario() -> None:
        world = World(is_silent)
        waiting = asyncio.ensure_future(world.verdict(DEAD))
        await asyncio.sleep(0)
        world.stop.interrupt.set_result(None)
        assert await waiting is Verdict.SPEND

    in_loop(scenario())


def test_while_the_broker_refuses_a_copy_the_end_of_running_jobs_ends_the_attempts() -> None:
    async def scenario() -> None:
        world = World(FULL)
        world.stop.interrupt.set_result(None)
        assert await world.verdict(DEAD) is Verdict.SPEND
        assert world.refusals == [True, False]

    in_loop(scenario())


def test_what_is_delayed_waits_until_the_levels_are_declared() -> None:
    async def scenario() -> None:
        world = World(confirms)
        world.levels.clear()
        waiting = asyncio.ensure_future(world.verdict(RETRY))
        await asyncio.sleep(0)
        assert world.published == []
        world.levels.set()
        assert await waiting is Verdict.RETRY

    in_loop(scenario())


def test_nothing_is_delayed_that_would_come_due_nowhere() -> None:
    async def scenario() -> None:
        world = World(confirms)
        world.missing.add("q.due")
        waiting = asyncio.ensure_future(world.verdict(RETRY))
        while not world.refusals:
            await asyncio.sleep(0)
        assert world.published == []
        world.missing.clear()
        assert await waiting is Verdict.RETRY

    in_loop(scenario())


@pytest.mark.parametrize("answer", [FULL, AWAY, is_silent])
def test_a_copy_instead_of_a_return_has_one_try_and_little_time(answer: Answer) -> None:
    async def scenario() -> None:
        world = World(answer)
        instead = Decision(Verdict.POSTPONE, (COPY,), patience=0.01)
        assert await world.verdict(instead) is Verdict.RETURN
        assert await world.outbox.republish(instead) is Verdict.RETURN
        world.answers = [confirms]
        assert await world.outbox.republish(instead) is Verdict.POSTPONE
        assert world.refusals == []

    in_loop(scenario())
