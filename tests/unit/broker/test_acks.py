"""Acknowledgements: every one that is due reaches the broker, and none that is not."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.harness.amqp import Client
from tests.harness.broker import Broker
from tests.harness.waiting import TIMEOUT
from workerd.broker.acks import Acks
from workerd.broker.channel import Channel
from workerd.broker.codec import Incoming
from workerd.broker.connection import Connection
from workerd.config import model
from workerd.config.url import BrokerURL

pytestmark = pytest.mark.pika


class Sent:
    """What a broker has sent on a channel and holds until it is settled, as RabbitMQ does it."""

    def __init__(self, count: int) -> None:
        self.unsettled = list(range(1, count + 1))

    def settle(self, tag: int, multiple: bool = False) -> list[int]:
        """The tags that this settles; an unknown one would end the channel."""
        assert tag in self.unsettled
        settled = [each for each in self.unsettled if each == tag or (multiple and each < tag)]
        self.unsettled = [each for each in self.unsettled if each not in settled]
        return settled


#: Tags in the order in which they are settled, and what is done with each; "send" in between.
ENDS = st.permutations(range(1, 13)).flatmap(
    lambda tags: st.lists(
        st.sampled_from(["ack", "ack", "return", "ack, send", "return, send", "nothing"]),
        min_size=len(tags),
        max_size=len(tags),
    ).map(lambda actions: list(zip(tags, actions, strict=True)))
)


def having_got(count: int) -> Acks:
    acks = Acks()
    for tag in range(1, count + 1):
        acks.came(tag)
    return acks


@given(ENDS)
def test_exactly_what_is_to_be_acknowledged_is(ends: list[tuple[int, str]]) -> None:
    sent, acks = Sent(len(ends)), having_got(len(ends))
    due: set[int] = set()

    def send() -> None:
        assert bool(acks) == bool(due)
        acknowledged = [each for ack in acks.take() for each in sent.settle(*ack)]
        assert sorted(acknowledged) == sorted(due)
        due.clear()

    for tag, action in ends:
        if action.startswith("ack"):
            acks.add(tag)
            due.add(tag)
        elif action.startswith("return"):
            assert sent.settle(tag) == [tag]
            acks.settled(tag)
        if action.endswith("send"):
            send()
    send()


def test_what_ends_together_is_acknowledged_in_one_frame() -> None:
    acks = having_got(8)
    for tag in (2, 1, 3, 5, 7):
        acks.add(tag)
    assert acks.take() == [(3, True), (5, False), (7, False)]
    for tag in (6, 4):
        acks.add(tag)
    assert acks.take() == [(6, True)]
    assert acks.take() == []


def test_what_ends_beside_a_long_job_takes_no_memory() -> None:
    acks = having_got(1)
    tracemalloc.start()
    try:
        for tag in range(2, 20_000):
            acks.came(tag)
            acks.add(tag)
            assert acks.take() == [(tag, False)]
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size < 10_000
    acks.add(1)
    assert acks.take() == [(1, False)]


def settling(broker: Broker, queue: str, count: int, order: Iterable[tuple[str, int]]) -> list[str]:
    """Take so many messages, do this with the tags at once, and close; what happened, in order."""
    happened: list[str] = []

    async def settle() -> None:
        link = await Connection.open(BrokerURL.parse(broker.url), model.Broker(), "test", {})
        channel = await link.channel()
        channel.before_acks = lambda: happened.append("before")
        came: list[int] = []
        all_came = asyncio.Event()

        def take(_channel: Channel, incoming: Incoming) -> None:
            came.append(incoming.tag)
            if len(came) == count:
                all_came.set()

        await channel.consume(queue, count, "consumer", take, lambda _channel: None)
        await asyncio.wait_for(all_came.wait(), TIMEOUT)
        for verb, tag in order:
            getattr(channel, verb)(tag)
        happened.append("settled")
        await channel.close()
        happened.append("closed in order" if channel.ended_in_order else "closed")
        await link.close(TIMEOUT)

    asyncio.run(settle())
    return happened


def test_the_broker_has_it_all_when_a_channel_is_closed(broker: Broker, client: Client) -> None:
    client.declare("jobs")
    for number in range(8):
        client.publish("jobs", message_id=str(number + 1))
    order = [("ack", 3), ("ack", 1), ("give_back", 2), ("ack", 4), ("ack", 6), ("reject", 7)]
    happened = settling(broker, "jobs", 8, order)
    assert [message.id for message in client.drain("jobs")] == ["2", "5", "8"]
    # The memory is asked to be written before they go.
    assert happened == ["settled", "before", "closed in order"]


@pytest.mark.parametrize(("verb", "end"), [("give_back", "closed"), ("ack", "closed in order")])
def test_an_acknowledgement_behind_many_returns_is_not_taken_for_read(
    broker: Broker, client: Client, verb: str, end: str
) -> None:
    """RabbitMQ (3.10, quorum queues) forgets it, more often than not, and answers all the same."""
    client.declare("jobs")
    for number in range(80):
        client.publish("jobs", message_id=str(number + 1))
    # One in two, so that acknowledgements go one by one as well.
    order = [*((verb, tag) for tag in range(1, 79, 2)), ("ack", 80)]
    assert settling(broker, "jobs", 80, order)[-1] == end
