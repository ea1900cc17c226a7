"""From a message to the job that it is. Pure, but for the time in the ids that it makes."""

from __future__ import annotations

import hashlib
import operator

from workerd.core.job import (
    ATTEMPT,
    COPY,
    EXPIRES,
    LAST_FAILURE,
    REPLAY,
    UNREADABLE,
    BadJob,
    Job,
    Message,
    count,
)
from workerd.ids import new_id

#: Those that are text, as a rule.
_TEXTS = (
    "type",
    "message_id",
    "content_type",
    "content_encoding",
    "correlation_id",
    "reply_to",
    "expiration",
)
_texts = operator.attrgetter(*_TEXTS)


def decode(
    message: Message,
    queue: str,
    redelivered: bool = False,
    default_type: str | None = None,
    now: float = 0.0,
) -> Job:
    """The job in a message that came from ``queue``; without a type it has the default one.

    What no handler could be given (properties that are not UTF-8, a header table that
    cannot be decoded) becomes a job with a ``fault``. ``now`` is when it came, in seconds
    since 1970.
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
        expires=_expires(message, now),
        fault=_fault(message),
    )


def _fault(message: Message) -> BadJob | None:
    if UNREADABLE in message.headers:
        return BadJob("bad-headers", "the message's headers cannot be decoded")
    for name, value in zip(_TEXTS, _texts(message), strict=True):
        if isinstance(value, bytes):
            return BadJob("bad-property", f"the property {name} is not UTF-8: {value[:40]!r}")
    return None


def _key(message: Message, queue: str, spent: int) -> bytes:
    """What two deliveries of one attempt of one message have in common.

    Besides queue, id, attempt, replay mark and body it covers the properties that a
    sender sets anew for each message, so that fewer twins look alike, the mark of a copy,
    and that of a dead letter, which RabbitMQ's own tools move back as it is.
    """
    mark = message.headers.get
    facts = (
        queue,
        message.message_id,
        spent,
        mark(REPLAY),
        mark(LAST_FAILURE),
        mark(COPY),
        message.type,
        message.timestamp,
        message.correlation_id,
    )
    digest = hashlib.blake2b(repr(facts).encode(), digest_size=16)
    digest.update(message.body)
    return digest.digest()


def _expires(message: Message, now: float) -> int | None:
    """The instant after which the job must not start, in ms since 1970; None: never.

    The broker has handed over what has a TTL, so at that moment it was not over: where the
    sender's clock disagrees, it counts from there.
    """
    own = message.headers.get(EXPIRES)
    if isinstance(own, int) and not isinstance(own, bool) and 0 < own < 2**63:
        return own
    text = message.expiration
    if not (isinstance(text, str) and text.isascii() and text.isdigit() and len(text) < 20):
        return None
    arrival = int(now * 1000)
    # A timestamp has whole seconds.
    sent = (message.timestamp or 0) * 1000 + 999
    start = sent if arrival - int(text) <= sent <= arrival else arrival
    return min(start + int(text), 2**63 - 1)
