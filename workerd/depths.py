"""How many messages wait at the broker, counted only while somebody wants to know."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from workerd import topology
from workerd.errors import Kind, Trouble

if TYPE_CHECKING:
    from workerd.broker import Channel, Link
    from workerd.worker import Worker

#: Seconds between two counts, at least.
INTERVAL = 2.0
#: Seconds after which a count says nothing any more.
FRESH = 10.0
#: Seconds before a queue that was not there is asked for again: the broker logs each such error.
ABSENT = 60.0


class Depths:
    """The numbers of ready messages in the queues of a worker, as of a few seconds ago."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._wanted = asyncio.Event()
        self._counts: dict[str, tuple[int, float]] = {}
        self._absent: dict[str, float] = {}
        self._channel: Channel | None = None

    def of(self, queue: str) -> Mapping[str, int | None]:
        """What is known now of a work queue, None for what is not; it is counted anew soon."""
        self._wanted.set()
        names = {"ready": queue, "due": topology.due(queue), "dead": topology.dead(queue)}
        return {key: self._known(name) for key, name in names.items()}

    def _known(self, name: str) -> int | None:
        count, when = self._counts.get(name, (0, float("-inf")))
        return count if time.monotonic() - when < FRESH else None

    async def run(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            link = self._worker.consumer.link
            if link is not None:
                # What happens to the connection is not ours to tell.
                with contextlib.suppress(Trouble):
                    await self._count_all(link)
            await asyncio.sleep(INTERVAL)

    async def _count_all(self, link: Link) -> None:
        """Raises Trouble."""
        for queue in sorted(self._worker.ledger.concurrency):
            for name in (queue, topology.due(queue), topology.dead(queue)):
                if time.monotonic() < self._absent.get(name, 0.0):
                    continue
                if self._channel is None or self._channel.link is not link:
                    self._channel = await link.channel()
                try:
                    # A connection that is slow to answer must not be lost over it.
                    ready, _ = await self._channel.count(name, timeout=None)
                except Trouble as trouble:
                    # The broker has closed the channel over it.
                    self._channel = None
                    if link.ended.done() or trouble.kind is Kind.AWAY:
                        raise
                    self._absent[name] = time.monotonic() + ABSENT
                    self._counts.pop(name, None)
                else:
                    self._counts[name] = ready, time.monotonic()
