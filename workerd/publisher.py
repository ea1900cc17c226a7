"""Confirmed publishing, on a connection of its own.

Never on the consuming one: an alarm makes RabbitMQ stop reading from connections that
publish, and acknowledgements would be stuck with the rest.
"""

from __future__ import annotations

import asyncio

from workerd import log
from workerd.broker import CONFIRM_TIMEOUT, Channel
from workerd.consumer import Connect
from workerd.errors import Kind, Trouble
from workerd.job import Message


class Publisher:
    """Publishes on whatever connection there is; reconnects by itself while `run` runs."""

    def __init__(self) -> None:
        self._channel: Channel | None = None
        self._open = asyncio.Event()
        #: Whether the present outage has been logged.
        self._down = False

    @property
    def blocked(self) -> str:
        """The alarm that holds up publishing, "" when there is none."""
        return self._channel.link.blocked if self._channel else ""

    async def run(self, connect: Connect) -> None:
        """Keep a confirming channel open, for ever."""
        async for link in connect("publish", self._failed, asyncio.Event()):
            self._down = False
            while not link.ended.done():
                try:
                    channel = await link.channel()
                    await channel.confirm()
                except Trouble:
                    link.abort("cannot open a channel")
                    break
                self._channel = channel
                self._open.set()
                await asyncio.shield(channel.ended)
                self._channel = None
                self._open.clear()

    def _failed(self, broker: str, trouble: Trouble, _delay: float) -> None:
        # The consuming connection has warned already when the broker as a whole is away.
        level = log.debug if self._down or trouble.kind in (Kind.AWAY, Kind.CLOSED) else log.warning
        level("publisher disconnected", broker=broker, text=str(trouble))
        self._down = True

    async def publish(self, exchange: str, key: str, message: Message) -> None:
        """Publish, and return when the broker has confirmed and routed the message.

        Waits for a connection and for the end of an alarm. Raises Unroutable, or Trouble
        when the message was refused or its fate is unknown: then publish it again.
        """
        await self._open.wait()
        channel = self._channel
        if channel is None:
            raise Trouble(Kind.AWAY, "the publishing connection was lost")
        confirmed = channel.publish(exchange, key, message)
        while True:
            await asyncio.wait({confirmed}, timeout=CONFIRM_TIMEOUT)
            if confirmed.done():
                return confirmed.result()
            if not channel.link.blocked:
                # No majority of a quorum queue, or a broker that stopped answering.
                raise Trouble(Kind.AWAY, f"not confirmed within {CONFIRM_TIMEOUT:.0f} s")

    async def close(self, timeout: float) -> None:
        """Close the connection, within ``timeout`` seconds."""
        if self._channel:
            await self._channel.link.close(timeout)
