"""Consuming: the connection, a channel for each queue, and the topology they need.

Trouble stays where it is: a queue that is missing, locked or forbidden is tried again
and again by itself, while the others go on.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any, Protocol

from workerd import log, topology
from workerd.broker import Channel, Incoming, Link, ack_timeout_in
from workerd.errors import Kind, Trouble
from workerd.options import Queue, Settings
from workerd.retry import backoff

#: The first pause before a queue is tried again, in seconds.
FIRST_PAUSE = 0.2

#: Called with broker, trouble and the seconds until the next attempt.
OnOutage = Callable[[str, Trouble, float], None]


class Connect(Protocol):
    """Makes an endless supply of connections; setting ``wake`` cuts a pause short."""

    def __call__(
        self, purpose: str, on_outage: OnOutage, wake: asyncio.Event
    ) -> AsyncIterator[Link]: ...


class Receiver(Protocol):
    """Who is told what happens; called synchronously, from inside the broker's callbacks."""

    @property
    def wanted(self) -> bool:
        """Whether to consume at all; no longer, once a drain has nothing left to wait for."""

    def opened(self, channel: Channel) -> None:
        """A channel is about to consume."""

    def delivered(self, queue: str, channel: Channel, incoming: Incoming) -> None: ...

    def lost(self, channel: Channel) -> None:
        """A channel is gone, and with it every delivery that came on it."""

    def retired(self, channel: Channel) -> None:
        """The broker has cancelled the consumer of a channel that itself stays open."""

    def changed(self) -> None:
        """Something changed that the status line shows."""


class Consumer:
    """Delivers messages from all queues, for ever, through whatever connection there is."""

    def __init__(self, settings: Settings, tag: str, receiver: Receiver) -> None:
        self._settings = settings
        self._tag = tag
        self._receiver = receiver
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
        #: What keeps it from being connected, for the status line; "" while it is.
        self.outage = "connecting"
        self.connected_at = 0.0
        #: Set to make the next attempt to connect come now.
        self.wake = asyncio.Event()
        #: Set when an attempt to connect has failed.
        self.attempt_failed = asyncio.Event()
        #: Whether the present outage has been logged.
        self._down = False
        self._link: Link | None = None
        self._warned: set[str] = set()

    @property
    def broker(self) -> str:
        """The host that it is connected to, "" when there is none."""
        return self._link.url.host if self._link else ""

    async def run(self, connect: Connect) -> None:
        async for link in connect("consume", self._failed, self.wake):
            if not self._receiver.wanted:
                link.abort("draining")
                continue
            self._link = link
            self.outage = ""
            self._down = False
            self.connected_at = asyncio.get_running_loop().time()
            log.event("connected", broker=link.url.host, rabbitmq=".".join(map(str, link.version)))
            async with asyncio.TaskGroup() as tasks:
                for queue in self._queues.values():
                    tasks.create_task(self._consume(link, queue), name=f"consume {queue.name}")
                tasks.create_task(self._declare_delays(link), name="declare")
            self._link = None

    def _failed(self, broker: str, trouble: Trouble, delay: float) -> None:
        """A connection was lost, or an attempt failed; an outage is one warning, not many."""
        fields = {"broker": broker, "text": str(trouble), "retry_in": round(delay, 1)}
        if self._down or trouble.kind is Kind.CLOSED:
            log.debug("unreachable", **fields)
        else:
            log.warning("disconnected" if self.connected_at else "unreachable", **fields)
        self._down = True
        verb = "reconnecting to" if self.connected_at else "waiting for broker"
        self.outage = f"{verb} {broker} in {delay:.0f}s: {trouble}"
        self.attempt_failed.set()
        self._receiver.changed()

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
        except (TimeoutError, Trouble):
            log.warning("close timed out", seconds=timeout)
        if self._link:
            await self._link.close(timeout=2.0)

    async def _consume(self, link: Link, queue: Queue) -> None:
        """Consume one queue for as long as the connection lives."""
        clock = asyncio.get_running_loop().time
        reconnect_max = self._settings.broker.reconnect_max
        delays = backoff(FIRST_PAUSE, reconnect_max)
        seen = False
        refusal: Trouble | None = None
        while self._receiver.wanted and not link.ended.done():
            try:
                if not seen:
                    refusal = await self._declare_queue(link, queue)
                channel = await self._open(link, queue)
            except Trouble as trouble:
                if link.ended.done():
                    break
                # That it is missing says less than why it could not be declared.
                self._pause(queue, refusal if refusal and trouble.kind is Kind.MISSING else trouble)
                await asyncio.wait({link.ended}, timeout=next(delays))
                continue
            seen, refusal = True, None
            opened_at = clock()
            self.channels[queue.name] = channel
            self.paused.pop(queue.name, None)
            self.consuming.set()
            log.event("consuming", queue=queue.name)
            self._receiver.changed()
            await self._interruption(channel)
            if self.channels.get(queue.name) is channel:
                del self.channels[queue.name]
            if channel.ended.done():
                self._explain(queue, channel.ended.result())
            else:
                log.warning("consumer cancelled", queue=queue.name)
                self._receiver.retired(channel)
            self._receiver.changed()
            if clock() - opened_at > reconnect_max:
                delays = backoff(FIRST_PAUSE, reconnect_max)
            await asyncio.wait({link.ended}, timeout=next(delays))

    async def _open(self, link: Link, queue: Queue) -> Channel:
        """A new channel that consumes the queue. It never makes the queue: see `_declare_queue`."""
        channel = await link.channel()
        await channel.count(queue.name)
        self._receiver.opened(channel)
        try:
            await channel.consume(
                queue.name,
                queue.prefetch,
                f"{self._tag}.{channel.serial}",
                lambda channel, incoming: self._receiver.delivered(queue.name, channel, incoming),
                self._receiver.lost,
            )
        except Trouble:
            self._receiver.lost(channel)
            raise
        return channel

    @staticmethod
    async def _interruption(channel: Channel) -> None:
        """Until the channel has ended or the broker has cancelled its consumer."""
        cancelled = asyncio.ensure_future(channel.cancelled.wait())
        try:
            ends: set[asyncio.Future[Any]] = {channel.ended, cancelled}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
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
        missing = trouble.kind is Kind.MISSING
        text = "waiting for it to be declared" if missing else str(trouble)
        if self.paused.get(queue.name) != text:
            log.warning("queue paused", queue=queue.name, text=str(trouble))
        self.paused[queue.name] = text
        self._receiver.changed()

    async def _declare_queue(self, link: Link, queue: Queue) -> Trouble | None:
        """Declare a work queue and its dead letters; returns the broker's objection to the former.

        Done until the queue has been there on this connection. One that is deleted while it
        is consumed is not made again behind the back of the administrator who deleted it.
        """
        objections: list[Trouble] = []
        if queue.declare != "wait":
            objections = await self._declare(
                link, f"queue {queue.name}", [topology.work_queue(queue)]
            )
        if queue.declare == "create" and not objections:
            self.dead_letters.add(queue.name)
        else:
            self.dead_letters.discard(queue.name)
        await self._declare(link, f"dead letters of {queue.name}", topology.dead_letters(queue))
        return objections[0] if objections else None

    async def _declare_delays(self, link: Link) -> None:
        """Declare the delay levels, and what leads from them to each queue."""
        await self._declare(link, "delays", topology.delay_levels())
        for queue in self._queues.values():
            await self._declare(link, f"due jobs of {queue.name}", topology.due_jobs(queue))
        if not link.ended.done():
            log.debug("declared", what="delays")

    async def _declare(
        self, link: Link, what: str, steps: Iterable[topology.Step]
    ) -> list[Trouble]:
        """Take these steps; returns what the broker objected to.

        What exists with other arguments is used as it is, and what may not be declared is
        hoped to exist: one warning says so, with the broker's words.
        """
        try:
            objections = await link.declare(steps)
        except Trouble as trouble:
            return [trouble]  # the connection is gone; on the next one all is declared again
        for objection in map(str, objections):
            if objection not in self._warned:
                self._warned.add(objection)
                log.warning("declare failed", what=what, text=objection)
        return objections
