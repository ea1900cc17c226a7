"""One AMQP connection, and the endless supply of them."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any

import pika
import pika.exceptions
from pika.adapters.asyncio_connection import AsyncioConnection

from workerd.backoff import backoff
from workerd.broker.channel import Channel
from workerd.broker.errors import (
    ANSWER_TIMEOUT,
    CONNECT_TIMEOUT,
    diagnose,
    is_noise,
    with_addresses,
)
from workerd.broker.parameters import parameters
from workerd.broker.pika_patches import PikaConnection
from workerd.config.model import Broker
from workerd.config.url import BrokerURL
from workerd.core.topology import Step
from workerd.errors import BrokerError, ErrorKind

#: The first pause before a new attempt to connect, in seconds.
FIRST_PAUSE = 0.2
#: All properties and headers of a message must fit one frame: those of the sender take 64 KiB at
#: most, the error of a dead letter 8 KiB, and what else workerd says of it little. In bytes.
NEEDED_FRAME = 80 << 10


class Connection:
    """One AMQP connection; ``ended`` says why it is over.

    ``blocked`` is the broker's reason while an alarm keeps it from reading what we publish.
    """

    def __init__(self, amqp: AsyncioConnection, url: BrokerURL) -> None:
        self.url = url
        self.blocked = ""
        self.ended: asyncio.Future[BrokerError] = asyncio.get_running_loop().create_future()
        self._amqp = amqp

    @classmethod
    async def open(
        cls, url: BrokerURL, broker: Broker, name: str, environ: Mapping[str, str]
    ) -> Connection:
        """Connect, log in and open, within CONNECT_TIMEOUT. Raises BrokerError.

        The password and the certificates are read anew each time. ``name`` is what
        ``rabbitmqctl list_connections`` shows.
        """
        loop = asyncio.get_running_loop()
        if loop.get_exception_handler() is None:
            loop.set_exception_handler(_show_unless_noise)
        opened: asyncio.Future[None] = loop.create_future()
        amqp = PikaConnection(
            parameters(url, broker, name, environ),
            on_open_callback=lambda _c: _resolve(opened, None),
            on_open_error_callback=lambda connection, error: _fail(
                opened, with_addresses(diagnose(error), connection.params.attempts)
            ),
            custom_ioloop=loop,
        )
        connection = cls(amqp, url)
        amqp.add_on_close_callback(lambda _c, error: connection._closed(error))
        amqp.add_on_connection_blocked_callback(
            lambda _c, frame: setattr(connection, "blocked", str(frame.method.reason) or "alarm")
        )
        amqp.add_on_connection_unblocked_callback(
            lambda _c, _frame: setattr(connection, "blocked", "")
        )
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                await opened
        except (TimeoutError, asyncio.CancelledError) as error:
            if not (amqp.is_closing or amqp.is_closed):
                amqp.close()  # while opening this only drops the socket
            if isinstance(error, TimeoutError):
                text = f"no AMQP answer within {CONNECT_TIMEOUT:.0f} s"
                late = BrokerError(ErrorKind.AWAY, text)
                raise with_addresses(late, amqp.params.attempts) from None
            raise
        return connection

    @classmethod
    async def to_any(cls, broker: Broker, name: str, environ: Mapping[str, str]) -> Connection:
        """Connect to the first broker that answers, in random order; see `open`.

        Raises the last one's BrokerError, with its name.
        """
        urls = random.sample(broker.urls, len(broker.urls))
        for url in urls[:-1]:
            with contextlib.suppress(BrokerError):
                return await cls.open(url, broker, name, environ)
        try:
            return await cls.open(urls[-1], broker, name, environ)
        except BrokerError as error:
            where = f"{urls[-1].host}:{urls[-1].port}"
            raise BrokerError(error.kind, f"{where}: {error}", error.code) from None

    @property
    def version(self) -> tuple[int, ...]:
        """RabbitMQ's version, such as (3, 10, 8); (0,) when a proxy hides it."""
        properties = self._amqp.server_properties or {}
        return tuple(map(int, re.findall(r"\d+", str(properties.get("version", "0")))[:3]))

    def shortages(self, queues: int) -> list[str]:
        """What the broker's limits do not allow an instance that consumes so many queues."""
        # For each queue another one where its delayed jobs come due; one to declare, one to count.
        need = 2 * queues + 2
        channels, frame = self._amqp.params.channel_max, self._amqp.params.frame_max
        found = []
        if channels < need:
            found.append(
                f"the broker allows {channels} channels on a connection, and {queues} queues need "
                f"{need}: raise channel_max in rabbitmq.conf, or let this instance consume less"
            )
        if 0 < frame < NEEDED_FRAME:
            found.append(
                f"a frame of this broker has {frame} bytes, and the headers of a dead letter need "
                f"up to {NEEDED_FRAME}: raise frame_max in rabbitmq.conf"
            )
        return found

    async def channel(self) -> Channel:
        """Open a channel. Raises BrokerError."""
        opened: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        try:
            channel = self._amqp.channel(on_open_callback=lambda channel: _resolve(opened, channel))
        except pika.exceptions.NoFreeChannels:
            most = self._amqp.params.channel_max
            text = f"all {most} channels that the broker allows on a connection are in use"
            raise BrokerError(ErrorKind.BUSY, f"{text}: raise its channel_max") from None
        except pika.exceptions.AMQPError as error:
            raise diagnose(error) from error
        await asyncio.wait(
            {opened, self.ended}, timeout=ANSWER_TIMEOUT, return_when=asyncio.FIRST_COMPLETED
        )
        if opened.done():
            return Channel(channel, self.abort)
        if self.ended.done():
            raise self.ended.result()
        text = f"no answer within {ANSWER_TIMEOUT:.0f} s"
        self.abort(text)
        raise BrokerError(ErrorKind.AWAY, text)

    async def declare(self, steps: Iterable[Step]) -> list[BrokerError]:
        """Take these steps; returns what the broker objected to. Raises BrokerError(AWAY).

        What exists with other arguments stays as it is. No step is taken after the first refused
        permission: the others would be refused too.
        """
        objections: list[BrokerError] = []
        channel: Channel | None = None
        for step in steps:
            if channel is None or channel.ended.done():
                channel = await self.channel()
            try:
                await channel.declare(step)
            except BrokerError as error:
                if error.kind is ErrorKind.AWAY:
                    raise
                objections.append(error)
                if error.kind is ErrorKind.REFUSED:
                    return objections
        if channel and not channel.ended.done():
            await channel.close()
        return objections

    def unconfirmed(self) -> BrokerError:
        """Why a message that was published here has no confirm in time: an alarm, or silence."""
        if self.blocked:
            text = f"the broker takes nothing at present: {self.blocked}"
            return BrokerError(ErrorKind.BUSY, text)
        return BrokerError(ErrorKind.AWAY, "the broker did not confirm in time")

    async def close(self, timeout: float) -> None:
        """Close politely; after ``timeout`` seconds drop the socket."""
        if self._amqp.is_open:
            self._amqp.close()
        await asyncio.wait({self.ended}, timeout=timeout)
        self.abort("closing took too long")

    def abort(self, text: str) -> None:
        """Drop the socket: the peer does not answer."""
        if not self._amqp.is_closed:
            # pika has no public way to give up an open connection without the peer's help.
            self._amqp._terminate_stream(pika.exceptions.StreamLostError(text))  # noqa: SLF001

    def _closed(self, error: BaseException) -> None:
        if not self.ended.done():
            self.ended.set_result(diagnose(error))


async def connections(
    settings: Callable[[], Broker],
    name: str,
    environ: Mapping[str, str],
    on_outage: Callable[[str, BrokerError, float], None],
    wake: asyncio.Event,
) -> AsyncIterator[Connection]:
    """Open connections, for ever: each is yielded once, when the one before has ended.

    ``settings`` gives those that are valid at each attempt. The brokers are tried in random
    order; when none answers there is a pause, longer each time up to ``reconnect_max``, and cut
    short by ``wake``. ``on_outage`` is called after each failed attempt and each lost connection,
    with the host, the error, and the seconds until the next attempt.
    """
    clock = asyncio.get_running_loop().time
    delays = backoff(FIRST_PAUSE, settings().reconnect_max)
    while True:
        broker = settings()
        failures: list[BrokerError] = []
        for url in random.sample(broker.urls, len(broker.urls)):
            try:
                connection = await Connection.open(url, broker, name, environ)
            except BrokerError as error:
                failures.append(error)
                continue
            opened_at = clock()
            try:
                yield connection
                failures = [await asyncio.shield(connection.ended)]
            finally:
                connection.abort("no longer wanted")
            if clock() - opened_at > broker.reconnect_max:
                delays = backoff(FIRST_PAUSE, broker.reconnect_max)
            break
        # What only a human can mend is not asked for every second.
        refused = all(error.kind is ErrorKind.REFUSED for error in failures)
        delay = broker.reconnect_max if refused else next(delays)
        on_outage(url.host, failures[-1], delay)
        wake.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(wake.wait(), delay)


def _show_unless_noise(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    if not is_noise(context.get("exception")):
        loop.default_exception_handler(context)


def _resolve(future: asyncio.Future[Any], value: Any) -> None:
    if not future.done():
        future.set_result(value)


def _fail(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
