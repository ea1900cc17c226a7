"""What is to be submitted: the message, and where it goes at which moment."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from workerd.config.model import Handler, Settings
from workerd.config.text import did_you_mean
from workerd.core import times, topology
from workerd.core.job import COPY, EXPIRES, MAX_ATTEMPTS, Message
from workerd.core.jobspec import JobSpec
from workerd.core.republish import Publish, is_order, is_reserved, portable_headers
from workerd.errors import EX_DATAERR, EX_USAGE, BrokerError, CommandError, ErrorKind
from workerd.ids import new_id

#: AMQP's limit for the properties that are short strings, in bytes.
_SHORT = 255
#: The same for a queue whose name stands behind the bits of a delay in a routing key.
_DELAYED = _SHORT - 2 * topology.LEVELS
#: The largest body that any RabbitMQ can be made to take.
_LARGEST_BODY = 512 << 20
#: What a job may have at most, whatever its handler allows.
_MOST_ATTEMPTS = 1000
#: In seconds; a hundred years fit every header.
_LONGEST_TTL = 36_500 * 86_400.0


class Submission(NamedTuple):
    """What is to be submitted: where to, and the message that each body is put into.

    ``due`` is in seconds since 1970, None when nothing is to be delayed; ``ttl`` in seconds.
    """

    queue: str
    template: Message
    max_body: int
    due: float | None
    ttl: float | None

    def message(self, body: bytes, now: float, copy_id: str | None = None) -> Message:
        """The message with this body, sent ``now`` (in seconds since 1970).

        However often it is published, for want of a confirm, the daemons take its copies for one
        job: they have the same ``copy_id`` and timestamp, and no other message has that id. It is
        made here unless it is given. Raises CommandError when the handler would refuse the body.
        """
        if len(body) > self.max_body:
            text = f"the body is larger than {self.max_body} bytes, the handler's max_body"
            raise CommandError(EX_DATAERR, text)
        return replace(
            self.template,
            body=body,
            message_id=self.template.message_id or new_id(),
            timestamp=int(now),
            headers={**self.template.headers, COPY: copy_id or new_id()},
        )

    def publish_at(self, message: Message, now: float) -> Publish:
        """The message as it must be published at this instant; later it may be another."""
        delay = times.seconds_until(self.due, now) if self.due is not None else 0
        # The clock may have been set back since the order was given.
        delay = min(delay, topology.MAX_DELAY)
        if self.ttl is not None:
            # Not the property expiration: it would cut the delay short.
            expires = int((now + delay + self.ttl) * 1000)
            message = replace(message, headers={**message.headers, EXPIRES: expires})
        exchange, key = topology.delayed(self.queue, delay) if delay else ("", self.queue)
        return Publish(exchange, key, message)


def prepare(spec: JobSpec, settings: Settings, now: float) -> Submission:
    """The submission that a specification asks for; ``now`` is in seconds since 1970.

    Raises CommandError.
    """
    handler = settings.handlers.get(spec.type)
    if handler is None and spec.queue is None and settings.handlers:
        hint = did_you_mean(spec.type, settings.handlers)
        raise CommandError(
            EX_USAGE, f"no handler is named {spec.type!r}{hint}; name a --queue to send it anyway"
        )
    for option, text in (("TYPE", spec.type), ("--id", spec.id), ("--queue", spec.queue)):
        if text is not None and not is_short_text(text):
            raise CommandError(EX_USAGE, f"{option} must be 1 to {_SHORT} bytes of printable text")
    if spec.priority is not None and not 0 <= spec.priority <= 255:
        raise CommandError(EX_USAGE, "--priority must be from 0 to 255")
    if spec.ttl is not None and not 0 < spec.ttl <= _LONGEST_TTL:
        raise CommandError(EX_USAGE, "--ttl must be more than nothing, and at most a hundred years")
    for name, value in spec.headers.items():
        _check_header(name, value)
    headers, too_large = portable_headers(spec.headers)
    if too_large:
        raise CommandError(
            EX_DATAERR, f"--header {too_large[0]}: all headers together are too large"
        )
    if spec.attempts is not None:
        headers[MAX_ATTEMPTS] = _attempts(spec.attempts, handler)
    queue = spec.queue or (handler.queue if handler else "default")
    due = _due(spec.due, now)
    if due is not None and len(queue.encode()) > _DELAYED:
        raise CommandError(
            EX_USAGE, f"a delay needs a queue whose name has at most {_DELAYED} bytes"
        )
    return Submission(
        queue=queue,
        template=Message(
            type=spec.type,
            message_id=spec.id,
            content_type=spec.content_type,
            priority=spec.priority,
            headers=headers,
        ),
        max_body=handler.max_body if handler else _LARGEST_BODY,
        due=due,
        ttl=spec.ttl,
    )


def explained(trouble: BrokerError, exchange: str, queue: str) -> BrokerError:
    """With what to do about it, if it was met on the way through ``exchange`` to ``queue``.

    ``exchange`` is "" where nothing was delayed.
    """
    if not exchange or trouble.kind is not ErrorKind.MISSING:
        return trouble
    remedy = f"start a worker of {queue!r} once, or have 'workerd setup' declare it"
    return BrokerError(ErrorKind.MISSING, f"{trouble}; a delay needs it: {remedy}", trouble.code)


def _due(due: float | None, now: float) -> float | None:
    """When the jobs come due, None when that is now or past. Raises CommandError."""
    if due is not None and due - now > topology.MAX_DELAY:
        days = topology.MAX_DELAY // 86_400
        raise CommandError(EX_USAGE, f"a job can be delayed by {days} days at most")
    # Who sends a job late, such as a script that was held up, wants it all the more.
    return due if due is not None and due > now else None


def _attempts(wanted: int, handler: Handler | None) -> int:
    if not 1 <= wanted <= _MOST_ATTEMPTS:
        raise CommandError(EX_USAGE, f"--attempts must be from 1 to {_MOST_ATTEMPTS}")
    if handler and wanted > handler.retry.max_attempts:
        limit = f"{handler.retry.max_attempts}, the retry.max_attempts of {handler.name!r}"
        raise CommandError(EX_USAGE, f"--attempts must be at most {limit}")
    return wanted


def _check_header(name: str, value: str) -> None:
    """Raises CommandError for what a submitter may not set."""
    if not is_short_text(name):
        raise CommandError(
            EX_USAGE, f"--header {name!r}: expected NAME=VALUE, with a printable name"
        )
    if is_reserved(name.lower()):
        raise CommandError(
            EX_USAGE, f"--header {name}: only workerd or RabbitMQ may set this header"
        )
    if is_order(name):
        raise CommandError(
            EX_USAGE,
            f"--header {name}: RabbitMQ would take it for an order",
        )
    try:
        value.encode()
    except UnicodeEncodeError:
        raise CommandError(EX_DATAERR, f"--header {name}: the value is not UTF-8") from None


def is_short_text(text: str) -> bool:
    """Whether it can be a property, and be shown to people."""
    return text.isprintable() and 0 < len(text.encode()) <= _SHORT
