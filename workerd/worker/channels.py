"""The open channels: a delivery is settled on the one on which it came, once, or never."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Coroutine, Iterable

from workerd.broker.channel import Channel
from workerd.core.decisions import Settle
from workerd.core.job import Delivery
from workerd.core.ledger import Ledger
from workerd.core.retry import Decision, Verdict
from workerd.errors import BrokerError
from workerd.worker.outbox import Outbox

#: A task with a name; one that fails ends the worker.
Spawn = Callable[[Coroutine[object, object, None], str], object]


class Channels:
    """Settles deliveries; closes a channel that consumes no more once nothing is left on it.

    ``requeued`` decides what becomes of a delivery that goes back unstarted. ``spawn`` begins
    a task by its name.
    """

    def __init__(
        self,
        ledger: Ledger,
        outbox: Outbox,
        requeued: Callable[[Delivery], Decision],
        spawn: Spawn,
    ) -> None:
        self._ledger = ledger
        self._outbox = outbox
        self._requeued = requeued
        self._spawn = spawn
        #: Every channel on which a delivery may still have to be settled, by serial.
        self._channels: dict[int, Channel] = {}
        #: Those that consume no more.
        self._retiring: set[Channel] = set()

    @property
    def open(self) -> list[Channel]:
        """All of them."""
        return list(self._channels.values())

    def opened(self, channel: Channel) -> None:
        """A channel is about to consume."""
        self._channels[channel.serial] = channel
        # Once the broker has forgotten a job, only the run log knows that it is finished.
        channel.before_acks = self._ledger.dedup.flush
        self._ledger.opened(channel.serial)

    def lost(self, channel: Channel) -> None:
        """A channel is gone, and with it every delivery that came on it."""
        in_order = channel.ended_in_order and not self._ledger.holds(channel.serial)
        (self._ledger.closed if in_order else self._ledger.lost)(channel.serial)
        self._channels.pop(channel.serial, None)
        self._retiring.discard(channel)

    def leave(self, channel: Channel, unstarted: Iterable[Delivery]) -> None:
        """A channel consumes no more: these go back, and it is closed once all is settled."""

        async def leave() -> None:
            await self.requeue(unstarted)
            self._retiring.add(channel)
            self.close_retired()

        self._spawn(leave(), f"leave {channel.serial}")

    def settle(self, order: Settle) -> None:
        """The one place where a verdict becomes AMQP."""
        channel = self._channels[order.delivery.channel]
        tag = order.delivery.tag
        match order.verdict:
            case Verdict.DONE | Verdict.RETRY | Verdict.POSTPONE | Verdict.DEAD:
                channel.ack(tag)
            case Verdict.RETURN | Verdict.SPEND:
                channel.requeue(tag)
            case Verdict.REJECT:
                channel.reject(tag)
        self.close_retired()

    async def requeue(self, deliveries: Iterable[Delivery]) -> None:
        """Return deliveries that have not started, in this order."""
        for delivery in deliveries:
            verdict = await self._outbox.republish(self._requeued(delivery))
            # While a copy was published, the channel may have been lost.
            if delivery.channel in self._channels:
                self.settle(Settle(delivery, verdict))

    def close_retired(self) -> None:
        """Close the channels that consume no more and have nothing left to be settled."""
        for channel in [c for c in self._retiring if not self._ledger.holds(c.serial)]:
            self._retiring.discard(channel)
            self._spawn(_close(channel), f"close {channel.serial}")


async def _close(channel: Channel) -> None:
    with contextlib.suppress(BrokerError):
        await channel.close()
