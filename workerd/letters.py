"""A dead letter: what it says, whether it is wanted, and how it becomes a job again. Pure."""

from __future__ import annotations

import base64
import datetime
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace

from workerd.job import (
    EXPIRES,
    MAX_ATTEMPTS,
    REPLAY,
    UNREADABLE,
    Message,
    count,
    portable_headers,
)

#: A body up to this many bytes is shown as text.
_SHORT = 4096
#: So many bytes of any other body are shown.
_HEAD = 64
# RabbitMQ's own counts of returns. It writes them at each delivery, but 4.0 not at the first.
_RETURNS = ("x-delivery-count", "x-acquired-count")

#: workerd's words on a letter, besides its reason: headers without their prefix.
_FACTS = (
    "attempts",
    "exit-status",
    "signal",
    "error",
    "queue",
    "host",
    "instance",
    "first-failure",
    "last-failure",
    "expires",
)
# The headers that are not shown as such.
_TOLD = (
    "x-workerd-reason",
    *(f"x-workerd-{name}" for name in _FACTS),
    *_RETURNS,
    "x-death",
    "x-first-death-",
    "x-last-death-",
)

#: RabbitMQ's reasons, in words.
_BROKER_REASONS = {
    "expired": "its time to live was over before anybody took it",
    "rejected": "a consumer refused it; workerd does so with what it cannot decode",
    "maxlen": "the queue was full",
    "delivery_limit": "it came back to the queue more often than the queue allows",
}


@dataclass(frozen=True, slots=True)
class Death:
    """Why RabbitMQ itself moved a message here; ``time`` is in seconds since 1970."""

    queue: str
    reason: str
    count: int
    time: float | None

    def __str__(self) -> str:
        times = "once" if self.count == 1 else f"{self.count} times"
        when = f", first at {_stamp(self.time)}" if self.time is not None else ""
        words = _BROKER_REASONS.get(self.reason, "")
        return f"{self.reason} in queue {self.queue}, {times}{when}" + (words and f": {words}")


@dataclass(frozen=True, slots=True)
class Letter:
    """A message of a dead-letter queue; ``tag`` is its number on the channel it came on."""

    message: Message
    tag: int = 0

    @property
    def id(self) -> str:
        """The id of the job, "" when nobody gave it one."""
        return _text(self.message.message_id) or ""

    @property
    def type(self) -> str | None:
        return _text(self.message.type)

    @property
    def reason(self) -> str | None:
        """workerd's reason, or else RabbitMQ's."""
        own = self.fact("reason")
        if isinstance(own, str):
            return own
        return self.deaths[0].reason if self.deaths else None

    @property
    def last_failure(self) -> float | None:
        """When it failed or died, in seconds since 1970, where the letter tells."""
        own = self.fact("last-failure")
        if isinstance(own, str):
            try:
                return datetime.datetime.fromisoformat(own).timestamp()
            except (ValueError, OverflowError):
                return None
        return self.deaths[0].time if self.deaths else None

    @property
    def end(self) -> str:
        """The exit status or the signal that ended its program, "" when there is none."""
        found = self.fact("signal"), self.fact("exit-status")
        return next((str(value) for value in found if value is not None), "")

    @property
    def deaths(self) -> list[Death]:
        """What RabbitMQ itself did to it, the latest first."""
        listed = self.message.headers.get("x-death")
        return (
            [_death(entry) for entry in listed if isinstance(entry, dict)]
            if (isinstance(listed, list))
            else []
        )

    @property
    def returns(self) -> int:
        """How often it has come back to the queue, as far as RabbitMQ counts that."""
        return count(self.message.headers.get("x-delivery-count"))

    def fact(self, name: str) -> object:
        """What workerd says of it: the header ``x-workerd-<name>``, None when there is none."""
        return self.message.headers.get(f"x-workerd-{name}")

    def age(self, now: float) -> float | None:
        """Seconds since it failed; never negative, whatever the clocks say."""
        return None if self.last_failure is None else max(0.0, now - self.last_failure)


@dataclass(frozen=True, slots=True)
class Filter:
    """Which letters are meant: those for which all that is given holds; at most ``limit``."""

    ids: frozenset[str] = frozenset()
    type: str | None = None
    reason: str | None = None
    older_than: float | None = None
    limit: int | None = None

    @property
    def takes_every(self) -> bool:
        """Whether it tells no letter from another."""
        return replace(self, limit=None) == Filter()

    def takes(self, letter: Letter, now: float) -> bool:
        """Whether a letter is meant, apart from the limit. One of unknown age is not old."""
        age = letter.age(now)
        return (
            (not self.ids or letter.id in self.ids)
            and (self.type is None or letter.type == self.type)
            and (self.reason is None or letter.reason == self.reason)
            and (self.older_than is None or (age is not None and age > self.older_than))
        )


class Irreplaceable(ValueError):
    """A copy of this letter would lack its headers."""


def replayed(message: Message, mark: str) -> tuple[Message, list[str]]:
    """The job in a letter, to be done anew, and the names of headers that had to be dropped.

    ``mark`` is a text never used before: without it the daemon could take the job for the
    one that it has finished. The instant after which it must not start is dropped with the
    other facts, or it would come back at once. Raises Irreplaceable.
    """
    headers, dropped = portable_headers(_readable(message))
    wish = message.headers.get(MAX_ATTEMPTS)
    if count(wish):
        headers[MAX_ATTEMPTS] = wish
    headers[REPLAY] = mark
    return replace(message, headers=headers), dropped


def renewed(message: Message) -> Message:
    """The same letter, never returned so far. Raises Irreplaceable."""
    headers = _readable(message)
    return replace(
        message, headers={name: value for name, value in headers.items() if name not in _RETURNS}
    )


def _readable(message: Message) -> Mapping[str, object]:
    if UNREADABLE in message.headers:
        raise Irreplaceable("its headers cannot be decoded, so a copy would lack them")
    return message.headers


# What is shown


HEADINGS = ("ID", "TYPE", "REASON", "ATTEMPTS", "EXIT", "AGE", "SIZE")


def row(letter: Letter, now: float) -> tuple[str, ...]:
    """The letter as a line of a table, under HEADINGS."""
    attempts = letter.fact("attempts")
    cells = (
        letter.id,
        letter.type,
        letter.reason,
        attempts if isinstance(attempts, int) else None,
        letter.end,
        _age(letter.age(now)),
        len(letter.message.body),
    )
    return tuple("-" if cell in (None, "") else str(cell) for cell in cells)


def _age(seconds: float | None) -> str:
    """Two digits or so: 45s, 12m, 3h, 20d."""
    if seconds is None:
        return ""
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f}{unit}"
    return f"{seconds:.0f}s"


def summary(letter: Letter) -> dict[str, object]:
    """The letter without its body, for JSON."""
    facts = {name.replace("-", "_"): plain(letter.fact(name)) for name in _FACTS}
    return {
        "id": letter.id or None,
        "type": letter.type,
        "reason": letter.reason,
        **facts,
        "deaths": [
            {"queue": d.queue, "reason": d.reason, "count": d.count, "time": _stamp(d.time)}
            for d in letter.deaths
        ],
        "size": len(letter.message.body),
    }


def everything(letter: Letter) -> dict[str, object]:
    """All of the letter, for JSON; a body that is not UTF-8 is in base64."""
    message = letter.message
    properties = {
        each.name: plain(getattr(message, each.name))
        for each in fields(Message)
        if each.name not in ("body", "headers") and getattr(message, each.name) is not None
    }
    body: dict[str, object]
    try:
        body = {"body": message.body.decode()}
    except UnicodeDecodeError:
        body = {"body_base64": base64.b64encode(message.body).decode()}
    return {
        **summary(letter),
        "properties": properties,
        "headers": plain(message.headers),
        **body,
    }


def plain(value: object) -> object:
    """A header's value as JSON can hold it."""
    if isinstance(value, Mapping):
        return {_text(name) or str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return value.isoformat() if isinstance(value, datetime.datetime) else str(value)


@dataclass(frozen=True, slots=True)
class Sheet:
    """A letter for a human: facts with their names, and texts of several lines."""

    facts: list[tuple[str, str]] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)


def sheet(letter: Letter, now: float) -> Sheet:
    """Everything that a human needs to know of a letter."""
    body = letter.message.body
    text = _shown(body)
    return Sheet(
        [(name, str(value)) for name, value in _facts(letter, now) if value not in (None, "")],
        [
            (name, value)
            for name, value in (
                ("error", _text(letter.fact("error"))),
                (f"body, {len(body)} bytes", text),
            )
            if value
        ],
    )


def _facts(letter: Letter, now: float) -> Iterator[tuple[str, object]]:
    message = letter.message
    age = letter.age(now)
    yield "id", letter.id or "none"
    yield "type", letter.type or "none"
    yield "reason", letter.reason or "unknown: neither workerd nor RabbitMQ left a word"
    for death in letter.deaths:
        yield "RabbitMQ", death
    yield "exit status", letter.fact("exit-status")
    yield "signal", letter.fact("signal")
    yield "attempts", letter.fact("attempts")
    yield "queue", letter.fact("queue")
    yield "host", letter.fact("host")
    yield "instance", letter.fact("instance")
    yield "first failure", letter.fact("first-failure")
    yield "last failure", letter.fact("last-failure")
    yield "age", _age(age)
    expires = letter.message.headers.get(EXPIRES)
    if isinstance(expires, int):
        yield "not to start after", _stamp(expires / 1000)
    yield "submitted", _stamp(message.timestamp)
    for name in ("content_type", "content_encoding", "correlation_id", "reply_to", "expiration"):
        yield name.replace("_", " "), _text(getattr(message, name))
    yield "priority", message.priority
    for name, value in sorted(message.headers.items(), key=lambda item: str(item[0])):
        if not (isinstance(name, str) and name.startswith(_TOLD)):
            yield f"header {_text(name)}", plain(value)


def _shown(body: bytes) -> str:
    """A body as text if it is short UTF-8, else its first bytes."""
    if len(body) <= _SHORT:
        try:
            return body.decode()
        except UnicodeDecodeError:
            pass
    more = " ..." if len(body) > _HEAD else ""
    return body[:_HEAD].hex(" ") + more


def _death(entry: Mapping[object, object]) -> Death:
    time = entry.get("time")
    return Death(
        queue=_text(entry.get("queue")) or "?",
        reason=_text(entry.get("reason")) or "?",
        count=count(entry.get("count")) or 1,
        time=time.timestamp() if isinstance(time, datetime.datetime) else None,
    )


def _stamp(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    try:
        when = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    except (ValueError, OverflowError, OSError):
        return str(seconds)
    return when.isoformat(timespec="seconds").replace("+00:00", "Z")


def _text(value: object) -> str | None:
    """A text property or header, None when it is none; escapes what is not UTF-8."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    return value if isinstance(value, str) else None
