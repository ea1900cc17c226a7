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
from workerd.broker.errors import ANSWER_TIMEOUT, CONNECT_TIMEOUT, diagnose, is_noise
from workerd.broker.parameters import parameters
from workerd.broker.pika_patches import Connection
from workerd.config.model import Broker
from workerd.config.url import BrokerURL
from workerd.core.topology import Step
from workerd.errors import Kind, Trouble

#: The first pause before a new attempt to connect, in seconds.
FIRST_PAUSE = 0.2


class Link:
    """One AMQP connection; ``ended`` says why it is over.

    ``blocked`` is the broker's reason while an alarm keeps it from reading what we publish.
    """

    def __init__(self, connection: AsyncioConnection, url: BrokerURL) -> None:
        self.url = url
        self.blocked = ""
        self.ended: asyncio.Future[Trouble] = asyncio.get_running_loop().create_future()
        self._connection = connection

    @classmethod
    async def open(
        cls, url: BrokerURL, broker: Broker, name: str, environ: Mapping[str, str]
    ) -> Link:
        """Connect, log in and open, within CONNECT_TIMEOUT. Raises Trouble.

        The password and the certificates are read anew each time. ``name`` is what
        ``rabbitmqctl list_connections`` shows.
        """
        loop = asyncio.get_running_loop()
        if loop.get_exception_handler() is None:
            loop.set_exception_handler(_show_unless_noise)
        opened: asyncio.Future[None] = loop.create_future()
        connection = Connection(
            parameters(url, broker, name, environ),
            on_open_callback=lambda _c: _resolve(opened, None),
            on_open_error_callback=lambda _c, error: _fail(opened, diagnose(error)),
            custom_ioloop=loop,
        )
        link = cls(connection, url)
        connection.add_on_close_callback(lambda _c, error: link._closed(error))
        connection.add_on_connection_blocked_callback(
            lambda _c, frame: setattr(link, "blocked", str(frame.method.reason) or "alarm")
        )
        connection.add_on_connection_unblocked_callback(
            lambda _c, _frame: setattr(link, "blocked", "")
        )
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                await opened
        except (TimeoutError, asyncio.CancelledError) as error:
            if not (connection.is_closing or connection.is_closed):
                connection.close()  # while opening this only drops the socket
            if isinstance(error, TimeoutError):
                text = f"no AMQP answer within {CONNECT_TIMEOUT:.0f} s"
                raise Trouble(Kind.AWAY, text) from None
            raise
        return link

    @classmethod
    async def to_any(cls, broker: Broker, name: str, environ: Mapping[str, str]) -> Link:
        """Connect to the first broker that answers, in random order; see `open`.

        Raises the last one's Trouble.
        """
        trouble: Trouble | None = None
        for url in random.sample(broker.urls, len(broker.urls)):
            try:
                return await cls.open(url, broker, name, environ)
            except Trouble as error:
                trouble = error
        assert trouble is not None
        raise trouble

    @property
    def version(self) -> tuple[int, ...]:
        """RabbitMQ's version, such as (3, 10, 8); (0,) when a proxy hides it."""
        properties = self._connection.server_properties or {}
        return tuple(map(int, re.findall(r"\d+", str(properties.get("version", "0")))[:3]))

    async def channel(self) -> Channel:
        """Open a channel. Raises Trouble."""
        opened: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        try:
            channel = self._connection.channel(
                on_open_callback=lambda channel: _resolve(opened, channel)
            )
        except pika.exceptions.AMQPError as error:
            raise diagnose(error) from error
        await asyncio.wait(
            {opened, self.ended}, timeout=ANSWER_TIMEOUT, return_when=asyncio.FIRST_COMPLETED
        )
        if opened.done():
            return Channel(self, channel)
        if self.ended.done():
            raise self.ended.result()
        text = f"no answer within {ANSWER_TIMEOUT:.0f} s"
        self.abort(text)
        raise Trouble(Kind.AWAY, text)

    async def declare(self, steps: Iterable[Step]) -> list[Trouble]:
        """Take these steps; returns what the broker objected to. Raises Trouble without it.

        What exists with other arguments stays as it is. The first refused permission ends
        it, for the other steps would be refused too.
        """
        objections: list[Trouble] = []
        channel: Channel | None = None
        for step in steps:
            if channel is None or channel.ended.done():
                channel = await self.channel()
            try:
                await channel.declare(step)
            except Trouble as trouble:
                if trouble.kind is Kind.AWAY:
                    raise
                objections.append(trouble)
                if trouble.kind is Kind.REFUSED:
                    return objections
        if channel and not channel.ended.done():
            await channel.close()
        return objections

    async def close(self, timeout: float) -> None:
        """Close politely; after ``timeout`` seconds drop the socket."""
        if self._connection.is_open:
            self._connection.close()
        await asyncio.wait({self.ended}, timeout=timeout)
        self.abort("closing took too long")

    def abort(self, text: str) -> None:
        """Drop the socket: the peer does not answer."""
        if not self._connection.is_closed:
            # pika has no public way to give up an open connection without the peer's help.
            self._connection._terminate_stream(pika.exceptions.StreamLostError(text))  # noqa: SLF001

    def _closed(self, error: BaseException) -> None:
        if not self.ended.done():
            self.ended.set_result(diagnose(error))


async def links(
    settings: Callable[[], Broker],
    name: str,
    environ: Mapping[str, str],
    on_outage: Callable[[str, Trouble, float], None],
    wake: asyncio.Event,
) -> AsyncIterator[Link]:
    """Open connections, for ever: each is yielded once, when the one before has ended.

    ``settings`` gives those that are valid at each attempt. The brokers are tried in random
    order; when none answers there is a pause, longer each
    time up to ``reconnect_max``, and cut short by ``wake``. ``on_outage`` hears of each
    failed attempt and each lost connection, and in how many seconds the next attempt comes.
    """
    clock = asyncio.get_running_loop().time
    delays = backoff(FIRST_PAUSE, settings().reconnect_max)
    while True:
        broker = settings()
        failures: list[Trouble] = []
        for url in random.sample(broker.urls, len(broker.urls)):
            try:
                link = await Link.open(url, broker, name, environ)
            except Trouble as trouble:
                failures.append(trouble)
                continue
            opened_at = clock()
            try:
                yield link
                failures = [await asyncio.shield(link.ended)]
            finally:
                link.abort("no longer wanted")
            if clock() - opened_at > broker.reconnect_max:
                delays = backoff(FIRST_PAUSE, broker.reconnect_max)
            break
        # What only a human can mend is not asked for every second.
        refused = all(trouble.kind is Kind.REFUSED for trouble in failures)
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
