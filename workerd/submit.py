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
from dataclasses import dataclass, replace
from types import FrameType
from typing import BinaryIO, TypeVar

from workerd.broker import Channel, Link
from workerd.copies import is_reserved, portable_headers
from workerd.errors import Kind, Trouble, Unencodable, Unroutable, WorkerdError
from workerd.job import Message, new_id
from workerd.retry import backoff
from workerd.settings import Broker, Settings
from workerd.waiting import complete
from workerd.wording import did_you_mean

# Exit statuses, of sysexits.h.
EX_OK = 0
EX_USAGE = 64
EX_DATAERR = 65
EX_UNAVAILABLE = 69
EX_CANTCREAT = 73
EX_IOERR = 74
EX_TEMPFAIL = 75
EX_NOPERM = 77

#: AMQP's limit for the properties that are short strings, in bytes.
_SHORT = 255
#: The largest body that any RabbitMQ can be made to take.
_LARGEST_BODY = 512 << 20
#: Seconds for a goodbye, once everything is confirmed.
_CLOSE_TIMEOUT = 1.0

T = TypeVar("T")


class Refused(WorkerdError):
    """The job, or the command line, is not acceptable; ``status`` is the exit status."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be submitted: where to, and the message that each body is put into."""

    queue: str
    template: Message
    max_body: int

    def message(self, body: bytes) -> Message:
        """The message with this body. Raises Refused where the handler here would not take it."""
        if len(body) > self.max_body:
            text = f"the body is larger than {self.max_body} bytes, the handler's max_body"
            raise Refused(EX_DATAERR, text)
        return replace(
            self.template,
            body=body,
            message_id=self.template.message_id or new_id(),
            timestamp=int(time.time()),
        )


def order(args: argparse.Namespace, settings: Settings) -> Order:
    """The order that a command line gives. Raises Refused."""
    handler = settings.handlers.get(args.type)
    if handler is None and args.queue is None and settings.handlers:
        hint = did_you_mean(args.type, settings.handlers)
        raise Refused(
            EX_USAGE, f"no handler is named {args.type!r}{hint}; name a --queue to send it anyway"
        )
    for option, text in (("TYPE", args.type), ("--id", args.id), ("--queue", args.queue)):
        if text is not None and not _is_short_text(text):
            raise Refused(EX_USAGE, f"{option} must be 1 to {_SHORT} bytes of printable text")
    if args.priority is not None and not 0 <= args.priority <= 255:
        raise Refused(EX_USAGE, "--priority must be from 0 to 255")
    if args.body is not None and args.file is not None:
        raise Refused(EX_USAGE, "BODY and --file exclude each other")
    headers, too_large = portable_headers(dict(map(_header, args.header)))
    if too_large:
        raise Refused(EX_DATAERR, f"--header {too_large[0]}: all headers together are too large")
    return Order(
        queue=args.queue or (handler.queue if handler else "default"),
        template=Message(
            type=args.type,
            message_id=args.id,
            content_type="application/json" if args.jsonl else None,
            priority=args.priority,
            headers=headers,
        ),
        max_body=handler.max_body if handler else _LARGEST_BODY,
    )


def _header(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not _is_short_text(name):
        raise Refused(EX_USAGE, f"--header {text!r}: expected NAME=VALUE")
    if is_reserved(name.lower()):
        raise Refused(EX_USAGE, f"--header {name}: only workerd or RabbitMQ may set this header")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Refused(EX_DATAERR, f"--header {name}: the value is not UTF-8") from None
    return name, value


def _is_short_text(text: str) -> bool:
    """Whether it can be a property, and be shown to people."""
    return text.isprintable() and 0 < len(text.encode()) <= _SHORT


def submit(args: argparse.Namespace, settings: Settings) -> int:
    """Carry out a `submit` command line for one job; returns the exit status.

    Raises Refused, and WorkerdError for trouble with the broker.
    """
    wanted = order(args, settings)
    deadline = time.monotonic() + args.timeout
    message = wanted.message(_read_body(args, wanted.max_body))
    if not args.dry_run:
        complete(_submit_one(settings.broker, wanted.queue, message, deadline))
    print_id(args, wanted.queue, str(message.message_id))
    return EX_OK


def print_id(args: argparse.Namespace, queue: str, job_id: str) -> None:
    """Tell a job's id on standard output."""
    line = json.dumps({"id": job_id, "queue": queue}) if args.json else job_id
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


async def _submit_one(broker: Broker, queue: str, message: Message, deadline: float) -> None:
    """Publish until it is confirmed: again, under the same id, after a lost connection."""

    async def attempt() -> Link:
        channel = await connect(broker)
        try:
            await channel.publish("", queue, message)
        except asyncio.CancelledError:
            raise late(channel) from None
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


async def connect(broker: Broker) -> Channel:
    """A confirming channel to any of the brokers. Raises the last one's Trouble."""
    link = await Link.to_any(broker, "submit", os.environ)
    channel = await link.channel()
    await channel.confirm()
    return channel


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
