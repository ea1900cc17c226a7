"""A job: one AMQP message as workerd understands it, and how it may end.

Pure: instants are passed in (only a new id reads the clock), no I/O. The message
contract that users rely on is documented in docs/messages.md.
"""

from __future__ import annotations

import datetime
import decimal
import enum
import hashlib
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from workerd.errors import WorkerdError

#: Spent attempts of this message; absent on a first try.
ATTEMPT = "x-workerd-attempt"
#: Attempts the submitter asked for (``submit --attempts``).
MAX_ATTEMPTS = "x-workerd-max-attempts"
#: Not started after this instant, milliseconds since 1970.
EXPIRES = "x-workerd-expires"
#: Set anew whenever a dead letter is replayed, so that it never passes for the finished original.
REPLAY = "x-workerd-replay"
#: Stands in every dead letter: when the job failed for the last time.
LAST_FAILURE = "x-workerd-last-failure"

#: Where the broker client leaves the bytes of a header table that cannot be decoded.
UNREADABLE = "\0unreadable"

_OWN = "x-workerd-"
# The broker writes these; republished, RabbitMQ up to 3.13 reads them back as its own
# history and may drop the message as a cycle.
_BOOKKEEPING = (
    "x-death",
    "x-first-death-",
    "x-last-death-",
    "x-delivery-count",
    "x-acquired-count",
)
# All properties and headers must fit one frame (131,072 bytes); beyond it RabbitMQ closes
# the connection with 501.
_MAX_HEADER_BYTES = 64 * 1024
# The longest name of a header, and how deep tables may be in tables.
_MAX_NAME = 255
_MAX_DEPTH = 32
_MAX_ERROR_BYTES = 8 * 1024
_MAX_COUNT = 1_000_000
_TEXTS = (
    "type",
    "message_id",
    "content_type",
    "content_encoding",
    "correlation_id",
    "reply_to",
    "expiration",
)


class BadJob(WorkerdError):
    """The message cannot become a job; ``reason`` is one word, the text says what is wrong."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Message:
    """The body and the basic properties of an AMQP message.

    Strings that are not UTF-8 arrive as bytes. ``timestamp`` is in whole seconds since
    1970, ``expiration`` is the sender's TTL in milliseconds, as text.
    """

    body: bytes = b""
    type: str | bytes | None = None
    message_id: str | bytes | None = None
    content_type: str | bytes | None = None
    content_encoding: str | bytes | None = None
    correlation_id: str | bytes | None = None
    reply_to: str | bytes | None = None
    expiration: str | bytes | None = None
    timestamp: int | None = None
    priority: int | None = None
    headers: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Job:
    """One attempt at a piece of work.

    ``id`` is the message's ``message_id``; a message without one has an id made for the
    log and ``named`` is False. ``attempt`` counts from 1. ``key`` is equal for all
    deliveries of the same attempt of the same message. ``fault`` is set when no handler
    can be given this message; it goes to the dead letters as it is.
    """

    id: str
    named: bool
    queue: str
    type: str | None
    attempt: int
    redelivered: bool
    message: Message
    key: bytes
    fault: BadJob | None = None

    @property
    def body(self) -> bytes:
        return self.message.body

    def header(self, name: str) -> object:
        """A header's value, None when absent; not for workerd's own ``x-workerd-`` ones."""
        return None if name.startswith(_OWN) else self.message.headers.get(name)


@dataclass(frozen=True, slots=True)
class Delivery:
    """A job as it came on one channel: settled there, once, or never.

    ``channel`` is the serial number of the channel, unique in this process; ``received``
    an instant of the monotonic clock.
    """

    channel: int
    tag: int
    received: float
    job: Job


class Outcome(enum.Enum):
    """How a handler's run ended."""

    DONE = "done"
    FAILED = "failed"
    #: The job itself is wrong; no further attempt could help.
    REJECTED = "rejected"
    #: The handler cannot run here and now, as when its program is missing: not the job's fault.
    UNAVAILABLE = "unavailable"
    #: Cut off by a drain.
    INTERRUPTED = "interrupted"


@dataclass(frozen=True, slots=True)
class Report:
    """What a handler says of one run: the outcome and the facts behind it.

    ``reason`` is one word or two (``exit-status``, ``signal``, ``timeout`` …), ``error``
    the text a human wants to see (the end of stderr), ``output`` the kept end of stdout.
    """

    outcome: Outcome
    reason: str = ""
    exit_status: int | None = None
    signal: str | None = None
    error: str = ""
    output: bytes = b""
    #: Seconds that the job asked for before its next attempt; None: it did not ask.
    retry_after: float | None = None
    #: What the job itself says of its end.
    note: str = ""


def new_id() -> str:
    """A UUIDv7 (RFC 9562 §5.7): unique, and sorted by the millisecond it was made in."""
    value = int.from_bytes(os.urandom(16), "big")
    value = (time.time_ns() // 1_000_000) << 80 | value & (1 << 80) - 1
    value = value & ~(0xF << 76) | 7 << 76
    value = value & ~(0x3 << 62) | 2 << 62
    text = f"{value:032x}"
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


def decode(
    message: Message, queue: str, redelivered: bool = False, default_type: str | None = None
) -> Job:
    """The job in a message that came from ``queue``; without a type it has the default one.

    What no handler could be given (properties that are not UTF-8, a header table that
    cannot be decoded) becomes a job with a ``fault``.
    """
    spent = count(message.headers.get(ATTEMPT))
    named = isinstance(message.message_id, str) and bool(message.message_id)
    return Job(
        id=str(message.message_id) if named else new_id(),
        named=named,
        queue=queue,
        type=message.type if message.type and isinstance(message.type, str) else default_type,
        attempt=spent + 1,
        redelivered=redelivered,
        message=message,
        key=_key(message, queue, spent),
        fault=_fault(message),
    )


def _fault(message: Message) -> BadJob | None:
    if UNREADABLE in message.headers:
        return BadJob("bad-headers", "the message's headers cannot be decoded")
    for name in _TEXTS:
        value = getattr(message, name)
        if isinstance(value, bytes):
            return BadJob("bad-property", f"the property {name} is not UTF-8: {value[:40]!r}")
    return None


def count(value: object) -> int:
    """A header that counts something; whatever is not a sane number counts as 0."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_COUNT:
        return value
    return 0


def _key(message: Message, queue: str, spent: int) -> bytes:
    """What two deliveries of one attempt of one message have in common.

    Besides queue, id, attempt, replay mark and body it covers the properties that a
    sender sets anew for each message, so that fewer twins look alike, and the mark of a
    dead letter, which RabbitMQ's own tools move back as it is.
    """
    marks = (message.headers.get(REPLAY), message.headers.get(LAST_FAILURE))
    facts = (queue, message.message_id, spent, *marks, message.type, message.timestamp)
    digest = hashlib.blake2b(repr((*facts, message.correlation_id)).encode(), digest_size=16)
    digest.update(message.body)
    return digest.digest()


def is_reserved(name: str) -> bool:
    """Whether a header is workerd's own, or RabbitMQ's bookkeeping."""
    return name.startswith((_OWN, *_BOOKKEEPING))


def portable_headers(headers: Mapping[str, object]) -> tuple[dict[str, object], list[str]]:
    """The sender's headers that may be published again, and the names of those that cannot.

    The broker's own bookkeeping and workerd's headers are left out silently. A value that
    AMQP's or pika's encoder would refuse, or that would not fit the frame, is dropped.
    """
    kept: dict[str, object] = {}
    dropped: list[str] = []
    room: float = _MAX_HEADER_BYTES
    for name, value in headers.items():
        if name == UNREADABLE:
            dropped.append("all of them")
        elif not (isinstance(name, str) and is_reserved(name)):
            size = _size({name: value})
            if size > room:
                dropped.append(str(name)[:80])
            else:
                kept[name] = value
                room -= size
    return kept, dropped


def _size(value: object, depth: int = 0) -> float:
    """How many bytes a header value takes on the wire, at most; infinite when it cannot be sent."""
    if value is None or isinstance(value, bool | float | datetime.datetime | decimal.Decimal):
        return 9
    if isinstance(value, int):
        return 9 if -(2**63) <= value < 2**63 else math.inf
    if isinstance(value, str | bytes):
        return 5 + _length(value)
    if isinstance(value, dict) and all(_length(name) <= _MAX_NAME for name in value):
        inside = [item for pair in value.items() for item in pair]
    elif isinstance(value, list):
        inside = value
    else:
        return math.inf
    if depth > _MAX_DEPTH:
        return math.inf
    return 5 + sum(_size(item, depth + 1) for item in inside)


def _length(text: str | bytes) -> int:
    return len(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))


@dataclass(frozen=True, slots=True)
class Place:
    """Where a job ran, for its dead letter."""

    host: str
    instance: str


def dead_letter(job: Job, report: Report, place: Place, now: float) -> tuple[Message, list[str]]:
    """The message for ``<queue>.dead``, and the names of headers that had to be dropped.

    Body and properties are the job's own; what happened stands in ``x-workerd-`` headers
    (docs/dead-letters.md). ``now`` is in seconds since 1970.
    """
    headers, dropped = portable_headers(job.message.headers)
    when = datetime.datetime.fromtimestamp(now, datetime.UTC)
    stamp = when.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    first = job.message.headers.get("x-workerd-first-failure")
    facts: dict[str, object] = {
        "x-workerd-reason": report.reason,
        "x-workerd-exit-status": report.exit_status,
        "x-workerd-signal": report.signal,
        "x-workerd-error": _tail(report.error, _MAX_ERROR_BYTES) or None,
        "x-workerd-attempts": job.attempt,
        "x-workerd-queue": job.queue,
        "x-workerd-host": place.host,
        "x-workerd-instance": place.instance,
        "x-workerd-first-failure": first if isinstance(first, str) and len(first) < 40 else stamp,
        LAST_FAILURE: stamp,
        EXPIRES: _expires(job.message, now),
    }
    headers.update({name: value for name, value in facts.items() if value is not None})
    # A TTL of the sender's would make the broker drop the letter.
    copy = replace(job.message, message_id=job.id, headers=headers, expiration=None)
    return copy, dropped


def has_expired(message: Message, now: float) -> bool:
    """Whether it must not start any more, by the instant in its own header.

    A sender's TTL needs no look: the broker drops what exceeds it.
    """
    own = message.headers.get(EXPIRES)
    return isinstance(own, int) and not isinstance(own, bool) and 0 < own < now * 1000


def _expires(message: Message, now: float) -> int | None:
    """The instant after which the job must not start, in ms since 1970; None: never."""
    own = message.headers.get(EXPIRES)
    if isinstance(own, int) and not isinstance(own, bool) and 0 <= own < 2**63:
        return own
    if (
        isinstance(message.expiration, str)
        and message.expiration.isascii()
        and message.expiration.isdigit()
    ):
        start = message.timestamp * 1000 if message.timestamp else int(now * 1000)
        return min(start + int(message.expiration), 2**63 - 1)
    return None


def _tail(text: str, limit: int) -> str:
    """The end of a text, at most ``limit`` bytes of UTF-8."""
    return text.encode("utf-8", "backslashreplace")[-limit:].decode("utf-8", "ignore")
