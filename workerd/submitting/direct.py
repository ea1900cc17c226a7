"""Sends a job to the broker itself, over a connection of its own."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from workerd.backoff import backoff
from workerd.broker.channel import Channel
from workerd.broker.connection import Connection
from workerd.config.model import Broker
from workerd.core import topology
from workerd.core.job import Message
from workerd.core.submission import Submission, explained
from workerd.errors import BrokerError, ErrorKind

#: Seconds for a goodbye, once everything is confirmed.
_CLOSE_TIMEOUT = 1.0

T = TypeVar("T")


async def submit_one(
    broker: Broker, submission: Submission, message: Message, deadline: float
) -> None:
    """Publish until the broker confirms: again, under the same id, after a lost connection."""

    async def attempt() -> Connection:
        connection, channel = await connect(broker, submission)
        publish = submission.publish_at(message, time.time())
        try:
            await channel.publish(publish.exchange, publish.key, publish.message)
        except asyncio.CancelledError:
            raise connection.unconfirmed() from None
        except BrokerError as error:
            raise explained(error, publish.exchange, submission.queue) from None
        return connection

    connection = await until_deadline(attempt, broker, deadline)
    # RabbitMQ logs a warning about everybody who leaves without a goodbye.
    await connection.close(_CLOSE_TIMEOUT)


async def until_deadline(attempt: Callable[[], Awaitable[T]], broker: Broker, deadline: float) -> T:
    """Make attempts while the broker is away, until one succeeds or the time is up.

    Raises the BrokerError of the last one. ``deadline`` is an instant of the monotonic clock.
    """
    places = ", ".join(f"{url.host}:{url.port}" for url in broker.urls)
    last = BrokerError(ErrorKind.AWAY, f"{places}: no answer in time")
    for delay in backoff(0.2, 2.0):
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                return await attempt()
        except TimeoutError:
            raise last from None
        except BrokerError as error:
            if error.kind is not ErrorKind.AWAY or time.monotonic() + delay >= deadline:
                raise
            last = error
        await asyncio.sleep(delay)
    raise AssertionError("backoff never ends")


async def connect(broker: Broker, submission: Submission) -> tuple[Connection, Channel]:
    """A connection to any of the brokers, and a confirming channel. Raises BrokerError."""
    connection = await Connection.to_any(broker, "submit", os.environ)
    channel = await connection.channel()
    if submission.due is not None:
        await _find_due(channel, submission.queue)
    await channel.confirm()
    return connection, channel


async def _find_due(channel: Channel, queue: str) -> None:
    """Raises BrokerError unless the delayed jobs of a queue have somewhere to come due."""
    # No level knows where its jobs will go: a missing destination shows when they are due.
    try:
        await channel.count(topology.due(queue))
    except BrokerError as error:
        raise explained(error, topology.DUE, queue) from None
