"""Confirmed publishing, on a connection of its own.

Never on the consuming one: an alarm makes RabbitMQ stop reading from connections that
publish, and acknowledgements would be stuck with the rest.
"""

from __future__ import annotations

import asyncio

from workerd import log
from workerd.broker.channel import Channel
from workerd.broker.connection import Connection
from workerd.broker.errors import CONFIRM_TIMEOUT
from workerd.core.job import Message
from workerd.errors import BrokerError, ErrorKind
from workerd.worker.consumer import Connect


class ConfirmChannel:
    """A confirming channel, while there is one."""

    def __init__(self) -> None:
        self.channel: Channel | None = None
        self.open = asyncio.Event()

    async def run(self, connection: Connection) -> None:
        """Keep a channel open for as long as the connection lives."""
        while not connection.ended.done():
            try:
                channel = await connection.channel()
                await channel.confirm()
            except BrokerError:
                connection.abort("cannot open a channel")
                break
            self.channel = channel
            self.open.set()
            await asyncio.shield(channel.ended)
            self.channel = None
            self.open.clear()


class Publisher:
    """Publishes on whatever connection there is; reconnects by itself while `run` runs."""

    def __init__(self) -> None:
        #: One for the default exchange and one for all others: an exchange that is missing
        #: or forbidden ends the channel, and nobody knows what became of its other messages.
        self._default = ConfirmChannel()
        self._others = ConfirmChannel()
        self._connection: Connection | None = None
        #: What keeps it from publishing, for the status line; "" while nothing is known to.
        self.outage = ""
        #: Set to make the next attempt to connect come now.
        self.wake = asyncio.Event()
        #: Whether the present outage has been logged.
        self._down = False
        #: How many connections were lost: those that we did not close ourselves.
        self.losses = 0

    @property
    def blocked(self) -> str:
        """The alarm that holds up publishing, "" when there is none."""
        return self._connection.blocked if self._connection else ""

    async def run(self, connect: Connect) -> None:
        """Keep the channels open, for ever."""
        async for connection in connect("publish", self._failed, self.wake):
            self._down = False
            self.outage = ""
            self._connection = connection
            await asyncio.gather(self._default.run(connection), self._others.run(connection))
            self._connection = None
            await asyncio.wait({connection.ended})
            self.losses += connection.ended.result().kind is not ErrorKind.CLOSED

    def _failed(self, broker: str, trouble: BrokerError, _delay: float) -> None:
        self.outage = f"{broker}: {trouble}"
        # The consuming connection has warned already when the broker as a whole is away.
        level = (
            log.debug
            if self._down or trouble.kind in (ErrorKind.AWAY, ErrorKind.CLOSED)
            else log.warning
        )
        level("publisher disconnected", broker=broker, text=str(trouble))
        self._down = True

    async def publish(self, exchange: str, key: str, message: Message) -> None:
        """Publish, and return when the broker has confirmed and routed the message.

        Waits for a connection and for the end of an alarm. Raises Unroutable, or BrokerError
        when the message was refused or its fate is unknown: then publish it again.
        """
        confirming = self._others if exchange else self._default
        await confirming.open.wait()
        channel = confirming.channel
        if channel is None:
            raise BrokerError(ErrorKind.AWAY, "the publishing connection was lost")
        confirmed = channel.publish(exchange, key, message)
        while True:
            await asyncio.wait({confirmed}, timeout=CONFIRM_TIMEOUT)
            if confirmed.done():
                return confirmed.result()
            if not self.blocked:
                # No majority of a quorum queue, or a broker that stopped answering.
                raise BrokerError(ErrorKind.AWAY, f"not confirmed within {CONFIRM_TIMEOUT:.0f} s")

    async def close(self, timeout: float) -> None:
        """Close the connection, within ``timeout`` seconds."""
        if self._connection:
            await self._connection.close(timeout)
