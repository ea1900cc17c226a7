"""Everything that can be set: one frozen dataclass per table, with every key and its default.

Durations are seconds, sizes are bytes. workerd.toml(5) explains every key.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from workerd.config.fields import named, option, pairs, section
from workerd.config.template import Template
from workerd.config.text import dotted, toml
from workerd.config.types import (
    MILLISECOND,
    Scalar,
    Unexpected,
    array,
    boolean,
    duration,
    matching,
    number,
    one_of,
    path,
    size,
    text,
    whole,
    whole_or_never,
)
from workerd.config.url import BrokerURL, Secret, redact

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30

Declare = Literal["create", "plain", "wait"]
QueueType = Literal["quorum", "classic"]
ExitMeaning = Literal["done", "retry", "dead"]
HandlerKind = Literal["command", "python", "stream"]
Level = Literal["debug", "info", "warning", "error"]
Format = Literal["auto", "journal", "json", "console"]
Jobs = Literal["all", "failures"]


def _url() -> Scalar[BrokerURL]:
    def read(value: Any) -> BrokerURL:
        if not isinstance(value, str):
            raise Unexpected('a URL such as "amqps://user@host/%2F"')
        return BrokerURL.parse(value)

    return Scalar(read, lambda url: toml(str(url)), secret=True)


def _management_url() -> Scalar[Secret]:
    expected = 'a URL such as "http://user:password@localhost:15672"'

    def read(value: Any) -> Secret:
        try:
            parts = urlsplit(value if isinstance(value, str) else "")
            usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            usable = False
        if not usable:
            raise Unexpected(expected)
        return Secret(value)

    return Scalar(read, lambda url: toml(redact(url.reveal())), secret=True)


def _argument() -> Scalar[str]:
    def read(value: Any) -> str:
        if not isinstance(value, str) or "\0" in value:
            raise Unexpected("a string")
        return value

    return Scalar(read)


def _template() -> Scalar[str]:
    def read(value: Any) -> str:
        argument = _argument().read(value)
        Template.parse(argument)
        return argument

    return Scalar(read)


def _command(argument: Scalar[str], example: str) -> Scalar[tuple[str, ...]]:
    arguments = array(argument, example)

    def read(value: Any) -> tuple[str, ...]:
        command = arguments.read(value)
        if not command[0] or "{" in command[0] or "}" in command[0]:
            raise Unexpected("a program without placeholders or braces as item 1")
        return command

    return Scalar(read, arguments.show)


def _exit_status() -> Scalar[int]:
    def read(value: Any) -> int:
        # A bare key arrives as a string; "075" and "75" must not both be there.
        if value not in map(str, range(1, 256)):
            raise Unexpected("an exit status from 1 to 255")
        return int(value)

    return Scalar(read)


_ONLY_WARM = frozenset({"processes", "recycle_after", "memory_limit", "start_timeout"})
_ONLY_COMMAND = frozenset({"exit_codes", "dashes"})

# The keys that have no effect on a kind of handler, besides the other kinds themselves.
UNUSED: Mapping[HandlerKind, frozenset[str]] = {
    "command": _ONLY_WARM | {"interpreter"},
    "python": _ONLY_COMMAND,
    "stream": _ONLY_COMMAND | {"interpreter"},
}

_EXAMPLE_QUEUES = '["default"]'
# A word "*" or "#" of a name would be a wildcard in the binding that brings the queue its delayed
# jobs: it would get those of others as well.
_QUEUE_NAME = matching(
    r"(?!amq\.|workerd\.)(?!(.*\.)?[*#](\.|\Z))[!-~]{1,200}(?<!\.dead)(?<!\.due)",
    "1 to 200 printable ASCII characters without spaces, not beginning with "
    '"amq." or "workerd.", not ending in ".dead" or ".due", and without "*" or "#" between dots',
)
_HANDLER_NAME = matching(
    r"(?!workerd\.reply\Z)[!-~]{1,255}",
    '1 to 255 printable ASCII characters without spaces, and not "workerd.reply"',
)
_FUNCTION = matching(
    r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*",
    'a function such as "myapp.jobs:resize"',
)
_VARIABLE = matching(
    r"(?!WORKERD_)[A-Za-z_][A-Za-z0-9_]*",
    'the name of a variable, such as LANG, not beginning with "WORKERD_"',
)
_VARIABLE_VALUE = Scalar(_argument().read, lambda _: toml("***"), secret=True)


@dataclass(frozen=True, slots=True)
class TLS:
    """How the two ends of `amqps://` prove who they are; the broker always has to.

    Without `ca_file` the system's authorities count, without `server_name` the URL's host,
    without `cert_file` the client shows no certificate.
    """

    ca_file: Path | None = option(path(), None)
    cert_file: Path | None = option(path(), None)
    key_file: Path | None = option(path(), None)
    server_name: str | None = option(text("a host name"), None)


@dataclass(frozen=True, slots=True)
class Broker:
    """Where RabbitMQ is and how to talk to it; `management_url` is None when there is none."""

    urls: tuple[BrokerURL, ...] = option(array(_url(), '["amqps://user@host/%2F"]'), (BrokerURL(),))
    password_file: Path | None = option(path(), None)
    heartbeat: float = option(duration(1, 3600), 30.0)
    reconnect_max: float = option(duration(MILLISECOND), 30.0)
    ack_timeout: float = option(duration(MILLISECOND), 1800.0)
    tls: TLS = section(TLS)
    management_url: Secret | None = option(_management_url(), None)


@dataclass(frozen=True, slots=True)
class Worker:
    """What this instance does; `load` fills in all configured queues when `queues` is absent.

    `trust_users` may own what an application brings, and so run code as the daemon's user.
    """

    queues: tuple[str, ...] = option(array(text(), _EXAMPLE_QUEUES), ())
    drain_timeout: float = option(duration(), 60.0)
    ready_wait: float = option(duration(), 5.0)
    remember: float = option(duration(), 3600.0)
    trust_users: tuple[str, ...] = option(array(text("the name of a user"), '["app"]'), ())


@dataclass(frozen=True, slots=True)
class Queue:
    """A work queue; a `prefetch` of 0 becomes `concurrency`."""

    name: str
    concurrency: int = option(whole(1, 65_535), 4)
    prefetch: int = option(whole(1, 65_535), 0)
    declare: Declare = option(one_of(Declare), "create")
    type: QueueType = option(one_of(QueueType), "quorum")
    default_handler: str | None = option(text("the name of a handler"), None)
    max_length: int | None = option(whole(1, 2**31 - 1), None)
    max_deliveries: int = option(whole(1, 1_000_000), 50)
    max_priority: int | None = option(whole(1, 255), None)

    def __post_init__(self) -> None:
        if not self.prefetch:
            object.__setattr__(self, "prefetch", self.concurrency)


@dataclass(frozen=True, slots=True)
class Retry:
    """How often a job is tried, and how long it waits in between.

    `attempts` is what a job gets, `max_attempts` the most that it may ask for.
    """

    attempts: int = option(whole(1, 1000), 5)
    delay: float = option(duration(), 5.0)
    multiplier: float = option(number(1, 1000), 2.0)
    max_delay: float = option(duration(), 3600.0)
    jitter: bool = option(boolean(), True)
    max_attempts: int = option(whole(1, 1000), 25)


@dataclass(frozen=True, slots=True)
class Handler:
    """What runs a type of job; exactly one of `command`, `python` and `stream` is set."""

    name: str
    command: tuple[str, ...] = option(_command(_template(), '["sleep", "{body}"]'), ())
    python: str | None = option(_FUNCTION, None)
    stream: tuple[str, ...] = option(_command(_argument(), '["/usr/bin/node", "render.js"]'), ())
    interpreter: Path | None = option(path(), None)
    queue: str = option(text("the name of a queue"), "default")
    timeout: float = option(duration(MILLISECOND), 1500.0)
    kill_grace: float = option(duration(MILLISECOND), 10.0)
    retry: Retry = section(Retry)
    exit_codes: Mapping[int, ExitMeaning] = pairs(
        _exit_status(), one_of(ExitMeaning), {75: "retry", 65: "dead"}
    )
    working_directory: Path | None = option(path(), None)
    environment: Mapping[str, str] = pairs(_VARIABLE, _VARIABLE_VALUE, {})
    max_body: int = option(size(0, GiB), MiB)
    output_limit: int = option(size(0, GiB), 64 * KiB)
    dashes: bool = option(boolean(), False)
    processes: int = option(whole(1, 1000), 2)
    recycle_after: int | None = option(whole_or_never(10**9), 1000)
    memory_limit: int | None = option(size(MiB, 1024 * GiB), None)
    start_timeout: float = option(duration(MILLISECOND), 30.0)

    @property
    def kind(self) -> HandlerKind:
        if self.python is not None:
            return "python"
        return "stream" if self.stream else "command"


@dataclass(frozen=True, slots=True)
class Log:
    """What is logged, and how; `output_lines` bounds each stream of each job."""

    level: Level = option(one_of(Level), "info")
    format: Format = option(one_of(Format), "auto")
    jobs: Jobs = option(one_of(Jobs), "all")
    output_lines: int = option(whole(0, 1_000_000), 1000)

    @property
    def routine(self) -> Level:
        """The level of what happens to every job."""
        return "info" if self.jobs == "all" else "debug"


@dataclass(frozen=True, slots=True)
class Control:
    """Who may steer a running instance: the members of `operators`, besides root and its user."""

    operators: str | None = option(
        matching(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}\$?", "the name of a group"), None
    )


@dataclass(frozen=True, slots=True)
class Settings:
    """The whole configuration.

    `origins` says for each dotted key where its value came from: a file, or the name of an
    environment variable. A key that has its default is not in it.
    """

    broker: Broker = section(Broker)
    worker: Worker = section(Worker)
    queues: Mapping[str, Queue] = named(Queue, _QUEUE_NAME)
    handlers: Mapping[str, Handler] = named(Handler, _HANDLER_NAME)
    log: Log = section(Log)
    control: Control = section(Control)
    origins: Mapping[str, Path | str] = field(default_factory=dict)
    files: tuple[Path, ...] = ()

    def origin(self, *keys: str) -> Path | str | None:
        """Where the value of a key came from, or the first value in a table; None: a default."""
        place = dotted(keys)
        for key, origin in self.origins.items():
            if key == place or key.startswith(place + "."):
                return origin
        return None

    def where(self, *keys: str) -> str:
        """`file: key.path`, the beginning of a problem; for a default, the file of its table."""
        for depth in range(len(keys), 0, -1):
            origin = self.origin(*keys[:depth])
            if origin is not None:
                return f"{origin}: {dotted(keys)}"
        return dotted(keys)
