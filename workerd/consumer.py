"""Consuming: the connection, a channel for each queue, and the topology they need.

Trouble stays where it is: a queue that is missing, locked or forbidden is tried again
and again by itself, while the others go on.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping

from workerd import log, topology
from workerd.broker import Channel, Incoming, Link, ack_timeout_in
from workerd.errors import Kind, Trouble
from workerd.retry import backoff
from workerd.settings import Queue, Settings


class Consumer:
    """Delivers messages from all queues, for ever, through whatever connection there is.

    ``on_message(queue, channel, incoming)`` and ``on_lost(channel)`` are called
    synchronously, from inside the broker's callbacks; ``on_open(channel)`` before the
    first message of a channel; ``on_retired(channel)`` when the broker has cancelled the
    consumer of a channel that stays open.
    """

    def __init__(
        self,
        settings: Settings,
        tag: str,
        on_open: Callable[[Channel], None],
        on_message: Callable[[str, Channel, Incoming], None],
        on_lost: Callable[[Channel], None],
        on_retired: Callable[[Channel], None],
        wanted: Callable[[], bool],
    ) -> None:
        self._settings = settings
        self._tag = tag
        self._on_open = on_open
        self._on_message = on_message
        self._on_lost = on_lost
        self._on_retired = on_retired
        #: Whether to consume at all; no longer, once a drain has nothing left to wait for.
        self._wanted = wanted
        self._queues: Mapping[str, Queue] = {
            name: settings.queues[name] for name in settings.worker.queues
        }
        #: The channel that consumes each queue at present.
        self.channels: dict[str, Channel] = {}
        #: What keeps a queue from being consumed, in the broker's words.
        self.paused: dict[str, str] = {}
        #: Queues for which the broker moves a rejected message to the dead letters.
        self.dead_letters: set[str] = set()
        self.ack_timeout = settings.broker.ack_timeout
        self.consuming = asyncio.Event()
        self._link: Link | None = None
        self._warned: set[str] = set()

    @property
    def broker(self) -> str:
        """The host that it is connected to, "" when there is none."""
        return self._link.url.host if self._link else ""

    async def run(self, links: AsyncIterator[Link]) -> None:
        async for link in links:
            if not self._wanted():
                link.abort("draining")
                continue
            self._link = link
            log.event("connected", broker=link.url.host, rabbitmq=".".join(map(str, link.version)))
            async with asyncio.TaskGroup() as tasks:
                for queue in self._queues.values():
                    tasks.create_task(self._consume(link, queue), name=f"consume {queue.name}")
                tasks.create_task(self._declare(link, "delays", topology.delay_levels()), name="declare")
            self._link = None

    async def cancel(self) -> None:
        """Stop all consumers; when this returns, the last message has come."""
        for channel in list(self.channels.values()):
            try:
                await channel.cancel()
            except Trouble as trouble:
                log.debug("cancel failed", text=str(trouble))
        self.channels.clear()

    async def close(self, channels: Iterable[Channel], timeout: float) -> None:
        """Close channels and connection; the broker's answers prove that it read our acks."""
        try:
            async with asyncio.timeout(timeout):
                for channel in list(channels):
                    await channel.close()
        except TimeoutError:
            log.warning("close timed out", seconds=timeout)
        if self._link:
            await self._link.close(timeout=2.0)

    async def _consume(self, link: Link, queue: Queue) -> None:
        """Consume one queue for as long as the connection lives."""
        declared = False
        delays = backoff(0.5, self._settings.broker.reconnect_max)
        while self._wanted() and not link.ended.done():
            try:
                if not declared:
                    await self._declare_queue(link, queue)
                    declared = True
                channel = await self._open(link, queue)
            except Trouble as trouble:
                if link.ended.done():
                    break
                self._pause(queue, trouble)
                await asyncio.wait({link.ended}, timeout=next(delays))
                continue
            delays = backoff(0.5, self._settings.broker.reconnect_max)
            self.channels[queue.name] = channel
            self.paused.pop(queue.name, None)
            self.consuming.set()
            log.event("consuming", queue=queue.name)
            await self._interruption(channel)
            if self.channels.get(queue.name) is channel:
                del self.channels[queue.name]
            if channel.ended.done():
                self._explain(queue, channel.ended.result())
            else:
                log.warning("consumer cancelled", queue=queue.name)
                self._on_retired(channel)

    async def _open(self, link: Link, queue: Queue) -> Channel:
        """A new channel that consumes the queue. It never makes the queue: see `_declare_queue`."""
        channel = await link.channel()
        await channel.count(queue.name)
        self._on_open(channel)
        try:
            await channel.consume(
                queue.name,
                queue.prefetch,
                f"{self._tag}.{channel.serial}",
                lambda channel, incoming: self._on_message(queue.name, channel, incoming),
                self._on_lost,
            )
        except Trouble:
            self._on_lost(channel)
            raise
        return channel

    @staticmethod
    async def _interruption(channel: Channel) -> None:
        """Until the channel has ended or the broker has cancelled its consumer."""
        cancelled = asyncio.ensure_future(channel.cancelled.wait())
        try:
            await asyncio.wait({channel.ended, cancelled}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            cancelled.cancel()

    def _explain(self, queue: Queue, trouble: Trouble) -> None:
        """A channel has ended: say why, unless the whole connection has."""
        if trouble.kind is Kind.ACK_TIMEOUT:
            self.ack_timeout = ack_timeout_in(trouble) or self.ack_timeout
            log.warning(
                "ack timeout",
                queue=queue.name,
                text=str(trouble),
                remedy="raise RabbitMQ's consumer_timeout above the longest job",
            )
        elif trouble.kind not in (Kind.AWAY, Kind.CLOSED):
            log.warning("channel closed", queue=queue.name, text=str(trouble))

    def _pause(self, queue: Queue, trouble: Trouble) -> None:
        text = f"waiting for queue {queue.name}" if queue.declare == "wait" else str(trouble)
        if self.paused.get(queue.name) != text:
            log.warning("queue paused", queue=queue.name, text=str(trouble))
        self.paused[queue.name] = text

    async def _declare_queue(self, link: Link, queue: Queue) -> None:
        """Declare a work queue and what belongs to it, once for each connection.

        A queue that is deleted while it is consumed is not made again behind the back of
        the administrator who deleted it.
        """
        if queue.declare != "wait":
            made = await self._declare(link, f"queue {queue.name}", [topology.work_queue(queue)])
            if made and queue.declare == "create":
                self.dead_letters.add(queue.name)
            else:
                self.dead_letters.discard(queue.name)
        await self._declare(link, f"dead letters of {queue.name}", topology.companions(queue))

    async def _declare(self, link: Link, what: str, steps: Iterable[topology.Step]) -> bool:
        """Take these steps; True when all were taken as asked.

        What exists with other arguments is used as it is, and what may not be declared is
        hoped to exist: one warning says so, with the broker's words.
        """
        complete = True
        channel: Channel | None = None
        try:
            for step in steps:
                if channel is None or channel.ended.done():
                    channel = await link.channel()
                try:
                    await channel.declare(step)
                except Trouble as trouble:
                    if trouble.kind is Kind.AWAY:
                        raise
                    complete = False
                    self._warn(what, trouble)
                    if trouble.kind is Kind.REFUSED:
                        break
            if channel and not channel.ended.done():
                await channel.close()
        except (Trouble, TimeoutError):
            return False  # the connection is gone; on the next one all is declared again
        return complete

    def _warn(self, what: str, trouble: Trouble) -> None:
        if str(trouble) not in self._warned:
            self._warned.add(str(trouble))
            log.warning("declare failed", what=what, text=str(trouble))
