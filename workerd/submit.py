"""Sending a job: confirmed by the broker, or told exactly why not. For many of them see `bulk`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from types import FrameType
from typing import BinaryIO, TypeVar

from workerd import times, topology
from workerd.broker import Channel, Link
from workerd.errors import Kind, Refused, Trouble, Unencodable, Unroutable, WorkerdError
from workerd.job import Message
from workerd.order import Order, order
from workerd.retry import backoff
from workerd.settings import Broker, Settings
from workerd.waiting import complete

# Exit statuses, of sysexits.h.
EX_OK = 0
EX_USAGE = 64
EX_DATAERR = 65
EX_UNAVAILABLE = 69
EX_CANTCREAT = 73
EX_IOERR = 74
EX_TEMPFAIL = 75
EX_NOPERM = 77

#: Seconds for a goodbye, once everything is confirmed.
_CLOSE_TIMEOUT = 1.0

T = TypeVar("T")


def submit(args: argparse.Namespace, settings: Settings) -> int:
    """Carry out a `submit` command line for one job; returns the exit status.

    Raises Refused, and WorkerdError for trouble with the broker.
    """
    wanted = order(args, settings)
    deadline = time.monotonic() + args.timeout
    message = wanted.message(_read_body(args, wanted.max_body))
    if not args.dry_run:
        complete(_submit_one(settings.broker, wanted, message, deadline))
    print_id(args, wanted, str(message.message_id))
    return EX_OK


def print_id(args: argparse.Namespace, order: Order, job_id: str) -> None:
    """Tell a job's id on standard output."""
    line = job_id
    if args.json:
        facts = {"id": job_id, "queue": order.queue}
        if order.due is not None:
            facts["due"] = times.utc(order.due)
        line = json.dumps(facts)
    sys.stdout.write(line + "\n")


def _read_body(args: argparse.Namespace, limit: int) -> bytes:
    """The body, or just enough of it to see that it is larger than ``limit``. Raises Refused."""
    if args.body is not None:
        return os.fsencode(args.body)
    if args.file is None and (sys.stdin is None or sys.stdin.isatty()):
        return b""
    with _time_limit(args.timeout), open_input(args.file) as file:
        try:
            return file.read(limit + 1)
        except OSError as error:
            raise Refused(EX_DATAERR, f"cannot read the input: {error.strerror}") from None


def open_input(name: str | None) -> BinaryIO:
    """The input that --file names; ``-`` and None stand for standard input. Raises Refused."""
    try:
        if name is not None and name != "-":
            return open(name, "rb")
        # Where somebody else made it non-blocking, a pause would pass for its end.
        os.set_blocking(0, True)
        return sys.stdin.buffer
    except OSError as error:
        raise Refused(EX_DATAERR, f"{name or 'standard input'}: {error.strerror}") from None


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Whoever forgot to close our input must not make us hang for ever."""

    def expired(_number: int, _frame: FrameType | None) -> None:
        raise Refused(EX_UNAVAILABLE, f"the input did not end within {seconds:g} s")

    signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


async def _submit_one(broker: Broker, order: Order, message: Message, deadline: float) -> None:
    """Publish until it is confirmed: again, under the same id, after a lost connection."""

    async def attempt() -> Link:
        channel = await connect(broker, order)
        parcel = order.parcel(message, time.time())
        try:
            await channel.publish(parcel.exchange, parcel.key, parcel.message)
        except asyncio.CancelledError:
            raise late(channel) from None
        except Trouble as trouble:
            raise explained(trouble, parcel.exchange, order.queue) from None
        return channel.link

    link = await until_deadline(attempt, deadline)
    # RabbitMQ logs a warning about everybody who leaves without a goodbye.
    await link.close(_CLOSE_TIMEOUT)


async def until_deadline(attempt: Callable[[], Awaitable[T]], deadline: float) -> T:
    """Make attempts while the broker is away, until one succeeds or the time is up.

    Raises the Trouble of the last one. ``deadline`` is an instant of the monotonic clock.
    """
    last = Trouble(Kind.AWAY, "the broker did not answer in time")
    for delay in backoff(0.2, 2.0):
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                return await attempt()
        except TimeoutError:
            raise last from None
        except Trouble as trouble:
            if trouble.kind is not Kind.AWAY or time.monotonic() + delay >= deadline:
                raise
            last = trouble
        await asyncio.sleep(delay)
    raise AssertionError("backoff never ends")


async def connect(broker: Broker, order: Order) -> Channel:
    """A confirming channel to any of the brokers. Raises the last one's Trouble."""
    link = await Link.to_any(broker, "submit", os.environ)
    channel = await link.channel()
    if order.due is not None:
        await _find_due(channel, order.queue)
    await channel.confirm()
    return channel


async def _find_due(channel: Channel, queue: str) -> None:
    """Raises Trouble unless the delayed jobs of a queue have somewhere to come due."""
    # No level knows where its jobs will go: a missing destination shows when they are due.
    try:
        await channel.count(topology.due(queue))
    except Trouble as trouble:
        raise explained(trouble, topology.DUE, queue) from None


def explained(trouble: Trouble, exchange: str, queue: str) -> Trouble:
    """With what to do about it, if it was met on the way through ``exchange`` to ``queue``.

    ``exchange`` is "" where nothing was delayed.
    """
    if not exchange or trouble.kind is not Kind.MISSING:
        return trouble
    remedy = f"start a worker of {queue!r} once, or have 'workerd setup' declare it"
    return Trouble(Kind.MISSING, f"{trouble}; a delay needs it: {remedy}", trouble.code)


def late(channel: Channel) -> Trouble:
    """Why a message was not confirmed in time."""
    if channel.link.blocked:
        return Trouble(Kind.BUSY, f"the broker takes nothing at present: {channel.link.blocked}")
    return Trouble(Kind.AWAY, "the broker did not confirm in time")


def exit_status(error: WorkerdError) -> int:
    """The exit status that tells a script what went wrong."""
    if isinstance(error, Refused):
        return error.status
    if isinstance(error, Unencodable):
        return EX_DATAERR
    if isinstance(error, Unroutable):
        return EX_CANTCREAT
    if isinstance(error, Trouble):
        return {
            Kind.TOO_LARGE: EX_DATAERR,
            Kind.BUSY: EX_TEMPFAIL,
            Kind.REFUSED: EX_NOPERM,
            Kind.MISSING: EX_CANTCREAT,
        }.get(error.kind, EX_UNAVAILABLE)
    return EX_UNAVAILABLE
