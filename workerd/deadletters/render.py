"""How dead letters look: a row of a table, the details for people, JSON for programs. Pure."""

from __future__ import annotations

import base64
import datetime
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

from workerd.core.job import EXPIRES, Message, submitter
from workerd.deadletters.letter import RETURNS, DeadLetter, stamp, text_of
from workerd.units import age as as_age

#: A body up to this many bytes is shown as text.
_SHORT = 4096
#: How many bytes of any other body are shown.
_HEAD = 64

#: What workerd writes on a letter, besides its reason: headers without their prefix.
_FACTS = (
    "attempts",
    "exit-status",
    "signal",
    "error",
    "note",
    "queue",
    "host",
    "instance",
    "first-failure",
    "last-failure",
    "expires",
    "submitter",
)
# The headers that are not shown as such.
_SHOWN_OTHERWISE = (
    "x-workerd-reason",
    *(f"x-workerd-{name}" for name in _FACTS),
    *RETURNS,
    "x-death",
    "x-first-death-",
    "x-last-death-",
)

HEADINGS = ("ID", "TYPE", "REASON", "ATTEMPTS", "EXIT", "AGE", "SIZE")


def row(letter: DeadLetter, now: float) -> tuple[str, ...]:
    """The letter as a line of a table, under HEADINGS."""
    attempts = letter.fact("attempts")
    cells = (
        letter.id,
        letter.type,
        letter.reason,
        attempts if isinstance(attempts, int) else None,
        letter.end,
        as_age(letter.age(now)),
        len(letter.message.body),
    )
    return tuple("-" if cell in (None, "") else str(cell) for cell in cells)


def summary(letter: DeadLetter) -> dict[str, object]:
    """The letter without its body, for JSON."""
    facts = {name.replace("-", "_"): plain(letter.fact(name)) for name in _FACTS}
    return {
        "id": letter.id or None,
        "type": letter.type,
        "reason": letter.reason,
        **facts,
        "deaths": [
            {"queue": d.queue, "reason": d.reason, "count": d.count, "time": stamp(d.time)}
            for d in letter.deaths
        ],
        "size": len(letter.message.body),
    }


def export(letter: DeadLetter) -> dict[str, object]:
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
        return {text_of(name) or str(name): plain(inner) for name, inner in value.items()}
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
class Details:
    """All of a letter for a human: facts with their names, and texts of several lines."""

    facts: list[tuple[str, str]]
    texts: list[tuple[str, str]]


def details(letter: DeadLetter, now: float) -> Details:
    """All of the letter, for people; ``now`` is in seconds since 1970."""
    body = letter.message.body
    texts = [("error", text_of(letter.fact("error"))), (f"body, {len(body)} bytes", _shown(body))]
    return Details(
        [(name, str(value)) for name, value in _facts(letter, now) if value not in (None, "")],
        [(name, text) for name, text in texts if text],
    )


def _facts(letter: DeadLetter, now: float) -> Iterator[tuple[str, object]]:
    message = letter.message
    age = letter.age(now)
    yield "id", letter.id or "none"
    yield "type", letter.type or "none"
    yield "reason", letter.reason or "unknown: neither workerd nor RabbitMQ names any"
    for death in letter.deaths:
        yield "RabbitMQ", death
    yield "exit status", letter.fact("exit-status")
    yield "signal", letter.fact("signal")
    yield "note", text_of(letter.fact("note"))
    yield "attempts", letter.fact("attempts")
    yield "queue", letter.fact("queue")
    yield "host", letter.fact("host")
    yield "instance", letter.fact("instance")
    yield "first failure", letter.fact("first-failure")
    yield "last failure", letter.fact("last-failure")
    yield "age", as_age(age)
    expires = letter.message.headers.get(EXPIRES)
    if isinstance(expires, int):
        yield "not to start after", stamp(expires / 1000)
    yield "submitted", stamp(message.timestamp)
    user = submitter(message)
    yield "submitted by", None if user is None else f"user {user}"
    for name in ("content_type", "content_encoding", "correlation_id", "reply_to", "expiration"):
        yield name.replace("_", " "), text_of(getattr(message, name))
    yield "priority", message.priority
    for name, value in sorted(message.headers.items(), key=lambda item: str(item[0])):
        if not (isinstance(name, str) and name.startswith(_SHOWN_OTHERWISE)):
            yield f"header {text_of(name)}", plain(value)


def _shown(body: bytes) -> str:
    """A body as text if it is short UTF-8, else its first bytes."""
    if len(body) <= _SHORT:
        try:
            return body.decode()
        except UnicodeDecodeError:
            pass
    more = " ..." if len(body) > _HEAD else ""
    return body[:_HEAD].hex(" ") + more
