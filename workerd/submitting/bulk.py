"""Sends many jobs, one a line: thousands a second, and exact about those that did not arrive."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import signal
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass

from workerd import output
from workerd.aio import complete, first
from workerd.broker.channel import Channel
from workerd.broker.connection import Connection
from workerd.config.model import Broker, Settings
from workerd.core.jobspec import JobSpec
from workerd.core.submission import Submission, explained, prepare
from workerd.errors import (
    EX_DATAERR,
    EX_OK,
    EX_USAGE,
    BrokerError,
    CommandError,
    Unencodable,
    WorkerdError,
    exit_status,
)
from workerd.output import warn
from workerd.submitting.direct import connect, until_deadline
from workerd.submitting.one import open_input, print_id

#: How far publishing may be ahead of the confirms: messages, and bytes of their bodies.
WINDOW = 1000
WINDOW_BYTES = 16 << 20
#: Seconds that the broker gets, after a failure, to confirm what is still in flight.
_LAST_CONFIRMS = 1.0
_CLOSE_TIMEOUT = 1.0
_CHUNK = 1 << 16


def submit_lines(args: argparse.Namespace, spec: JobSpec, settings: Settings) -> int:
    """Submit each line of the input as a job that is otherwise ``spec``; returns the exit status.

    Raises CommandError.
    """
    if args.body is not None:
        text = "--lines and --jsonl read a file or standard input, not an argument"
        raise CommandError(EX_USAGE, text)
    if spec.id is not None:
        raise CommandError(
            EX_USAGE, "--id names one job; with --lines and --jsonl each gets its own"
        )
    wanted = prepare(spec, settings, time.time())
    source = open_input(args.file)
    bulk = Bulk(args, settings.broker, wanted, source.fileno())
    complete(bulk.run())
    if bulk.failure is None:
        return EX_OK
    command = f"sed -n '{bulk.missing_lines()}'"
    if args.file not in (None, "-"):
        command += f" {shlex.quote(args.file)}"
    warn(f"{bulk.confirmed} lines were confirmed; to send the others again:", "submit")
    warn(command, "submit")
    return exit_status(bulk.failure)


@dataclass(frozen=True, slots=True)
class Sent:
    """A line in flight: published, and not yet confirmed."""

    number: int
    job_id: str
    size: int
    exchange: str
    confirm: asyncio.Future[None]


class Bulk:
    """Publishes ahead of the confirms, and prints ids as the confirms come, in input order.

    A line that is itself wrong is left out and the others go on; the first line that the
    broker does not confirm ends everything. `failure` is the last error, None without one.
    """

    def __init__(
        self, args: argparse.Namespace, broker: Broker, submission: Submission, source: int
    ) -> None:
        self._args = args
        self._broker = broker
        self._submission = submission
        self._source = source
        self._connection: Connection | None = None
        self._channel: Channel
        self._flight: deque[Sent] = deque()
        self._bytes_in_flight = 0
        #: Set whenever something has come into flight or out of it.
        self._moved = asyncio.Event()
        self.confirmed = 0
        self.failure: WorkerdError | None = None
        #: The number of the last line that was published or found to be wrong.
        self._last = 0
        self._missing: list[int] = []
        self._whole = False

    async def run(self) -> None:
        """Submit every line, or set `failure`."""
        try:
            await first(self._publish_all(), self._land_all(), _interrupted())
            if self._connection:
                await self._connection.close(_CLOSE_TIMEOUT)
        except (CommandError, BrokerError) as error:
            await self._give_up(error)

    def missing_lines(self) -> str:
        """The lines that were read and not confirmed, and those not read, as a sed script."""
        addresses = list(_ranges(sorted(self._missing)))
        if not self._whole:
            addresses.append(f"{self._last + 1},$")
        return ";".join(f"{address}p" for address in addresses)

    async def _publish_all(self) -> None:
        async for line in _lines(self._source, self._submission.max_body):
            while len(self._flight) >= WINDOW or self._bytes_in_flight >= WINDOW_BYTES:
                await self._movement()
            await self._publish(line)
        while self._flight:
            await self._movement()
        self._whole = True

    async def _publish(self, line: bytes) -> None:
        try:
            message = self._submission.message(line, time.time())
            if self._args.jsonl:
                _check_json(line)
            job_id = str(message.message_id)
            if not self._args.dry_run:
                channel = await self._connected()
                publish = self._submission.publish_at(message, time.time())
                confirm = channel.publish(publish.exchange, publish.key, publish.message)
                sent = Sent(self._last + 1, job_id, len(line), publish.exchange, confirm)
                self._flight.append(sent)
                self._bytes_in_flight += len(line)
                self._moved.set()
        except (CommandError, Unencodable) as wrong:
            self.failure = wrong
            self._missing.append(self._last + 1)
            warn(f"line {self._last + 1}: {wrong}", "submit")
        else:
            if self._args.dry_run:
                self._confirm(job_id)
        self._last += 1

    async def _connected(self) -> Channel:
        # A connection that was lost while nothing was in flight has lost nothing.
        if self._connection is None or (self._channel.ended.done() and not self._flight):
            deadline = time.monotonic() + self._args.timeout
            self._connection, self._channel = await until_deadline(
                lambda: connect(self._broker, self._submission), self._broker, deadline
            )
        return self._channel

    async def _land_all(self) -> None:
        while True:
            while not self._flight:
                await self._movement()
            await asyncio.wait({self._flight[0].confirm}, timeout=self._args.timeout)
            if not self._flight[0].confirm.done():
                assert self._connection
                raise self._connection.unconfirmed()
            while self._flight and self._flight[0].confirm.done():
                sent = self._flight[0]
                try:
                    sent.confirm.result()
                except BrokerError as error:
                    # Another line may be the one that the broker refused.
                    error = next(filter(_is_refusal, self._failures()), error)
                    raise explained(error, sent.exchange, self._submission.queue) from None
                self._flight.popleft()
                self._bytes_in_flight -= sent.size
                self._confirm(sent.job_id)
            output.flush()
            self._moved.set()

    def _failures(self) -> Iterator[BrokerError]:
        for sent in self._flight:
            error = sent.confirm.exception() if sent.confirm.done() else None
            if isinstance(error, BrokerError):
                yield error

    async def _movement(self) -> None:
        self._moved.clear()
        await self._moved.wait()

    def _confirm(self, job_id: str) -> None:
        self.confirmed += 1
        print_id(self._args.json, job_id, self._submission.queue, self._submission.due)

    async def _give_up(self, failure: WorkerdError) -> None:
        """Print ``failure``; of the lines in flight, find those that are confirmed all the same."""
        self.failure = failure
        warn(str(failure), "submit")
        pending = [sent.confirm for sent in self._flight if not sent.confirm.done()]
        if pending:
            await asyncio.wait(pending, timeout=_LAST_CONFIRMS)
        for sent in self._flight:
            if sent.confirm.done() and sent.confirm.exception() is None:
                self._confirm(sent.job_id)
            else:
                self._missing.append(sent.number)


def _is_refusal(error: BrokerError) -> bool:
    return error.kind.of_one_message


def _check_json(line: bytes) -> None:
    try:
        # Of bytes, json.loads would also take UTF-16 and UTF-32.
        json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise CommandError(EX_DATAERR, f"not JSON: {error}") from None


async def _interrupted() -> None:
    """Raise CommandError at a signal: then too `submit` names what was not confirmed."""
    loop = asyncio.get_running_loop()
    asked: asyncio.Future[int] = loop.create_future()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # nohup, or a shell that put us in the background, had its reason.
        if signal.getsignal(number) is not signal.SIG_IGN:
            loop.add_signal_handler(number, _resolve, asked, number)
    raise CommandError(128 + await asked, f"interrupted by {signal.Signals(asked.result()).name}")


def _resolve(future: asyncio.Future[int], value: int) -> None:
    if not future.done():
        future.set_result(value)


async def _lines(source: int, limit: int) -> AsyncIterator[bytes]:
    """The lines of a file or pipe as they come; too long ones cut off behind the limit."""
    line = bytearray()
    while chunk := await _read(source):
        end, *more = chunk.split(b"\n")
        line += end
        for begun in more:
            yield bytes(line)
            line = bytearray(begun)
        del line[limit + 1 :]
    if line:
        yield bytes(line)


async def _read(source: int) -> bytes:
    """Some bytes as soon as there are any, b"" at the end; the loop goes on meanwhile."""
    loop = asyncio.get_running_loop()
    readable = loop.create_future()
    try:
        loop.add_reader(source, readable.set_result, None)
    except PermissionError:
        # A regular file, which epoll refuses, is always readable.
        await asyncio.sleep(0)
    else:
        try:
            await readable
        finally:
            loop.remove_reader(source)
    try:
        return os.read(source, _CHUNK)
    except OSError as error:
        raise CommandError(EX_DATAERR, f"cannot read the input: {error.strerror}") from None


def _ranges(numbers: Iterable[int]) -> Iterator[str]:
    """Ascending line numbers as sed addresses: 3, 4, 5 and 9 become "3,5" and "9"."""
    start = end = 0
    for number in [*numbers, 0]:
        if number != end + 1 or not end:
            if end:
                yield f"{start},{end}" if end > start else str(start)
            start = number
        end = number
