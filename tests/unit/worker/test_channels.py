"""Settling deliveries on the channel on which they came, and closing what is left of it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from tests.harness.commands import in_loop
from tests.harness.samples import MESSAGE
from workerd.core.decisions import Settle
from workerd.core.decode import decode
from workerd.core.job import Delivery, Run
from workerd.core.ledger import Ledger
from workerd.core.retry import Decision, Verdict
from workerd.worker.channels import Channels

pytestmark = pytest.mark.pure


class FakeChannel:
    """A channel that notes what is done on it."""

    def __init__(self, serial: int) -> None:
        self.serial = serial
        self.ended_in_order = False
        self.before_acks: object = None
        self.done: list[str] = []

    def ack(self, tag: int) -> None:
        self.done.append(f"ack {tag}")

    def requeue(self, tag: int) -> None:
        self.done.append(f"requeue {tag}")

    def reject(self, tag: int) -> None:
        self.done.append(f"reject {tag}")

    async def close(self) -> None:
        self.done.append("close")


class World:
    """Channels over a ledger with one queue; ``verdicts`` are those of what goes back unstarted."""

    def __init__(self, *verdicts: Verdict) -> None:
        self.verdicts = list(verdicts)
        self.ledger = Ledger({"q": 2})
        self.tasks: list[asyncio.Task[None]] = []
        outbox: Any = self
        self.channels = Channels(
            self.ledger, outbox, lambda _delivery: Decision(self.verdicts.pop(0)), self.spawn
        )

    async def republish(self, decision: Decision) -> Verdict:
        """As the outbox."""
        return decision.verdict

    def spawn(self, work: Coroutine[object, object, None], _name: str) -> None:
        self.tasks.append(asyncio.ensure_future(work))

    def opened(self, serial: int = 1) -> Any:
        channel: Any = FakeChannel(serial)
        self.channels.opened(channel)
        return channel

    async def settled(self) -> None:
        while self.tasks:
            await self.tasks.pop(0)


def delivery(tag: int, channel: int = 1) -> Delivery:
    return Delivery(channel, tag, 0.0, decode(MESSAGE, "q"))


@pytest.mark.parametrize(
    ("verdict", "method"),
    [
        (Verdict.DONE, "ack"),
        (Verdict.RETRY, "ack"),
        (Verdict.POSTPONE, "ack"),
        (Verdict.DEAD, "ack"),
        (Verdict.REJECT, "reject"),
        (Verdict.RETURN, "requeue"),
        (Verdict.SPEND, "requeue"),
    ],
)
def test_each_verdict_has_one_method_of_amqp(verdict: Verdict, method: str) -> None:
    async def scenario() -> None:
        world = World()
        channel, other = world.opened(1), world.opened(2)
        world.channels.settle(Settle(delivery(7), verdict))
        assert (channel.done, other.done) == ([f"{method} 7"], [])

    in_loop(scenario())


def test_what_has_not_started_goes_back_in_order_and_a_copy_takes_the_place_of_one() -> None:
    async def scenario() -> None:
        world = World(Verdict.RETURN, Verdict.POSTPONE, Verdict.RETURN)
        channel = world.opened()
        await world.channels.requeue([delivery(1), delivery(2), delivery(3)])
        assert channel.done == ["requeue 1", "ack 2", "requeue 3"]

    in_loop(scenario())


def test_nothing_goes_back_on_a_channel_that_is_lost() -> None:
    async def scenario() -> None:
        world = World(Verdict.RETURN)
        channel = world.opened()
        world.channels.lost(channel)
        await world.channels.requeue([delivery(1)])
        assert channel.done == []
        assert world.channels.open == []

    in_loop(scenario())


def test_a_channel_that_consumes_no_more_is_closed_when_its_last_job_is_settled() -> None:
    async def scenario() -> None:
        world = World(Verdict.RETURN)
        channel = world.opened()
        run = world.ledger.delivered(delivery(1))
        assert isinstance(run, Run)
        world.channels.leave(channel, [delivery(2)])
        await world.settled()
        assert channel.done == ["requeue 2"]
        world.ledger.ended(run)
        order = world.ledger.finished(run, Verdict.DONE)
        assert order is not None
        world.channels.settle(order)
        await world.settled()
        assert channel.done == ["requeue 2", "ack 1", "close"]

    in_loop(scenario())
