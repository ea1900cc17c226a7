"""A job: one AMQP message as workerd understands it, and how it may end.

Pure: instants are passed in (only a new id, of `ids`, reads the clock), no I/O. The message
contract that users rely on is documented in docs/messages.md.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar, dataclass_transform

from workerd.core.states import BEGUN, DISPATCHED, ENDED, FINISHED, RECALLED, WITHDRAWN, State
from workerd.errors import WorkerdError

#: Spent attempts of this message; absent on a first try.
ATTEMPT = "x-workerd-attempt"
#: Set anew on each copy that workerd makes of a job: one that comes twice was published twice,
#: for want of a confirm, and is one job.
COPY = "x-workerd-copy"
#: Attempts the submitter asked for (``submit --attempts``).
MAX_ATTEMPTS = "x-workerd-max-attempts"
#: Not started after this instant, milliseconds since 1970.
EXPIRES = "x-workerd-expires"
#: Set anew whenever a dead letter is replayed, so that it never passes for the finished original.
REPLAY = "x-workerd-replay"
#: When the job failed for the first time; stands in every copy of it.
FIRST_FAILURE = "x-workerd-first-failure"
#: Stands in every dead letter: when the job failed for the last time.
LAST_FAILURE = "x-workerd-last-failure"
#: The number of the user who submitted the job through a daemon, on the daemon's host.
SUBMITTER = "x-workerd-submitter"
#: RabbitMQ's count of returns, of quorum queues alone. Its meaning changes between versions.
DELIVERY_COUNT = "x-delivery-count"

#: With this begins the name of every header that is workerd's own.
OWN = "x-workerd-"

#: Where the broker client leaves the bytes of a header table that cannot be decoded.
UNREADABLE = "\0unreadable"

_MAX_COUNT = 1_000_000


T = TypeVar("T")


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def value(cls: type[T]) -> type[T]:
    """A frozen dataclass with slots, as far as the type checker is concerned.

    Having it checked at run time as well makes each instance take three times as long to create,
    and several are made of every job.
    """
    return dataclasses.dataclass(slots=True, unsafe_hash=True)(cls)


class BadJob(WorkerdError):
    """The message cannot become a job; ``reason`` is one word, the text says what is wrong."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


@value
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


@value
class Job:
    """One attempt at a piece of work.

    ``id`` is the message's ``message_id``; a message without one has an id made for the
    log and ``named`` is False. ``attempt`` counts from 1. ``key`` is equal for all
    deliveries of the same attempt of the same message, and where it is ``unique``, for no
    others. It must not start after ``expires``, milliseconds since 1970; None: it may.
    ``lost_starts`` of its attempts ended with the daemon that had started them. ``fault`` is
    set when no handler can be given this message; it goes to the dead letters as it is.
    """

    id: str
    named: bool
    queue: str
    type: str | None
    attempt: int
    redelivered: bool
    message: Message
    key: bytes
    expires: int | None = None
    lost_starts: int = 0
    fault: BadJob | None = None

    @property
    def body(self) -> bytes:
        return self.message.body

    @property
    def unique(self) -> bool:
        """Whether workerd itself has published it: no other job has such a key."""
        return self.named and isinstance(self.message.headers.get(COPY), str)

    @property
    def returns(self) -> int:
        """How often it has come back to its queue, as far as RabbitMQ counts that."""
        return count(self.message.headers.get(DELIVERY_COUNT))

    def has_expired(self, now: float) -> bool:
        """Whether it must not start any more; ``now`` is in seconds since 1970."""
        return self.expires is not None and self.expires < now * 1000

    def after_lost_starts(self, number: int) -> Job:
        """The same job, when so many more attempts of it ended with their daemon."""
        return replace(self, attempt=self.attempt + number, lost_starts=number)

    def header(self, name: str) -> object:
        """A header's value, None when absent; not for workerd's own ``x-workerd-`` ones."""
        return None if name.startswith(OWN) else self.message.headers.get(name)


@value
class Delivery:
    """A job as it came on one channel: settled there, once, or never.

    ``channel`` is the serial number of the channel, unique in this process; ``received``
    an instant of the monotonic clock. One that was ``delayed`` and has come due is overdue
    while it waits.
    """

    channel: int
    tag: int
    received: float
    job: Job
    delayed: bool = False


@dataclass(slots=True, eq=False)
class Run:
    """A job that is being worked on. Nobody but the ledger changes anything about it.

    ``delivery`` is what its verdict settles: None once that is lost, until a redelivery rejoins.
    """

    job: Job
    delivery: Delivery | None
    state: State = BEGUN

    @property
    def begun(self) -> bool:
        """Whether a process has, or had, this job."""
        return self.state in (BEGUN, ENDED, FINISHED)

    @property
    def dispatched(self) -> bool:
        """Whether it is with its handler without a slot."""
        return self.state in (DISPATCHED, RECALLED)

    @property
    def withdrawn(self) -> bool:
        """Whether it is not to begin."""
        return self.state in (RECALLED, WITHDRAWN)


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


@value
class Report:
    """What a handler says of one run: the outcome and the facts behind it.

    ``reason`` is one word or two (``exit-status``, ``signal``, ``timeout`` …), ``error``
    the text a human wants to see (the end of stderr), ``output`` the kept end of stdout.
    The job may have asked for its own delay before the next attempt, in seconds, and left a
    ``note``. ``ran`` is False when it never began.
    """

    outcome: Outcome
    reason: str = ""
    exit_status: int | None = None
    signal: str | None = None
    error: str = ""
    output: bytes = b""
    retry_after: float | None = None
    note: str = ""
    ran: bool = True


def submitter(message: Message) -> int | None:
    """The user who submitted it through a daemon, None when nobody knows."""
    uid = message.headers.get(SUBMITTER)
    return uid if isinstance(uid, int) and not isinstance(uid, bool) and uid >= 0 else None


def count(value: object) -> int:
    """A header that counts something; whatever is not a sane number counts as 0."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_COUNT:
        return value
    return 0
