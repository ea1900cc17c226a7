"""A channel of a real broker: what comes on it, and what is settled there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

import pytest

from tests.harness.amqp import Client
from tests.harness.broker import Broker
from tests.harness.waiting import TIMEOUT
from workerd.broker.channel import Channel
from workerd.broker.codec import Incoming
from workerd.broker.connection import Connection
from workerd.config import model
from workerd.config.url import BrokerURL
from workerd.core.job import Message
from workerd.errors import BrokerError, ErrorKind

pytestmark = pytest.mark.pika


@asynccontextmanager
async def a_channel(broker: Broker) -> AsyncIterator[Channel]:
    connection = await Connection.open(BrokerURL.parse(broker.url), model.Broker(), "test", {})
    try:
        yield await connection.channel()
    finally:
        await connection.close(TIMEOUT)


async def take(channel: Channel, queue: str, count: int, ack: bool = False) -> list[Incoming]:
    """So many messages of a queue; each acknowledged as it comes, where ``ack``."""
    came: list[Incoming] = []
    all_came = asyncio.Event()

    def take(_channel: Channel, incoming: Incoming) -> None:
        came.append(incoming)
        if ack:
            channel.ack(incoming.tag)
        if len(came) == count:
            all_came.set()

    prefetch = 30 if ack else count
    await channel.consume(queue, prefetch, "consumer", take, lambda _channel: None)
    await asyncio.wait_for(all_came.wait(), TIMEOUT)
    return came


def settling(broker: Broker, queue: str, count: int, order: Iterable[tuple[str, int]]) -> list[str]:
    """Take so many messages, do this with the tags at once, and close; what happened, in order."""
    happened: list[str] = []

    async def settle() -> None:
        async with a_channel(broker) as channel:
            channel.before_acks = lambda: happened.append("before")
            await take(channel, queue, count)
            for verb, tag in order:
                getattr(channel, verb)(tag)
            happened.append("settled")
            await channel.close()
            happened.append("closed in order" if channel.ended_in_order else "closed")

    asyncio.run(settle())
    return happened


def test_the_broker_has_it_all_when_a_channel_is_closed(broker: Broker, client: Client) -> None:
    client.declare("jobs")
    for number in range(8):
        client.publish("jobs", message_id=str(number + 1))
    order = [("ack", 3), ("ack", 1), ("requeue", 2), ("ack", 4), ("ack", 6), ("reject", 7)]
    happened = settling(broker, "jobs", 8, order)
    assert [message.id for message in client.drain("jobs")] == ["2", "5", "8"]
    # The run log is asked to be written before they go.
    assert happened == ["settled", "before", "closed in order"]


@pytest.mark.parametrize(("verb", "end"), [("requeue", "closed"), ("ack", "closed in order")])
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


def test_messages_of_all_sizes_come_whole_and_in_order(client: Client, broker: Broker) -> None:
    """Small ones are read here, and those of many frames by pika, on the same channel."""
    client.declare("mixed")
    bodies = [bytes([number % 256]) * (number**3 % 300_007) for number in range(120)]
    for number, body in enumerate(bodies):
        client.publish("mixed", body, message_id=str(number))

    async def receive() -> list[Incoming]:
        async with a_channel(broker) as channel:
            came = await take(channel, "mixed", len(bodies), ack=True)
            await channel.close()
            return came

    came = asyncio.run(receive())
    assert [(each.tag, each.message.message_id) for each in came] == [
        (number + 1, str(number)) for number in range(len(bodies))
    ]
    assert [each.message.body for each in came] == bodies
    assert client.ready("mixed") == 0


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        (Message(expiration="soon"), ErrorKind.UNACCEPTABLE),
        (Message(headers={"CC": 5}), None),  # it is left out: the broker would close the channel
        (Message(headers={"h": "x" * 200_000}), ErrorKind.TOO_LARGE),
        (Message(b"x" * 200_000), None),
    ],
    ids=["property", "header", "frame", "fine"],
)
def test_a_refusal_of_one_message_is_told_from_an_outage(
    broker: Broker, client: Client, message: Message, kind: ErrorKind | None
) -> None:
    client.declare("jobs")

    async def publish() -> ErrorKind | None:
        async with a_channel(broker) as channel:
            await channel.confirm()
            try:
                await channel.publish("", "jobs", message)
            except BrokerError as error:
                return error.kind
            return None

    assert asyncio.run(publish()) is kind
