"""The protocol between the daemon and its warm processes, version 1 (docs/protocol.md). Pure."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any, TypeVar

from workerd.core.job import Job, Outcome, value
from workerd.core.topology import MAX_DELAY

VERSION = 1
#: The longest line that a process may send, in bytes; what follows a line has no limit.
MAX_LINE = 1 << 20

#: What most answers are, which need not be decoded.
_DONE = re.compile(rb'\{"frame": ?(\d{1,18}), ?"outcome": ?"done"\}')

_OWN = "x-workerd-"
_OUTCOMES = {each.value: each for each in (Outcome.DONE, Outcome.FAILED, Outcome.REJECTED)}
_LEVELS = frozenset(("debug", "info", "warning", "error"))


class ProtocolError(Exception):
    """A process has sent something that is not in the protocol."""


def frame(number: int, job: Job, max_attempts: int) -> bytes:
    """A job as it is sent. Its first key is the frame's number, its last the body's length."""
    message = job.message
    # Put together by hand, which takes a quarter of the time of having it encoded.
    head = (
        f'{{"frame":{number},'
        f'"id":{_quoted(job.id)},'
        f'"type":{_quoted(job.type)},'
        f'"queue":{_quoted(job.queue)},'
        f'"attempt":{job.attempt},'
        f'"max_attempts":{max_attempts},'
        f'"redelivered":{"true" if job.redelivered else "false"},'
        f'"content_type":{_quoted(message.content_type)},'
        f'"content_encoding":{_quoted(message.content_encoding)},'
        f'"headers":{_encode(_headers(job)) if message.headers else "{}"},'
        f'"length":{len(message.body)}}}\n'
    )
    return head.encode() + message.body


def _quoted(text: object) -> str:
    return "null" if text is None else json.encoder.encode_basestring_ascii(str(text))


def _headers(job: Job) -> dict[str, object]:
    """The job's headers without workerd's own, as JSON can have them."""
    return {
        _text(name): _plain(value)
        for name, value in job.message.headers.items()
        if not _text(name).startswith(_OWN)
    }


def _plain(value: object) -> object:
    """A header's value; what JSON does not have (bytes, timestamps, infinity) becomes text."""
    if isinstance(value, dict):
        return {_text(name): _plain(inside) for name, inside in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, bool | int) else _text(value)


def _text(value: object) -> str:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


_encode = json.JSONEncoder(separators=(",", ":")).encode


@value
class Ready:
    """The process can take jobs."""


@value
class StartupError:
    """The process cannot start, and says why."""

    text: str


@value
class Printed:
    """Some bytes of an output stream."""

    stream: str
    data: bytes


@value
class LogLine:
    """A line, or several, for the log."""

    level: Any
    logger: str
    text: str


@value
class Answer:
    """The end of a job. ``last``: the process takes no other after it.

    ``printed``: it goes on only when what the job has printed by itself has been read.
    """

    frame: int
    outcome: Outcome
    output: bytes = b""
    error: str = ""
    note: str = ""
    retry_after: float | None = None
    last: bool = False
    printed: bool = False


Message = Ready | StartupError | Printed | LogLine | Answer


class Parser:
    """Messages out of what a process sends, in constant memory.

    Of a result the last ``keep`` bytes are kept.
    """

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._rest = b""
        #: The message whose bytes are still coming, and how many are.
        self._head: dict[str, Any] = {}
        self._missing = 0
        self._payload = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """More of the stream; the messages that it completes. Raises ProtocolError."""
        if self._rest:
            data = self._rest + data
        start = 0
        while True:
            if self._missing:
                part = data[start : start + self._missing]
                start += len(part)
                self._missing -= len(part)
                if "output" in self._head:
                    if part:
                        yield Printed(self._head["output"], part)
                else:
                    self._payload += part
                    if len(self._payload) > 2 * self._keep:
                        self._cut()
                if self._missing:
                    break
                if "frame" in self._head:
                    self._cut()
                    yield _answer(self._head, bytes(self._payload))
            end = data.find(b"\n", start)
            if end < 0:
                break
            done = _DONE.fullmatch(data, start, end)
            if done:
                start = end + 1
                yield Answer(int(done[1]), Outcome.DONE)
                continue
            head = _head(data[start:end])
            start = end + 1
            self._missing = _length(head)
            if self._missing:
                self._head = head
                self._payload.clear()
            elif "output" not in head:
                yield _message(head)
        self._rest = data[start:]
        if len(self._rest) > MAX_LINE:
            raise ProtocolError(f"a line of more than {MAX_LINE} bytes")

    def _cut(self) -> None:
        # Not `-keep`, which for 0 is the beginning.
        del self._payload[: max(0, len(self._payload) - self._keep)]


def _head(line: bytes) -> dict[str, Any]:
    try:
        head = json.loads(line)
    except (ValueError, RecursionError):
        head = None
    if not isinstance(head, dict):
        raise ProtocolError(f"a line that is not a JSON object: {line[:80]!r}")
    if "output" in head and head["output"] not in ("stdout", "stderr"):
        raise ProtocolError(f"no such output: {_excerpt(head['output'])}")
    return head


def _length(head: dict[str, Any]) -> int:
    length = head.get("length", 0)
    if type(length) is not int or length < 0:
        raise ProtocolError(f"no length: {_excerpt(length)}")
    if length and not ("frame" in head or "output" in head):
        raise ProtocolError("bytes after a line that has none")
    return length


def _message(head: dict[str, Any]) -> Message:
    if "frame" in head:
        return _answer(head, b"")
    if "log" in head:
        level = _field(head, "log", str, "")
        if level not in _LEVELS:
            raise ProtocolError(f"no such level: {_excerpt(level)}")
        return LogLine(level, _field(head, "logger", str, ""), _field(head, "text", str, ""))
    if "ready" in head:
        if type(head["ready"]) is not int or head["ready"] != VERSION:
            raise ProtocolError(f"it speaks version {_excerpt(head['ready'])}, not {VERSION}")
        return Ready()
    if "error" in head:
        return StartupError(_field(head, "error", str, ""))
    raise ProtocolError(f"an unknown message: {_excerpt(head)}")


def _answer(head: dict[str, Any], output: bytes) -> Answer:
    number = head["frame"]
    outcome = _OUTCOMES.get(_field(head, "outcome", str, ""))
    if type(number) is not int or outcome is None:
        raise ProtocolError(f"an answer with frame {_excerpt(number)} and no known outcome")
    return Answer(
        number,
        outcome,
        output,
        error=_field(head, "error", str, ""),
        note=_field(head, "note", str, ""),
        retry_after=_delay(head.get("retry_after")),
        last=_field(head, "last", bool, False),
        printed=_field(head, "printed", bool, False),
    )


T = TypeVar("T")


def _field(head: dict[str, Any], name: str, kind: type[T], default: T) -> T:
    """A value of a line; null counts as absent."""
    found = head.get(name)
    if found is None:
        return default
    if not isinstance(found, kind):
        raise ProtocolError(f"{name} is no {_NAMES[kind]}: {_excerpt(found)}")
    return found


_NAMES = {str: "text", bool: "true or false"}


def _delay(seconds: object) -> float | None:
    if seconds is None:
        return None
    number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not number or not 0 <= seconds < math.inf:  # type: ignore[operator]
        raise ProtocolError(f"retry_after is not a number of seconds: {_excerpt(seconds)}")
    # Before it becomes a float: an integer may be larger than any.
    return float(min(seconds, MAX_DELAY))


def _excerpt(value: object) -> str:
    """The beginning of a value, however deep or large that is."""
    try:
        return repr(value)[:80]
    except (ValueError, RecursionError):
        return f"a {type(value).__name__}"
