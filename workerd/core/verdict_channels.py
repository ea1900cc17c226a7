"""The channels on which verdicts are sent, and whether what was sent there may be lost. Pure."""

from __future__ import annotations

from workerd.core.dedup import ALL_CLOSED, GONE, NEVER_SENT
from workerd.core.job import Delivery


class VerdictChannels:
    """Knows the channels that consume, and those that were closed in order."""

    def __init__(self) -> None:
        #: Channels that consume.
        self._live: set[int] = set()
        #: Channels closed in order: what was sent on them was read. But a broker that is
        #: killed forgets that, so they count only until the next channel is lost.
        self._closed: set[int] = {ALL_CLOSED}

    def __contains__(self, channel: int) -> bool:
        """Whether it consumes."""
        return channel in self._live

    def opened(self, channel: int) -> None:
        self._live.add(channel)

    def closed(self, channel: int) -> None:
        self._live.discard(channel)
        self._closed.add(channel)

    def retired(self, channel: int) -> None:
        """It consumes no more: the broker may have taken back what is settled there."""
        self._live.discard(channel)

    def one_is_lost(self) -> None:
        """Some channel is: perhaps the broker was killed."""
        self._closed.clear()

    def sent_on(self, delivery: Delivery | None) -> int:
        """The channel of a verdict over this delivery, as it is remembered."""
        if delivery is None:
            return NEVER_SENT
        return delivery.channel if delivery.channel in self._live else GONE

    def may_be_lost(self, sent_on: int) -> bool:
        """Whether a verdict sent on this channel may not have arrived."""
        return sent_on not in self._live and sent_on not in self._closed
