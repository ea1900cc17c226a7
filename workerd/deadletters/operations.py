"""Dead letters at the broker: looked at without wear, sent back, dropped. How: `letterbox`.

Each look counts as a return. A queue that workerd has declared allows a million; any other
quorum queue of RabbitMQ 4 drops a letter at its 21st. So letters that have come back often
are *renewed*: all letters of the queue are published once more at its end, in order, each
acknowledged when its copy is confirmed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

from workerd.broker.channel import Channel
from workerd.broker.connection import Link
from workerd.broker.errors import CONFIRM_TIMEOUT
from workerd.config.model import Broker, Queue
from workerd.core import topology
from workerd.core.job import Message
from workerd.deadletters.browser import Box, tell
from workerd.deadletters.letter import Filter, Irreplaceable, Letter, renewed, replayed
from workerd.errors import EX_TEMPFAIL, Kind, Refused, Trouble, Unencodable, WorkerdError
from workerd.ids import new_id

#: Copies published ahead of their confirms.
WINDOW = 100
#: Letters that have come back so often are renewed; a lower limit of the queue makes it fewer.
WORN = 10
#: The delivery limit that RabbitMQ 4 gives to a quorum queue which was declared without one.
DEFAULT_LIMIT = 20
#: In place of a limit: what workerd's own queues have, or more.
PLENTY = 1_000_000
_GOODBYE = 1.0


@contextlib.asynccontextmanager
async def opened(broker: Broker, queue: str, wanted: Filter) -> AsyncIterator[Box]:
    """Look at the wanted letters of a work queue; afterwards they are as fresh as needed."""
    link = await Link.to_any(broker, "workerd dead", os.environ)
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
    link = await Link.to_any(broker, "workerd dead", os.environ)
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
