"""Dead letters at the broker: looked at without wear, sent back, dropped. How: `browser`.

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

from workerd.broker.connection import Connection
from workerd.broker.errors import CONFIRM_TIMEOUT
from workerd.config.model import Broker, Queue
from workerd.core import topology
from workerd.core.job import Message
from workerd.deadletters.browser import Browser
from workerd.deadletters.letter import DeadLetter, Filter, Irreplaceable, renewed, replayed
from workerd.errors import (
    EX_TEMPFAIL,
    CommandError,
    Unencodable,
    WorkerdError,
)
from workerd.ids import new_id
from workerd.output import warn

#: Copies published ahead of their confirms.
WINDOW = 100
#: Letters that have come back so often are renewed; a lower limit of the queue makes it fewer.
NEAR_DELIVERY_LIMIT = 10
#: The delivery limit that RabbitMQ 4 gives to a quorum queue which was declared without one.
DEFAULT_LIMIT = 20
#: In place of a limit: what workerd's own queues have, or more.
PLENTY = 1_000_000
_GOODBYE = 1.0


@contextlib.asynccontextmanager
async def browse(broker: Broker, queue: str, wanted: Filter) -> AsyncIterator[Browser]:
    """Look at the wanted letters of a work queue; afterwards they are as fresh as needed."""
    connection = await Connection.to_any(broker, "workerd dead", os.environ)
    try:
        name = topology.dead(queue)
        limit = await _delivery_limit(connection, queue)
        browser = Browser(connection, name, wanted)
        await browser.open()
        try:
            yield browser
        finally:
            await browser.close()
        if browser.unseen:
            warn(f"{browser.unseen} of {browser.total} letters in {name} were not looked at")
        if browser.seen and browser.returns >= min(NEAR_DELIVERY_LIMIT, limit // 2):
            await _renew(broker, connection, name, limit)
    finally:
        await connection.close(_GOODBYE)


async def _delivery_limit(connection: Connection, queue: str) -> int:
    """After how many returns the dead-letter queue drops a letter, as far as can be known.

    Raises CommandError when it is the first one, and BrokerError without such a queue.
    """
    name = topology.dead(queue)
    channel = await connection.channel()
    await channel.count(name)
    await channel.close()
    # It is there, so this declares nothing: the broker compares.
    objections = await connection.declare(topology.dead_letters(Queue(queue)))
    limit = _limit_in(str(objections[0]), connection.version) if objections else PLENTY
    if limit == 0:
        raise CommandError(
            EX_TEMPFAIL,
            f"{name} drops a message at its first return (x-delivery-limit), "
            "so looking would lose the letters",
        )
    return limit


def _limit_in(text: str, version: tuple[int, ...]) -> int:
    """The delivery limit that an objection of the broker names; RabbitMQ 4's own otherwise."""
    found = re.search(r"'x-delivery-limit' .* current is (?:none|.*?'(-?\d+)')", text)
    if found is None or found[1] is None:
        return DEFAULT_LIMIT
    # Below 0: RabbitMQ 4 has no limit then, earlier ones drop at once.
    if int(found[1]) < 0:
        return PLENTY if version >= (4,) else 0
    return int(found[1])


async def _renew(broker: Broker, connection: Connection, name: str, limit: int) -> None:
    """Publish all letters anew, so that their returns are counted from 0."""
    browser = Browser(connection, name, Filter())
    try:
        await browser.open()
        try:
            await _move(broker, browser, name, lambda letter: renewed(letter.message))
        finally:
            await browser.close()
    except WorkerdError as error:
        warn(
            f"letters in {name} have come back {browser.returns} times, and could not be written "
            f"anew: {error}; beyond {limit} times RabbitMQ may drop them"
        )


async def _move(
    broker: Broker,
    browser: Browser,
    target: str,
    copy: Callable[[DeadLetter], Message],
    moved: Callable[[DeadLetter], None] = lambda _letter: None,
) -> None:
    """Publish a copy of each letter, and take the letter out when the copy is confirmed.

    Ends at the first one that is not confirmed. Raises BrokerError.
    """
    # A connection of its own: an alarm stops what we send on one that publishes.
    connection = await Connection.to_any(broker, "workerd dead", os.environ)
    flight: deque[tuple[DeadLetter, asyncio.Future[None]]] = deque()

    async def land() -> None:
        letter, confirm = flight[0]
        await _confirmed(connection, confirm)
        flight.popleft()
        browser.ack(letter)
        moved(letter)

    try:
        channel = await connection.channel()
        await channel.confirm()
        try:
            async for letter in browser.letters():
                try:
                    flight.append((letter, channel.publish("", target, copy(letter))))
                except (Irreplaceable, Unencodable) as wrong:
                    browser.keep(letter, wrong)
                    continue
                while len(flight) >= WINDOW:
                    await land()
            while flight:
                await land()
        finally:
            # Others may have arrived all the same; what was confirmed must not stay.
            if flight:
                await asyncio.wait([confirm for _, confirm in flight], timeout=_GOODBYE)
            for letter, confirm in flight:
                if confirm.done() and not confirm.cancelled() and confirm.exception() is None:
                    browser.ack(letter)
                    moved(letter)
    finally:
        await connection.close(_GOODBYE)


async def _confirmed(connection: Connection, confirm: asyncio.Future[None]) -> None:
    """Wait for a confirm, but not for the end of an alarm. Raises BrokerError."""
    deadline = time.monotonic() + CONFIRM_TIMEOUT
    while time.monotonic() < deadline:
        await asyncio.wait({confirm}, timeout=1.0)
        if confirm.done():
            return confirm.result()
        if connection.blocked:
            break
    raise connection.unconfirmed()


async def requeue(
    broker: Broker, queue: str, wanted: Filter, moved: Callable[[DeadLetter], None]
) -> int:
    """Send the wanted letters back to their work queue; returns how many cannot be sent.

    Calls ``moved`` with each that is sent; all others stay, in order. Raises BrokerError,
    CommandError.
    """

    def copy(letter: DeadLetter) -> Message:
        message, dropped = replayed(letter.message, replay_id=new_id())
        if dropped:
            warn(f"letter {letter.id or '-'}: headers that cannot be sent: {', '.join(dropped)}")
        return message

    async with browse(broker, queue, wanted) as browser:
        await _move(broker, browser, queue, copy, moved)
        return browser.stuck


async def drop(
    broker: Broker, queue: str, wanted: Filter, agreed: Callable[[int], bool]
) -> list[DeadLetter]:
    """Throw the wanted letters away, if ``agreed`` says yes to their number; returns them.

    The letters are held meanwhile, so that these are dropped and no others. Raises BrokerError,
    CommandError.
    """
    async with browse(broker, queue, wanted) as browser:
        found = [
            replace(letter, message=replace(letter.message, body=b""))
            async for letter in browser.letters()
        ]
        # Elsewhere, for the connection must live as long as a human thinks.
        if not found or not await asyncio.to_thread(agreed, len(found)):
            return []
        for letter in found:
            browser.ack(letter)
        return found
