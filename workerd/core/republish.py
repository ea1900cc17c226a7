"""The copies of a job that workerd publishes: its next attempt, and its dead letter. Pure."""

from __future__ import annotations

import datetime
import decimal
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from workerd.core.job import (
    ATTEMPT,
    COPY,
    DELIVERY_COUNT,
    EXPIRES,
    FIRST_FAILURE,
    LAST_FAILURE,
    MAX_ATTEMPTS,
    OWN,
    SUBMITTER,
    UNREADABLE,
    Job,
    Message,
    Report,
    count,
    submitter,
)

# The broker writes these; republished, RabbitMQ up to 3.13 reads them back as its own
# history and may drop the message as a cycle.
_BOOKKEEPING = (
    "x-death",
    "x-first-death-",
    "x-last-death-",
    DELIVERY_COUNT,
    "x-acquired-count",
)
# What a broker, an exchange type or a plugin obeys in a message that is published. A sender wrote
# these for the broker of that moment; repeated with our rights, each would be an order: another
# address (CC, BCC), a delay, "a duplicate, drop it", a place in a stream.
_ORDERS = frozenset(
    (
        "CC",  # further routing keys, rabbit_basic:header_routes
        "BCC",
        "x-delay",  # the delayed message exchange
        "x-deduplication-header",  # the message deduplication plugin, for queues too
        "x-cache-ttl",
        "x-stream-filter-value",  # streams
        "x-recent-history-no-store",  # the recent history exchange
        "x-received-from",  # federation: drops what has been there before
    )
)
# In place of a queue: RabbitMQ puts the reply queue of the publishing channel there, and refuses
# (406, the channel is gone) what comes from one that has none.
_DIRECT_REPLY = "amq.rabbitmq.reply-to"
# All properties and headers must fit one frame (131,072 bytes); beyond it RabbitMQ closes
# the connection with 501.
_MAX_HEADER_BYTES = 64 * 1024
# The longest name of a header, and how deep tables may be in tables.
_MAX_NAME = 255
_MAX_DEPTH = 32
_MAX_ERROR_BYTES = 8 * 1024
_MAX_NOTE_BYTES = 1024
# Longer than any instant is written.
_MAX_STAMP = 40


def is_reserved(name: str) -> bool:
    """Whether a header is workerd's own, or RabbitMQ's bookkeeping."""
    return name.startswith((OWN, *_BOOKKEEPING))


def is_order(name: object) -> bool:
    """Whether a header steers the broker that gets it in a published message."""
    return name in _ORDERS


def without_orders(message: Message) -> Message:
    """The message as it may be published with our rights: payload alone, whoever wrote it."""
    if message.reply_to == _DIRECT_REPLY:
        message = replace(message, reply_to=None)
    if _ORDERS.isdisjoint(message.headers):
        return message
    headers = {name: value for name, value in message.headers.items() if not is_order(name)}
    return replace(message, headers=headers)


def portable_headers(headers: Mapping[str, object]) -> tuple[dict[str, object], list[str]]:
    """The sender's headers that may be published again, and the names of those that cannot.

    The broker's own bookkeeping and workerd's headers are left out silently. What the broker would
    obey is dropped, and so is a value that AMQP's or pika's encoder would refuse, or that would not
    fit the frame.
    """
    kept: dict[str, object] = {}
    dropped: list[str] = []
    room: float = _MAX_HEADER_BYTES
    for name, value in headers.items():
        if name == UNREADABLE:
            dropped.append("all of them")
        elif is_order(name):
            dropped.append(str(name))
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


class Publish(NamedTuple):
    """A message with its address: the exchange of a delay level, or "" and a queue."""

    exchange: str
    key: str
    message: Message


class Origin(NamedTuple):
    """Where a job ran, for its dead letter."""

    host: str
    instance: str


def next_attempt(
    job: Job, spent: int, copy_id: str, failed: float | None
) -> tuple[Message, list[str]]:
    """The message that brings a job once more, and the names of headers that had to be dropped.

    ``spent`` of its attempts are spent. ``copy_id`` is a text never used before: copies that
    were published twice, for want of a confirm, share it, and nothing else does. ``failed``
    is when this attempt failed, in seconds since 1970; None: it did not.
    """
    return _copy(job, {ATTEMPT: spent or None, COPY: copy_id, FIRST_FAILURE: _first(job, failed)})


def dead_letter(job: Job, report: Report, origin: Origin, now: float) -> tuple[Message, list[str]]:
    """The message for ``<queue>.dead``, and the names of headers that had to be dropped.

    Body and properties are the job's own; what happened stands in ``x-workerd-`` headers
    (docs/dead-letters.md). ``now`` is in seconds since 1970.
    """
    facts = {
        "x-workerd-reason": report.reason,
        "x-workerd-exit-status": report.exit_status,
        "x-workerd-signal": report.signal,
        "x-workerd-error": tail(report.error, _MAX_ERROR_BYTES) or None,
        "x-workerd-note": tail(report.note, _MAX_NOTE_BYTES) or None,
        "x-workerd-attempts": job.attempt if report.ran else job.attempt - 1,
        "x-workerd-queue": job.queue,
        "x-workerd-host": origin.host,
        "x-workerd-instance": origin.instance,
        FIRST_FAILURE: _first(job, now),
        LAST_FAILURE: _stamp(now),
    }
    return _copy(job, facts)


def _copy(job: Job, facts: Mapping[str, object]) -> tuple[Message, list[str]]:
    """The job's message with these headers, those that are not None, instead of its old ones."""
    headers, dropped = portable_headers(job.message.headers)
    facts = {
        **facts,
        MAX_ATTEMPTS: count(job.message.headers.get(MAX_ATTEMPTS)) or None,
        EXPIRES: job.expires,
        SUBMITTER: submitter(job.message),
    }
    headers.update({name: value for name, value in facts.items() if value is not None})
    # A TTL of the sender's would cut a delay short, and make the broker drop a dead letter.
    return replace(job.message, message_id=job.id, headers=headers, expiration=None), dropped


def _first(job: Job, failed: float | None) -> str | None:
    """When a job failed for the first time, if it ever has."""
    first = job.message.headers.get(FIRST_FAILURE)
    if isinstance(first, str) and len(first) < _MAX_STAMP:
        return first
    return None if failed is None else _stamp(failed)


def _stamp(seconds: float) -> str:
    when = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return when.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def tail(text: str, limit: int) -> str:
    """The end of a text, at most ``limit`` bytes of UTF-8."""
    return text.encode("utf-8", "backslashreplace")[-limit:].decode("utf-8", "ignore")
