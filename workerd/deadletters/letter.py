"""A dead letter: what it says, whether it is wanted, and how it becomes a job again. Pure.

How it looks is in `render`.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, replace

from workerd.core.job import (
    DELIVERY_COUNT,
    MAX_ATTEMPTS,
    REPLAY,
    SUBMITTER,
    UNREADABLE,
    Message,
    count,
    submitter,
)
from workerd.core.republish import portable_headers

#: RabbitMQ's own counts of returns. It writes them at each delivery, but 4.0 not at
#: the first.
RETURNS = (DELIVERY_COUNT, "x-acquired-count")

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
        when = f", first at {stamp(self.time)}" if self.time is not None else ""
        words = _BROKER_REASONS.get(self.reason, "")
        return f"{self.reason} in queue {self.queue}, {times}{when}" + (words and f": {words}")


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message of a dead-letter queue; ``tag`` is its number on the channel it came on."""

    message: Message
    tag: int = 0

    @property
    def id(self) -> str:
        """The id of the job, "" when nobody gave it one."""
        return text_of(self.message.message_id) or ""

    @property
    def type(self) -> str | None:
        return text_of(self.message.type)

    @property
    def reason(self) -> str | None:
        """workerd's reason, or else RabbitMQ's."""
        own = self.fact("reason")
        if isinstance(own, str):
            return own
        return self.deaths[0].reason if self.deaths else None

    @property
    def last_failure(self) -> float | None:
        """When the job failed or died, in seconds since 1970, where the letter has that."""
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
        """What RabbitMQ itself did to the letter, the latest first."""
        listed = self.message.headers.get("x-death")
        return (
            [_death(entry) for entry in listed if isinstance(entry, dict)]
            if (isinstance(listed, list))
            else []
        )

    @property
    def returns(self) -> int:
        """How often the letter has come back to the queue, as far as RabbitMQ counts that."""
        return count(self.message.headers.get(DELIVERY_COUNT))

    def fact(self, name: str) -> object:
        """What workerd wrote on the letter: the header ``x-workerd-<name>``, None without it."""
        return self.message.headers.get(f"x-workerd-{name}")

    def age(self, now: float) -> float | None:
        """Seconds since the job failed; never negative, whatever the clocks say."""
        return None if self.last_failure is None else max(0.0, now - self.last_failure)


@dataclass(frozen=True, slots=True)
class Filter:
    """Chooses the letters for which all that is given holds; at most ``limit``.

    ``older_than`` and ``newer_than`` are in seconds since the job failed.
    """

    ids: frozenset[str] = frozenset()
    type: str | None = None
    reason: str | None = None
    older_than: float | None = None
    newer_than: float | None = None
    limit: int | None = None

    @property
    def takes_every(self) -> bool:
        """Whether every letter passes."""
        return replace(self, limit=None) == Filter()

    def takes(self, letter: DeadLetter, now: float) -> bool:
        """Whether a letter passes, apart from the limit; of unknown age, it is not old nor new."""
        age = letter.age(now)
        return (
            (not self.ids or letter.id in self.ids)
            and (self.type is None or letter.type == self.type)
            and (self.reason is None or letter.reason == self.reason)
            and (self.older_than is None or (age is not None and age > self.older_than))
            and (self.newer_than is None or (age is not None and age < self.newer_than))
        )


class Irreplaceable(ValueError):
    """A copy of this letter would lack its headers."""


def replayed(message: Message, replay_id: str) -> tuple[Message, list[str]]:
    """The job in a letter, to be done anew, and the names of headers that had to be dropped.

    ``replay_id`` is a text never used before: without one the daemon could take the job for
    the one that has finished. The instant after which the job must not start is dropped with
    the other facts, or the job would die again at once. The submitter stays the same, and may
    cancel the job whoever sends it back. Raises Irreplaceable.
    """
    headers, dropped = portable_headers(_readable(message))
    wanted = message.headers.get(MAX_ATTEMPTS)
    if count(wanted):
        headers[MAX_ATTEMPTS] = wanted
    owner = submitter(message)
    if owner is not None:
        headers[SUBMITTER] = owner
    headers[REPLAY] = replay_id
    return replace(message, headers=headers), dropped


def renewed(message: Message) -> Message:
    """The same letter, never returned so far. Raises Irreplaceable."""
    headers = _readable(message)
    return replace(
        message, headers={name: value for name, value in headers.items() if name not in RETURNS}
    )


def _readable(message: Message) -> Mapping[str, object]:
    if UNREADABLE in message.headers:
        raise Irreplaceable("its headers cannot be decoded, so a copy would lack them")
    return message.headers


def _death(entry: Mapping[object, object]) -> Death:
    time = entry.get("time")
    return Death(
        queue=text_of(entry.get("queue")) or "?",
        reason=text_of(entry.get("reason")) or "?",
        count=count(entry.get("count")) or 1,
        time=time.timestamp() if isinstance(time, datetime.datetime) else None,
    )


def stamp(seconds: float | None) -> str | None:
    """An instant in seconds since 1970, in UTC, as people write it."""
    if seconds is None:
        return None
    try:
        when = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    except (ValueError, OverflowError, OSError):
        return str(seconds)
    return when.isoformat(timespec="seconds").replace("+00:00", "Z")


def text_of(value: object) -> str | None:
    """A property or header as text, None when the value is no text; escapes what is not UTF-8."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    return value if isinstance(value, str) else None
