"""Looks at the letters of a queue, and leaves them in their places.

What keeps letters in order, found by experiment on RabbitMQ 3.10 and 4.0: one consumer takes
all of them, and its channel is closed without settling them. Then the broker itself returns
them, in order; so it does when a looker is killed or loses its connection. What shuffles them:

- returning them by nack, one by one or together: 3.10 gathers the nacks that come fast and
  takes those together in any order, and a consumer that is not cancelled gets at once again
  what it returns;
- taking only some: what was returned before, and returns again, lines up behind the others.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import deque
from collections.abc import AsyncIterator

from workerd.broker.channel import Channel
from workerd.broker.codec import Incoming
from workerd.broker.connection import Connection
from workerd.deadletters.letter import DeadLetter, Filter
from workerd.errors import EX_TEMPFAIL, CommandError
from workerd.output import warn

#: The most that AMQP lets a consumer hold. Never 0: a quorum queue would stop after 2,000.
HOLD = 65_535
#: Seconds without a letter after which no more is expected.
IDLE = 5.0
#: Seconds that the broker may take to put the letters back.
_BACK = 10.0


class Browser:
    """Looks at the letters of one queue.

    `letters` yields those that are wanted, in order, once; `ack` takes one out for good. All
    others are back in their places when `close` returns.
    """

    def __init__(self, connection: Connection, name: str, wanted: Filter) -> None:
        self.name = name
        self._connection = connection
        self._wanted = wanted
        self._now = time.time()
        #: How many there were at the beginning; what comes later is left alone.
        self.total = 0
        self.seen = 0
        #: How many were seen and are not wanted, or stay for another reason.
        self.kept = 0
        self._found_so_far = 0
        self._acked = 0
        #: How many were wanted and stay all the same.
        self.stuck = 0
        #: The most returns that a letter has behind it.
        self.returns = 0
        self._found: deque[DeadLetter] = deque()
        self._arrived = asyncio.Event()
        self._progress = Progress()
        self._channel: Channel | None = None

    async def open(self) -> None:
        """Begin. Raises CommandError while somebody else looks, BrokerError without a queue."""
        channel = await self._connection.channel()
        self.total, consumers = await channel.count(self.name)
        if consumers:
            await channel.close()
            raise self._taken()
        if not self.total:
            return
        self._channel = channel
        await channel.consume(self.name, HOLD, "workerd-dead", self._take, self._lost)
        other = await self._connection.channel()
        _, consumers = await other.count(self.name)
        await other.close()
        if consumers > 1:
            await self.close()
            raise self._taken()

    def _taken(self) -> CommandError:
        return CommandError(
            EX_TEMPFAIL,
            f"somebody else is looking at {self.name}, and each would see only a part of it; "
            "try again later",
        )

    def _take(self, _channel: Channel, incoming: Incoming) -> None:
        letter = DeadLetter(incoming.message, incoming.tag)
        self.returns = max(self.returns, letter.returns)
        self.seen += 1
        limit = self._wanted.limit
        if (
            self.seen <= self.total
            and (limit is None or self._found_so_far < limit)
            and self._wanted.takes(letter, self._now)
        ):
            self._found_so_far += 1
            self._found.append(letter)
        else:
            self.kept += 1
        self._arrived.set()

    def _lost(self, _channel: Channel) -> None:
        self._arrived.set()

    @property
    def unseen(self) -> int:
        """How many letters nobody looked at."""
        return max(0, self.total - self.seen)

    @property
    def _more_to_come(self) -> bool:
        # Not even when enough are found: it is all or none, see above.
        return self.seen < self.total and self.kept < HOLD

    async def letters(self) -> AsyncIterator[DeadLetter]:
        """The wanted letters, in order. Raises BrokerError when the connection is lost."""
        channel = self._channel
        while channel is not None and (self._found or self._more_to_come):
            if self._found:
                yield self._found.popleft()
                continue
            if channel.ended.done():
                raise channel.ended.result()
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), IDLE)
            except TimeoutError:
                return  # somebody has taken the others, or they have expired
            self._progress.show(self.seen, self.total)
        self._progress.clear()

    def ack(self, letter: DeadLetter) -> None:
        """Take a letter out of the queue for good."""
        assert self._channel is not None
        self._acked += 1
        self._channel.ack(letter.tag)

    def keep(self, letter: DeadLetter, why: object) -> None:
        """Leave a wanted letter where it is."""
        self.kept += 1
        self.stuck += 1
        warn(f"letter {letter.id or '-'} stays: {why}")

    async def close(self) -> None:
        """Put back what was not taken out."""
        self._progress.clear()
        channel, self._channel = self._channel, None
        if channel is None or not channel.open:
            return
        await channel.cancel()
        others, _ = await channel.count(self.name)
        expected = others + channel.deliveries - self._acked
        # Nothing is settled: see above.
        await channel.close()
        # The broker puts the letters back after the channel's close-ok, and says nothing then.
        # Whoever looks next must not find the queue empty, nor our own consumer still counted,
        # as a quorum queue does for a moment.
        deadline = time.monotonic() + _BACK
        probe = await self._connection.channel()
        ready, consumers = await probe.count(self.name)
        while (ready < expected or consumers) and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
            ready, consumers = await probe.count(self.name)
        await probe.close()


class Progress:
    """A line on a terminal: how many letters have been seen."""

    def __init__(self) -> None:
        self._is_wanted = sys.stderr.isatty()
        self._next = time.monotonic() + 0.5
        self._shown = False

    def show(self, seen: int, total: int) -> None:
        if self._is_wanted and time.monotonic() >= self._next:
            self._next = time.monotonic() + 0.2
            self._shown = True
            sys.stderr.write(f"\r{seen:,} of {total:,} letters ")
            sys.stderr.flush()

    def clear(self) -> None:
        if self._shown:
            sys.stderr.write("\r\033[K")
            self._shown = False
