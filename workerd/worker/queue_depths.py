"""How many messages wait in the queues of this instance, as the broker counts them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping

from workerd.broker.channel import Channel
from workerd.broker.connection import Connection
from workerd.core import topology
from workerd.errors import BrokerError, ErrorKind
from workerd.worker.consumer import Consumer

#: Seconds for which an answer of the broker's is good enough, however many ask.
FRESH = 2.0
#: Seconds to wait for one.
PATIENCE = 1.0
#: After so many seconds an answer is worth nothing any more.
STALE = 10.0
#: Seconds before a queue that was not there is asked for again: the broker logs each such error.
ABSENT = 60.0


class QueueDepths:
    """Asks on a channel of its own, since a queue that is missing ends the channel.

    Nothing is asked but when somebody wants to know.
    """

    def __init__(self, consumer: Consumer, queues: Callable[[], Iterable[str]]) -> None:
        """``queues`` names the work queues."""
        self._consumer = consumer
        self._queues = queues
        self._counts: Mapping[str, int] = {}
        self._at = float("-inf")
        #: When the broker last refused to count a queue.
        self._refused: dict[str, float] = {}
        self._asking: asyncio.Task[None] | None = None
        self._channel: Channel | None = None

    def glance(self) -> Mapping[str, int]:
        """The ready messages by the queue's full name, as far as is known; better soon.

        What the broker does not tell is missing, and all of it while there is no connection.
        """
        connection = self._consumer.connection
        if connection is None:
            return {}
        idle = self._asking is None or self._asking.done()
        if idle and time.monotonic() - self._at > FRESH:
            self._asking = asyncio.create_task(self._ask(connection), name="depths")
        return self._known()

    async def look(self) -> Mapping[str, int]:
        """The same, but what is not known of late is waited for a little."""
        known = self.glance()
        if self._consumer.connection is None or self._asking is None or self._asking.done():
            return known
        await asyncio.wait({self._asking}, timeout=PATIENCE)
        return self._known()

    def _known(self) -> Mapping[str, int]:
        return self._counts if time.monotonic() - self._at < STALE else {}

    async def _ask(self, connection: Connection) -> None:
        queues = sorted(self._queues())
        names = [name for queue in queues for name in (queue, topology.due(queue))]
        names += map(topology.dead, queues)
        counts: dict[str, int] = {}
        for name in names:
            if time.monotonic() - self._refused.get(name, float("-inf")) < ABSENT:
                continue
            try:
                if self._channel is None or self._channel.ended.done():
                    self._channel = await connection.channel()
                # A connection that is slow to answer must not be lost over it.
                counts[name], _ = await self._channel.count(name, timeout=None)
            except BrokerError as trouble:
                # The broker has closed the channel over it.
                self._channel = None
                if trouble.kind in (ErrorKind.AWAY, ErrorKind.CLOSED):
                    self._counts = {}  # the connection is gone, and nobody knows
                    return
                self._refused[name] = time.monotonic()
        self._counts, self._at = counts, time.monotonic()
