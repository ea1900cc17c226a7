"""Sending jobs, one or many lines: confirmed by the broker, or told exactly why not."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from io import BufferedReader
from types import FrameType
from typing import cast

from workerd.broker import Channel, Link
from workerd.errors import Kind, Trouble, Unencodable, Unroutable, WorkerdError
from workerd.job import Message, new_id
from workerd.retry import backoff
from workerd.settings import Broker, Settings
from workerd.wording import did_you_mean

# Exit statuses, of sysexits.h.
EX_OK = 0
EX_USAGE = 64
EX_DATAERR = 65
EX_UNAVAILABLE = 69
EX_CANTCREAT = 73
EX_TEMPFAIL = 75
EX_NOPERM = 77

#: Published but not yet confirmed messages at once.
WINDOW = 1000
#: AMQP's limit for the properties that are short strings, in bytes.
_SHORT = 255


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
    max_body: int | None


def order(args: argparse.Namespace, settings: Settings) -> Order:
    """The order that a command line gives. Raises Refused."""
    handler = settings.handlers.get(args.type)
    if handler is None and args.queue is None and settings.handlers:
        hint = did_you_mean(args.type, settings.handlers)
        raise Refused(
            EX_USAGE, f"no handler is named {args.type!r}{hint}; name a --queue to send it anyway"
        )
    if args.id is not None and (args.lines or args.jsonl):
        raise Refused(EX_USAGE, "--id names one job; with --lines and --jsonl each gets its own")
    for option, text in (
        ("TYPE", args.type),
        ("--id", args.id or "id"),
        ("--queue", args.queue or "q"),
    ):
        if not 0 < len(text.encode("utf-8", "replace")) <= _SHORT or not text.isprintable():
            raise Refused(EX_USAGE, f"{option} must be 1 to {_SHORT} bytes of printable text")
    if args.priority is not None and not 0 <= args.priority <= 255:
        raise Refused(EX_USAGE, "--priority must be from 0 to 255")
    return Order(
        queue=args.queue or (handler.queue if handler else "default"),
        template=Message(
            type=args.type,
            message_id=args.id,
            content_type="application/json" if args.jsonl else None,
            priority=args.priority,
            timestamp=int(time.time()),
            headers=dict(map(_header, args.header)),
        ),
        max_body=handler.max_body if handler else None,
    )


def _header(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name or len(name.encode()) > _SHORT:
        raise Refused(EX_USAGE, f"--header {text!r}: expected NAME=VALUE")
    if name.lower().startswith("x-workerd-"):
        raise Refused(EX_USAGE, f"--header {name}: headers x-workerd-* are workerd's own")
    return name, value


def check_body(body: bytes, order: Order, jsonl: bool) -> None:
    """Raises Refused for a body that the handler on this host would not take."""
    if order.max_body is not None and len(body) > order.max_body:
        text = f"the body has {len(body)} bytes; the handler's max_body is {order.max_body}"
        raise Refused(EX_DATAERR, text)
    if jsonl:
        try:
            json.loads(body)
        except (ValueError, RecursionError) as error:
            raise Refused(EX_DATAERR, f"not JSON: {error}") from None


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Carry out a `submit` command line; returns the exit status. Raises Refused, WorkerdError."""
    wanted = order(args, settings)
    if args.lines or args.jsonl:
        return _submit_lines(args, settings.broker, wanted)
    deadline = time.monotonic() + args.timeout
    body = _read_body(args)
    check_body(body, wanted, jsonl=False)
    message = replace(wanted.template, body=body, message_id=args.id or new_id())
    if not args.dry_run:
        asyncio.run(_submit_one(settings.broker, wanted.queue, message, deadline))
    _print_id(args, wanted.queue, str(message.message_id))
    return EX_OK


def _read_body(args: argparse.Namespace) -> bytes:
    if args.body is not None:
        return os.fsencode(args.body)
    if args.file is not None and args.file != "-":
        try:
            with open(args.file, "rb") as file:
                return file.read()
        except OSError as error:
            raise Refused(EX_DATAERR, f"{args.file}: {error.strerror}") from None
    if args.file is None and sys.stdin.isatty():
        return b""

    def expired(_number: int, _frame: FrameType | None) -> None:
        raise Refused(EX_UNAVAILABLE, f"standard input did not end within {args.timeout:g} s")

    # Whoever forgot to close our standard input must not hang for ever.
    signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, args.timeout)
    body = sys.stdin.buffer.read()
    signal.setitimer(signal.ITIMER_REAL, 0)
    return body


def _print_id(args: argparse.Namespace, queue: str, job_id: str) -> None:
    line = json.dumps({"id": job_id, "queue": queue}) if args.json else job_id
    sys.stdout.write(line + "\n")


async def _submit_one(broker: Broker, queue: str, message: Message, deadline: float) -> None:
    """Publish until it is confirmed: again, under the same id, after a lost connection."""
    for delay in backoff(0.2, 2.0):
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                channel = await _connect(broker)
                try:
                    await _confirmed(channel, queue, message)
                    return
                finally:
                    channel.link.abort("done")
        except TimeoutError:
            raise Trouble(Kind.AWAY, "the broker did not confirm in time") from None
        except Trouble as trouble:
            if trouble.kind is not Kind.AWAY or time.monotonic() + delay >= deadline:
                raise
        await asyncio.sleep(delay)


async def _confirmed(channel: Channel, queue: str, message: Message) -> None:
    confirm = channel.publish("", queue, message)
    try:
        await confirm
    except asyncio.CancelledError:
        if channel.link.blocked:
            raise Trouble(Kind.BUSY, f"the broker takes nothing: {channel.link.blocked}") from None
        raise


async def _connect(broker: Broker) -> Channel:
    """A confirming channel to any of the brokers. Raises the last one's Trouble."""
    trouble: Trouble | None = None
    for url in broker.urls:
        try:
            link = await Link.open(url, broker, "submit", os.environ)
            channel = await link.channel()
            await channel.confirm()
            return channel
        except Trouble as error:
            trouble = error
    assert trouble is not None
    raise trouble


class Bulk:
    """Many lines, WINDOW of them published ahead of their confirms.

    Ids come out in the order of the input. A line that is itself wrong is left out and the
    others go on; the first line that the broker does not confirm ends it. Either way
    `missing` has the numbers of all lines that were read and not confirmed.
    """

    def __init__(self, args: argparse.Namespace, broker: Broker, order: Order) -> None:
        self._args = args
        self._broker = broker
        self._order = order
        self._channel: Channel | None = None
        self._flight: deque[tuple[int, str, asyncio.Future[None]]] = deque()
        self.read = 0
        self.missing: list[int] = []
        self.failure: WorkerdError | None = None

    async def run(self) -> None:
        try:
            async for line in _lines(self._args):
                self.read += 1
                await self._take(line)
                while self._flight and (self._flight[0][2].done() or len(self._flight) >= WINDOW):
                    await self._land()
            while self._flight:
                await self._land()
        except Trouble as trouble:
            self.failure = trouble
            await self._pick_up()
        finally:
            if self._channel:
                self._channel.link.abort("done")

    async def _take(self, line: bytes) -> None:
        job_id = new_id()
        message = replace(self._order.template, body=line, message_id=job_id)
        try:
            check_body(line, self._order, self._args.jsonl)
            if self._args.dry_run:
                _print_id(self._args, self._order.queue, job_id)
                return
            if self._channel is None:
                self._channel = await self._connected()
            confirm = self._channel.publish("", self._order.queue, message)
        except (Refused, Unencodable) as wrong:
            self.failure = wrong
            self.missing.append(self.read)
            sys.stderr.write(f"submit: line {self.read}: {wrong}\n")
            return
        except Trouble:
            self.missing.append(self.read)
            raise
        self._flight.append((self.read, job_id, confirm))

    async def _land(self) -> None:
        """Wait for the oldest line in flight, but not without end."""
        _, job_id, confirm = self._flight[0]
        await asyncio.wait({confirm}, timeout=self._args.timeout)
        if not confirm.done():
            blocked = self._channel.link.blocked if self._channel else ""
            if blocked:
                raise Trouble(Kind.BUSY, f"the broker takes nothing: {blocked}")
            raise Trouble(Kind.AWAY, "the broker did not confirm in time")
        confirm.result()
        self._flight.popleft()
        _print_id(self._args, self._order.queue, job_id)

    async def _pick_up(self) -> None:
        """After a failure: what else was in flight may have been confirmed all the same."""
        pending = [confirm for *_, confirm in self._flight if not confirm.done()]
        if pending:
            await asyncio.wait(pending, timeout=1.0)
        for number, job_id, confirm in self._flight:
            if confirm.done() and confirm.exception() is None:
                _print_id(self._args, self._order.queue, job_id)
            else:
                self.missing.append(number)

    async def _connected(self) -> Channel:
        deadline = time.monotonic() + self._args.timeout
        for delay in backoff(0.2, 2.0):
            try:
                return await _connect(self._broker)
            except Trouble as trouble:
                if trouble.kind is not Kind.AWAY or time.monotonic() + delay >= deadline:
                    raise
            await asyncio.sleep(delay)
        raise AssertionError("backoff never ends")


async def _lines(args: argparse.Namespace) -> AsyncIterator[bytes]:
    """The lines of the input, as they come, without holding up the connection."""
    if args.file in (None, "-"):
        source = cast(BufferedReader, sys.stdin.buffer)
    else:
        source = open(args.file, "rb")  # noqa: SIM115 - open until the end
    loop = asyncio.get_running_loop()
    rest = b""
    while chunk := await loop.run_in_executor(None, source.read1, 1 << 16):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line
    if rest:
        yield rest


def _submit_lines(args: argparse.Namespace, broker: Broker, order: Order) -> int:
    if args.body is not None:
        raise Refused(
            EX_USAGE, "--lines and --jsonl read a file or standard input, not an argument"
        )
    bulk = Bulk(args, broker, order)
    asyncio.run(bulk.run())
    if bulk.failure is None:
        return EX_OK
    stopped = isinstance(bulk.failure, Trouble)
    addresses = [*_ranges(sorted(bulk.missing)), *([f"{bulk.read + 1},$"] if stopped else [])]
    if stopped:
        sys.stderr.write(f"submit: {bulk.failure}\n")
    sys.stderr.write(
        f"submit: of {bulk.read} lines read, {len(bulk.missing)} were not confirmed. "
        "To send them again, and those not read:\n"
        f"submit: sed -n '{';'.join(address + 'p' for address in addresses)}'\n"
    )
    return exit_status(bulk.failure)


def _ranges(numbers: list[int]) -> Iterator[str]:
    """Line numbers as sed addresses: 3, 4, 5 and 9 become "3,5" and "9"."""
    start = end = 0
    for number in [*numbers, 0]:
        if number != end + 1 or not end:
            if end:
                yield f"{start},{end}" if end > start else str(start)
            start = number
        end = number


def exit_status(error: WorkerdError) -> int:
    """The exit status that tells a script what went wrong."""
    if isinstance(error, Refused):
        return error.status
    if isinstance(error, Unencodable):
        return EX_DATAERR
    if isinstance(error, Unroutable):
        return EX_CANTCREAT
    if isinstance(error, Trouble):
        if error.code == 406 and "larger than" in str(error):
            return EX_DATAERR
        return {
            Kind.BUSY: EX_TEMPFAIL,
            Kind.REFUSED: EX_NOPERM,
            Kind.MISSING: EX_CANTCREAT,
        }.get(error.kind, EX_UNAVAILABLE)
    return EX_UNAVAILABLE
