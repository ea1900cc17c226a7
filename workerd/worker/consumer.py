"""Consuming: the connection, a channel for each source of jobs, and the topology they need.

A work queue is two sources: the queue itself, and the one where its delayed jobs come due.

Trouble stays where it is: a queue that is missing, locked or forbidden is tried again
and again by itself, while the others go on.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Protocol

from workerd import log
from workerd.aio import first
from workerd.backoff import backoff
from workerd.broker.channel import Channel
from workerd.broker.codec import Incoming
from workerd.broker.connection import Connection
from workerd.broker.errors import ack_timeout_in
from workerd.config.model import Settings
from workerd.core import topology
from workerd.errors import BrokerError, ErrorKind
from workerd.worker.declarations import Declarations
from workerd.worker.subscription import Subscription, subscriptions

#: The first pause before a queue is tried again, in seconds.
FIRST_PAUSE = 0.2

#: Called with broker, trouble and the seconds until the next attempt.
OnOutage = Callable[[str, BrokerError, float], None]


class Connect(Protocol):
    """Makes an endless supply of connections; setting ``wake`` cuts a pause short."""

    def __call__(
        self, purpose: str, on_outage: OnOutage, wake: asyncio.Event
    ) -> AsyncIterator[Connection]: ...


class Receiver(Protocol):
    """Who is told what happens; called synchronously, from inside the broker's callbacks."""

    @property
    def wanted(self) -> bool:
        """Whether to consume at all; no longer, once a drain has nothing left to wait for."""

    def connected(self) -> None:
        """The broker is there."""

    def opened(self, channel: Channel) -> None:
        """A channel is about to consume."""

    def delivered(
        self, subscription: Subscription, channel: Channel, incoming: Incoming
    ) -> None: ...

    def lost(self, channel: Channel) -> None:
        """A channel is gone, and with it every delivery that came on it."""

    def retired(self, channel: Channel) -> None:
        """The broker has cancelled the consumer of a channel that itself stays open."""

    def detached(self, channel: Channel) -> None:
        """We have cancelled the consumer of a channel; another one takes its place."""

    def idle(self, channel: Channel) -> bool:
        """Whether nothing that came on this channel is still to be settled."""

    def changed(self) -> None:
        """Something changed that the status line shows."""


class Consumer:
    """Delivers messages from all queues, for ever, through whatever connection there is."""

    def __init__(self, settings: Settings, tag: str, receiver: Receiver) -> None:
        self._settings = settings
        self._tag = tag
        self._receiver = receiver
        #: What is to be consumed, by name.
        self._wanted = subscriptions(settings)
        #: One for each that is being consumed, set when it is to be consumed otherwise.
        self._changes: dict[str, asyncio.Event] = {}
        #: The channel that consumes each source at present, by its name.
        self.channels: dict[str, Channel] = {}
        #: What keeps a source from being consumed, in the broker's words.
        self.paused: dict[str, str] = {}
        #: Those among them that are not there.
        self.missing: set[str] = set()
        #: The work queues that an operator has paused: nothing is consumed for them.
        self.operator_paused: set[str] = set()
        self.declarations = Declarations()
        self.ack_timeout = settings.broker.ack_timeout
        self.consuming = asyncio.Event()
        #: What keeps it from being connected, for the status line; "" while it is.
        self.outage = "waiting for broker"
        self.connected_at = 0.0
        #: Set to make the next attempt to connect come now.
        self.wake = asyncio.Event()
        #: Set when an attempt to connect has failed.
        self.attempt_failed = asyncio.Event()
        #: Whether the present outage has been logged.
        self._down = False
        #: The present connection, None while there is none.
        self.connection: Connection | None = None
        #: How many connections were lost: those that we did not close ourselves.
        self.losses = 0
        #: Declares the delay levels, once on each connection.
        self._levels: asyncio.Task[None]

    @property
    def version(self) -> tuple[int, ...]:
        """RabbitMQ's version, (0,) while there is no connection."""
        return self.connection.version if self.connection else (0,)

    @property
    def broker(self) -> str:
        """The host that it is connected to, "" when there is none."""
        return self.connection.url.host if self.connection else ""

    def comes_due(self, queue: str) -> bool:
        """Whether delayed jobs of a queue have somewhere to come due, as far as is known."""
        return self.declarations.levels.is_set() and (
            topology.due(queue) in self.channels or queue in self.operator_paused
        )

    async def run(self, connect: Connect) -> None:
        async for connection in connect("consume", self._failed, self.wake):
            if not self._receiver.wanted:
                await connection.close(timeout=2.0)
                continue
            self.connection = connection
            self.outage = ""
            self._down = False
            self.connected_at = asyncio.get_running_loop().time()
            log.event(
                "connected",
                broker=connection.url.host,
                rabbitmq=".".join(map(str, connection.version)),
            )
            self._receiver.connected()
            for text in connection.shortages(len(self._settings.worker.queues)):
                log.warning("limits too low", broker=connection.url.host, text=text)
            async with asyncio.TaskGroup() as self._tasks:
                declaring = self.declarations.delays(connection)
                self._levels = self._tasks.create_task(declaring, name="declare")
                for name in self._wanted:
                    self._begin(connection, name)
                # Queues may be added for as long as the connection lives.
                await asyncio.wait({connection.ended})
            self.connection = None
            self.losses += connection.ended.result().kind is not ErrorKind.CLOSED

    def reload(self, settings: Settings) -> None:
        """Consume the queues of these settings; reconnect with them, when that is due."""
        before = self._wanted
        self._settings = settings
        self._wanted = {
            name: subscription
            for name, subscription in subscriptions(settings).items()
            if subscription.queue.name not in self.operator_paused
        }
        if self.connection is None or self.connection.ended.done():
            return
        for name in self._wanted:
            if name not in self._changes:
                self._begin(self.connection, name)
        for name, changed in self._changes.items():
            old, new = before.get(name), self._wanted.get(name)
            if old is None or new is None or not new.looks_like(old):
                changed.set()

    def pause_by_operator(self, queues: Iterable[str]) -> None:
        """Consume nothing for these work queues, and for all others of the settings."""
        self.operator_paused = set(queues)
        self.reload(self._settings)

    def _begin(self, connection: Connection, name: str) -> None:
        self._changes[name] = asyncio.Event()

        def ended(task: asyncio.Task[None]) -> None:
            del self._changes[name]
            well = not task.cancelled() and task.exception() is None
            # Wanted again between its last step and now.
            again = name in self._wanted and self._receiver.wanted and not connection.ended.done()
            if well and again:
                self._begin(connection, name)

        task = self._tasks.create_task(self._consume(connection, name), name=f"consume {name}")
        task.add_done_callback(ended)

    def _failed(self, broker: str, trouble: BrokerError, delay: float) -> None:
        """A connection was lost, or an attempt failed; an outage is one warning, not many."""
        fields = {"broker": broker, "text": str(trouble), "retry_in": round(delay, 1)}
        if self._down or trouble.kind is ErrorKind.CLOSED:
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
        # A queue that is just being opened may join them meanwhile.
        while self.channels:
            _, channel = self.channels.popitem()
            try:
                await channel.cancel()
            except BrokerError as trouble:
                log.debug("cancel failed", text=str(trouble))

    async def close(self, channels: Iterable[Channel]) -> None:
        """Close channels and connection; the broker's answers prove that it read our acks."""
        for channel in channels:
            try:
                await channel.close()
            except BrokerError as trouble:
                log.warning("close failed", text=str(trouble))
        if self.connection:
            await self.connection.close(timeout=2.0)

    async def _consume(self, connection: Connection, name: str) -> None:
        """Consume one source for as long as the connection lives and the settings name it."""
        clock = asyncio.get_running_loop().time
        changed = self._changes[name]
        reconnect_max = self._settings.broker.reconnect_max
        delays = backoff(FIRST_PAUSE, reconnect_max)
        declared: Subscription | None = None
        refusal: BrokerError | None = None
        while self._receiver.wanted and not connection.ended.done():
            subscription = self._wanted.get(name)
            if subscription is None:
                break
            changed.clear()
            try:
                if declared is None or not subscription.looks_like(declared):
                    refusal = await self._declare(connection, subscription)
                    await _require_work_queue(connection, name)
                channel = await self._open(connection, subscription)
            except BrokerError as trouble:
                if connection.ended.done() or not self._receiver.wanted:
                    break
                # That it is missing says less than why it could not be declared.
                self._pause(
                    name, refusal if refusal and trouble.kind is ErrorKind.MISSING else trouble
                )
                await first(asyncio.wait({connection.ended}), changed.wait(), timeout=next(delays))
                continue
            declared, refusal = subscription, None
            opened_at = clock()
            self.channels[name] = channel
            self._resume(name)
            if subscription.due:
                log.debug("consuming", queue=name)
            else:
                self.consuming.set()
                log.event("consuming", queue=name)
            self._receiver.changed()
            await first(
                asyncio.wait({channel.ended}),
                channel.cancelled.wait(),
                changed.wait(),
                self._stalls(channel, name),
            )
            if self.channels.get(name) is channel:
                del self.channels[name]
            if channel.ended.done():
                self._explain(name, channel.ended.result())
            elif channel.cancelled.is_set():
                log.warning("consumer cancelled", queue=name)
                self._receiver.retired(channel)
            else:
                await self._detach(channel)
                continue
            self._receiver.changed()
            if clock() - opened_at > reconnect_max:
                delays = backoff(FIRST_PAUSE, reconnect_max)
            await first(asyncio.wait({connection.ended}), changed.wait(), timeout=next(delays))
        self._resume(name)

    async def _declare(
        self, connection: Connection, subscription: Subscription
    ) -> BrokerError | None:
        """Declare a source, and what belongs to it; returns the broker's objection."""
        if not subscription.due:
            return await self.declarations.queue(connection, subscription.queue)
        await asyncio.shield(self._levels)
        return await self.declarations.due(connection, subscription.queue)

    async def _stalls(self, channel: Channel, name: str) -> None:
        """Wait until messages wait in the queue and none comes, although nothing is in hand.

        Brokers have had bugs that starve a consumer for ever (RabbitMQ 11228 and 15473); a new
        channel helps, and costs nothing while nothing is in flight.
        """
        interval = self._settings.broker.heartbeat
        suspicious = -1
        while True:
            await asyncio.sleep(interval)
            if not self._receiver.idle(channel) or not self._receiver.wanted:
                suspicious = -1
                continue
            try:
                ready, _ = await channel.count(name)
            except BrokerError:
                return  # the channel has ended, which says more
            # Twice, since a message may be on its way.
            if ready and channel.deliveries == suspicious:
                log.warning("consumer stalled", queue=name, ready=ready)
                return
            suspicious = channel.deliveries if ready else -1

    async def _detach(self, channel: Channel) -> None:
        """Let a channel consume no more; what runs is still settled on it."""
        try:
            await channel.cancel()
        except BrokerError as trouble:
            log.debug("cancel failed", text=str(trouble))
        else:
            self._receiver.detached(channel)

    async def _open(self, connection: Connection, subscription: Subscription) -> Channel:
        """A new channel that consumes the source. It never makes it: see `Declarations`."""
        channel = await connection.channel()
        await channel.count(subscription.name)
        self._receiver.opened(channel)
        try:
            await channel.consume(
                subscription.name,
                subscription.prefetch,
                f"{self._tag}.{channel.serial}",
                lambda channel, incoming: self._receiver.delivered(subscription, channel, incoming),
                self._receiver.lost,
            )
        except BrokerError:
            self._receiver.lost(channel)
            raise
        return channel

    def _explain(self, name: str, trouble: BrokerError) -> None:
        """A channel has ended: say why, unless the whole connection has."""
        if trouble.kind is ErrorKind.ACK_TIMEOUT:
            self.ack_timeout = ack_timeout_in(trouble) or self.ack_timeout
            log.warning(
                "ack timeout",
                queue=name,
                text=str(trouble),
                remedy="raise RabbitMQ's consumer_timeout above the longest job",
            )
        elif trouble.kind not in (ErrorKind.AWAY, ErrorKind.CLOSED):
            log.warning("channel closed", queue=name, text=str(trouble))

    def _pause(self, name: str, trouble: BrokerError) -> None:
        text = str(trouble)
        self.missing.discard(name)
        if trouble.kind is ErrorKind.MISSING:
            self.missing.add(name)
            text = "waiting for it to be declared"
        if self.paused.get(name) != text:
            log.warning("queue paused", queue=name, text=str(trouble))
        self.paused[name] = text
        self._receiver.changed()

    def _resume(self, name: str) -> None:
        self.paused.pop(name, None)
        self.missing.discard(name)


async def _require_work_queue(connection: Connection, name: str) -> None:
    """Raises BrokerError for a queue that is not there, or of a type that cannot hold jobs."""
    kind = await (await connection.channel()).kind_of(name)
    if problem := topology.no_work_queue(name, kind):
        raise BrokerError(ErrorKind.CONFLICT, problem)
