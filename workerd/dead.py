"""Dead letters at the broker: looked at without wear, sent back, dropped.

What keeps letters in order, found by experiment on RabbitMQ 3.10 and 4.0: one consumer takes
all of them, and its channel is closed without settling them. Then the broker itself returns
them, in order; so it does when a looker is killed or loses its connection. What shuffles them:

- returning them by nack, one by one or together: 3.10 gathers the nacks that come fast and
  takes those together in any order, and a consumer that is not cancelled gets at once again
  what it returns;
- taking only some: what was returned before, and returns again, lines up behind the others.

Each look counts as a return. A queue that workerd has declared allows a million; any other
quorum queue of RabbitMQ 4 drops a letter at its 21st. So letters that have come back often
are *renewed*: all letters of the queue are published once more at its end, in order, each
acknowledged when its copy is confirmed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

from workerd import topology
from workerd.broker import CONFIRM_TIMEOUT, Channel, Incoming, Link
from workerd.errors import Kind, Trouble, Unencodable, WorkerdError
from workerd.job import Message, new_id
from workerd.letters import Filter, Irreplaceable, Letter, renewed, replayed
from workerd.options import Broker, Queue
from workerd.submit import EX_TEMPFAIL, Refused

#: The most that AMQP lets a consumer hold. Never 0: a quorum queue would stop after 2,000.
HOLD = 65_535
#: Copies published ahead of their confirms.
WINDOW = 100
#: Letters that have come back so often are renewed; a lower limit of the queue makes it fewer.
WORN = 10
#: The delivery limit that RabbitMQ 4 gives to a quorum queue which was declared without one.
DEFAULT_LIMIT = 20
#: In place of a limit: what workerd's own queues have, or more.
PLENTY = 1_000_000
#: Seconds without a letter after which no more is expected.
IDLE = 5.0
#: Seconds that the broker may take to put the letters back.
_BACK = 10.0
_GOODBYE = 1.0


def tell(text: str) -> None:
    """One line for the human."""
    sys.stderr.write(f"workerd: {text}\n")


async def connect(broker: Broker) -> Link:
    """A connection to any of the brokers. Raises the last one's Trouble."""
    trouble: Trouble | None = None
    for url in random.sample(broker.urls, len(broker.urls)):
        try:
            return await Link.open(url, broker, "workerd dead", os.environ)
        except Trouble as error:
            trouble = error
    assert trouble is not None
    raise trouble


class Box:
    """The letters of one queue while somebody looks at them.

    `letters` yields those that are wanted, in order, once; `ack` takes one out for good. All
    others are back in their places when `close` returns.
    """

    def __init__(self, link: Link, name: str, wanted: Filter) -> None:
        self.name = name
        self._link = link
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
        self._found: deque[Letter] = deque()
        self._arrived = asyncio.Event()
        self._progress = Progress()
        self._channel: Channel | None = None

    async def open(self) -> None:
        """Begin. Raises Refused while somebody else looks, and Trouble without such a queue."""
        channel = await self._link.channel()
        self.total, consumers = await channel.count(self.name)
        if consumers:
            await channel.close()
            raise self._taken()
        if not self.total:
            return
        self._channel = channel
        await channel.consume(self.name, HOLD, "workerd-dead", self._take, self._lost)
        other = await self._link.channel()
        _, consumers = await other.count(self.name)
        await other.close()
        if consumers > 1:
            await self.close()
            raise self._taken()

    def _taken(self) -> Refused:
        return Refused(
            EX_TEMPFAIL,
            f"somebody else is looking at {self.name}, and each would see only a part of it; "
            "try again later",
        )

    def _take(self, _channel: Channel, incoming: Incoming) -> None:
        letter = Letter(incoming.message, incoming.tag)
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

    async def letters(self) -> AsyncIterator[Letter]:
        """The wanted letters, in order. Raises Trouble when the connection is lost."""
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

    def ack(self, letter: Letter) -> None:
        """Take a letter out of the queue for good."""
        assert self._channel is not None
        self._acked += 1
        self._channel.ack(letter.tag)

    def keep(self, letter: Letter, why: object) -> None:
        """Leave a wanted letter where it is."""
        self.kept += 1
        self.stuck += 1
        tell(f"letter {letter.id or '-'} stays: {why}")

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
        # The broker puts them back after it has told us that the channel is closed, and says
        # nothing then. Whoever looks next must not find the queue empty, nor our own consumer
        # still counted, as a quorum queue does for a moment.
        deadline = time.monotonic() + _BACK
        probe = await self._link.channel()
        ready, consumers = await probe.count(self.name)
        while (ready < expected or consumers) and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
            ready, consumers = await probe.count(self.name)
        await probe.close()


class Progress:
    """A line on a terminal that tells how far it is."""

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


@contextlib.asynccontextmanager
async def opened(broker: Broker, queue: str, wanted: Filter) -> AsyncIterator[Box]:
    """Look at the wanted letters of a work queue; afterwards they are as fresh as needed."""
    link = await connect(broker)
    try:
        name = topology.dead(queue)
        limit = await _delivery_limit(link, queue)
        box = Box(link, name, wanted)
        await box.open()
        try:
            yield box
        finally:
            await box.close()
        if box.unseen:
            tell(f"{box.unseen} of {box.total} letters in {name} were not looked at")
        if box.seen and box.returns >= min(WORN, limit // 2):
            await _renew(broker, link, name, limit)
    finally:
        await link.close(_GOODBYE)


async def _delivery_limit(link: Link, queue: str) -> int:
    """After how many returns the dead-letter queue drops a letter, as far as can be known.

    Raises Refused when it is the first one, and Trouble without such a queue.
    """
    name = topology.dead(queue)
    channel = await link.channel()
    await channel.count(name)
    await channel.close()
    # It is there, so this declares nothing: the broker compares.
    objections = await link.declare(topology.dead_letters(Queue(queue)))
    limit = _limit_told(str(objections[0]), link.version) if objections else PLENTY
    if limit == 0:
        raise Refused(
            EX_TEMPFAIL,
            f"{name} drops a message at its first return (x-delivery-limit), "
            "so looking would lose the letters",
        )
    return limit


def _limit_told(text: str, version: tuple[int, ...]) -> int:
    """The delivery limit that an objection of the broker tells; the usual one otherwise."""
    found = re.search(r"'x-delivery-limit' .* current is (?:none|.*?'(-?\d+)')", text)
    if found is None or found[1] is None:
        return DEFAULT_LIMIT
    # Below 0: RabbitMQ 4 has no limit then, earlier ones drop at once.
    if int(found[1]) < 0:
        return PLENTY if version >= (4,) else 0
    return int(found[1])


async def _renew(broker: Broker, link: Link, name: str, limit: int) -> None:
    """Publish all letters anew, so that their returns are counted from 0."""
    box = Box(link, name, Filter())
    try:
        await box.open()
        try:
            await _move(broker, box, name, lambda letter: renewed(letter.message))
        finally:
            await box.close()
    except WorkerdError as error:
        tell(
            f"letters in {name} have come back {box.returns} times, and could not be written "
            f"anew: {error}; beyond {limit} times RabbitMQ may drop them"
        )


async def _move(
    broker: Broker,
    box: Box,
    target: str,
    copy: Callable[[Letter], Message],
    moved: Callable[[Letter], None] = lambda _letter: None,
) -> None:
    """Publish a copy of each letter, and take the letter out when the copy is confirmed.

    The first one that is not confirmed ends it. Raises Trouble.
    """
    # A connection of its own: an alarm stops what we send on one that publishes.
    link = await connect(broker)
    flight: deque[tuple[Letter, asyncio.Future[None]]] = deque()

    async def land(timeout: float) -> None:
        letter, confirm = flight[0]
        await _confirmed(channel, confirm, timeout)
        flight.popleft()
        box.ack(letter)
        moved(letter)

    try:
        channel = await link.channel()
        await channel.confirm()
        try:
            async for letter in box.letters():
                try:
                    flight.append((letter, channel.publish("", target, copy(letter))))
                except (Irreplaceable, Unencodable) as wrong:
                    box.keep(letter, wrong)
                    continue
                while len(flight) >= WINDOW:
                    await land(CONFIRM_TIMEOUT)
            while flight:
                await land(CONFIRM_TIMEOUT)
        finally:
            # Others may have arrived all the same; what was confirmed must not stay.
            if flight:
                await asyncio.wait([confirm for _, confirm in flight], timeout=_GOODBYE)
            for letter, confirm in flight:
                if confirm.done() and not confirm.cancelled() and confirm.exception() is None:
                    box.ack(letter)
                    moved(letter)
    finally:
        await link.close(_GOODBYE)


async def _confirmed(channel: Channel, confirm: asyncio.Future[None], timeout: float) -> None:
    """Wait for a confirm, but not for the end of an alarm. Raises Trouble."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        await asyncio.wait({confirm}, timeout=1.0)
        if confirm.done():
            return confirm.result()
        if channel.link.blocked:
            text = f"the broker takes nothing at present: {channel.link.blocked}"
            raise Trouble(Kind.BUSY, text)
    raise Trouble(Kind.AWAY, f"not confirmed within {timeout:.0f} s")


async def requeue(
    broker: Broker, queue: str, wanted: Filter, moved: Callable[[Letter], None]
) -> int:
    """Send the wanted letters back to their work queue; returns how many cannot be sent.

    ``moved`` is told of each. Raises Trouble, Refused; what was not sent stays, in order.
    """

    def copy(letter: Letter) -> Message:
        message, dropped = replayed(letter.message, mark=new_id())
        if dropped:
            tell(f"letter {letter.id or '-'}: headers that cannot be sent: {', '.join(dropped)}")
        return message

    async with opened(broker, queue, wanted) as box:
        await _move(broker, box, queue, copy, moved)
        return box.stuck


async def drop(
    broker: Broker, queue: str, wanted: Filter, agreed: Callable[[int], bool]
) -> list[Letter]:
    """Throw the wanted letters away, if ``agreed`` says yes to their number; returns them.

    They are held while it is asked, so that it is these and no others. Raises Trouble, Refused.
    """
    async with opened(broker, queue, wanted) as box:
        found = [
            replace(letter, message=replace(letter.message, body=b""))
            async for letter in box.letters()
        ]
        # Elsewhere, for the connection must live as long as a human thinks.
        if not found or not await asyncio.to_thread(agreed, len(found)):
            return []
        for letter in found:
            box.ack(letter)
        return found
