"""The errors of workerd: one small tree, raised where detected, caught where decided."""

from __future__ import annotations

import enum


class WorkerdError(Exception):
    """The root of all errors that workerd raises on purpose."""


class CommandError(WorkerdError):
    """The job, or the command line, is not acceptable; ``status`` is the exit status."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class SettingsError(WorkerdError):
    """The configuration is wrong. ``problems`` holds every problem found, one text each."""

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class ErrorKind(enum.Enum):
    """What went wrong at the broker; decides who waits, and how long."""

    #: The network or the broker process is away: try again soon.
    AWAY = "away"
    #: Login, virtual host or permission refused: only a human can help, so try again slowly.
    REFUSED = "refused"
    #: No such queue or exchange.
    MISSING = "missing"
    #: Somebody else uses the queue exclusively.
    LOCKED = "locked"
    #: The queue exists with other arguments.
    CONFLICT = "conflict"
    #: The message is larger than the broker's max_message_size, or its headers than a frame: this
    #: broker will never take it as it is, and takes others.
    TOO_LARGE = "too-large"
    #: The same, for a property of the message that the broker does not accept.
    UNACCEPTABLE = "unacceptable"
    #: The broker took deliveries back because they were not acknowledged in time.
    ACK_TIMEOUT = "ack-timeout"
    #: The queue is full, or an alarm stops publishing.
    BUSY = "busy"
    #: We closed it ourselves.
    CLOSED = "closed"

    @property
    def of_one_message(self) -> bool:
        """Whether the broker refuses this message for good, whatever becomes of others."""
        return self in (ErrorKind.TOO_LARGE, ErrorKind.UNACCEPTABLE)


class BrokerError(WorkerdError):
    """A connection, a channel or a request at the broker failed, with the broker's own words."""

    def __init__(self, kind: ErrorKind, text: str, code: int | None = None) -> None:
        super().__init__(text)
        self.kind = kind
        self.code = code


class Unroutable(BrokerError):
    """The broker has no queue for a published message."""

    def __init__(self, queue: str) -> None:
        super().__init__(ErrorKind.MISSING, f"no queue {queue!r}", 312)


class Unencodable(WorkerdError):
    """A message has a property or header that AMQP cannot carry."""


EX_OK = 0
EX_USAGE = 64
EX_DATAERR = 65
EX_NOINPUT = 66
EX_UNAVAILABLE = 69
EX_SOFTWARE = 70
EX_CANTCREAT = 73
EX_IOERR = 74
EX_TEMPFAIL = 75
EX_PROTOCOL = 76
EX_NOPERM = 77
EX_CONFIG = 78


def exit_status(error: WorkerdError) -> int:
    """The exit status of a command that ends with this error."""
    if isinstance(error, CommandError):
        return error.status
    if isinstance(error, SettingsError):
        return EX_CONFIG
    if isinstance(error, Unencodable):
        return EX_DATAERR
    if isinstance(error, Unroutable):
        return EX_CANTCREAT
    if isinstance(error, BrokerError):
        return {
            ErrorKind.TOO_LARGE: EX_DATAERR,
            ErrorKind.UNACCEPTABLE: EX_DATAERR,
            ErrorKind.BUSY: EX_TEMPFAIL,
            ErrorKind.REFUSED: EX_NOPERM,
            ErrorKind.MISSING: EX_CANTCREAT,
        }.get(error.kind, EX_UNAVAILABLE)
    return EX_UNAVAILABLE
