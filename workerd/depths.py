"""How many messages wait in the queues of this instance, as the broker counts them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from workerd import topology
from workerd.errors import Kind, Trouble

if TYPE_CHECKING:
    from workerd.broker import Channel, Link
    from workerd.worker import Worker

#: Seconds for which an answer of the broker's is good enough, however many ask.
FRESH = 5.0
#: Seconds to wait for one.
PATIENCE = 1.0
#: After so many seconds an answer is worth nothing any more, be it a refusal.
STALE = 60.0


class Depths:
    """Asks on a channel of its own, since a queue that is missing ends the channel."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._counts: Mapping[str, int] = {}
        self._at = -STALE
        #: When the broker last refused to count a queue. It logs that, so it is asked rarely.
        self._refused: dict[str, float] = {}
        self._asking: asyncio.Task[None] | None = None

    async def look(self) -> Mapping[str, int]:
        """The ready messages by the queue's full name, at most STALE seconds old.

        What the broker does not tell is missing, and all of it while there is no connection.
        """
        link = self._worker.consumer.link
        if link is None:
            return {}
        if time.monotonic() - self._at > FRESH:
            if self._asking is None or self._asking.done():
                self._asking = asyncio.create_task(self._ask(link), name="depths")
            await asyncio.wait({self._asking}, timeout=PATIENCE)
        return self._counts if time.monotonic() - self._at < STALE else {}

    async def _ask(self, link: Link) -> None:
        queues = sorted(self._worker.ledger.concurrency)
        names = [name for queue in queues for name in (queue, topology.due(queue))]
        names += map(topology.dead, queues)
        counts: dict[str, int] = {}
        channel: Channel | None = None
        try:
            for name in names:
                if time.monotonic() - self._refused.get(name, -STALE) < STALE:
                    continue
                if channel is None or channel.ended.done():
                    channel = await link.channel()
                try:
                    counts[name], _ = await channel.count(name)
                except Trouble as trouble:
                    if trouble.kind in (Kind.AWAY, Kind.CLOSED):
                        raise
                    self._refused[name] = time.monotonic()
            if channel is not None and not channel.ended.done():
                await channel.close()
        except Trouble:
            counts = {}  # the connection is gone, and nobody knows
        self._counts, self._at = counts, time.monotonic()
