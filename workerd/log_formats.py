"""How events are written: to the journal, as JSON, for a console. What text is safe to show."""

from __future__ import annotations

import functools
import json
import os
import re
import select
import socket
import struct
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

LEVELS = {"debug": 7, "info": 6, "warning": 4, "error": 3}

Level = Literal["debug", "info", "warning", "error"]

LogRecord = tuple[float, str, str, Mapping[str, object]]


class Write(Protocol):
    """Writes records; returns those of them that could not be written."""

    def __call__(self, *records: LogRecord) -> Sequence[LogRecord]: ...


#: Seconds that the journal may keep the writer waiting.
JOURNAL_PATIENCE = 5
JOURNAL_SOCKET = "/run/systemd/journal/socket"
# C0 and C1 controls, and what else terminals or log viewers take as the end of a line or
# a change of direction.
_UNSAFE = re.compile(
    "[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)

#: What needs no quotes, and has nothing unsafe.
_BARE = re.compile(r"[!#-<>-~]+")

#: The size of a value that has several lines, in a journal entry.
_SIZE = struct.Struct("<Q")


def safe(text: str) -> str:
    """The text on one line, with control characters as ``\\x1b``: it cannot forge anything."""
    return _UNSAFE.sub(
        lambda match: match[0].encode("unicode_escape", "backslashreplace").decode(), text
    )


def text_of(data: bytes) -> str:
    """Bytes of unknown origin as safe text."""
    return safe(data.decode("utf-8", "backslashreplace"))


def text_lines(data: bytes) -> str:
    """Bytes of unknown origin as safe text that may have several lines."""
    return "\n".join(text_of(line) for line in data.split(b"\n")).rstrip("\n")


def writer(style: str) -> Write:
    """The writer for ``[log] format``: journal, json, console, or auto.

    ``auto`` is the journal's own protocol when stderr is connected to it, JSON into a
    file or pipe, and the console format on a terminal.
    """
    stderr = sys.stderr.fileno()
    if style == "auto":
        on_journal = os.environ.get("JOURNAL_STREAM") == _identity(stderr)
        style = "journal" if on_journal else "console" if os.isatty(stderr) else "json"
    if style == "journal":
        return journal(JOURNAL_SOCKET, fallback=prefixed(stderr))
    return json_lines(stderr) if style == "json" else console(stderr)


def _identity(fd: int) -> str:
    status = os.fstat(fd)
    return f"{status.st_dev}:{status.st_ino}"


def json_lines(fd: int) -> Write:
    """One JSON object a line: time, level, event, then the fields."""
    return _lines(fd, _json_line)


def _json_line(record: LogRecord) -> str:
    # Put together by hand, which takes half as long as having the whole encoded.
    when, level, name, fields = record
    facts = [
        f', "{key}": {_JSON.get(type(value), _json_other)(value)}'
        for key, value in fields.items()
        if value is not None
    ]
    start = f'{{"time": "{_stamp(when)}", "level": "{level}", "event": {_json_string(name)}'
    return f"{start}{''.join(facts)}}}"


_json_string = json.encoder.encode_basestring_ascii

_json_other = json.JSONEncoder(default=str).encode

_JSON: dict[type, Callable[[Any], str]] = {
    str: _json_string,
    int: int.__repr__,
    bool: {False: "false", True: "true"}.__getitem__,
}


def console(fd: int) -> Write:
    """For eyes: time, event, fields."""

    def line(record: LogRecord) -> str:
        when, level, _name, _fields = record
        clock = time.strftime("%H:%M:%S", time.localtime(when)) + f".{int(when * 1000) % 1000:03d}"
        mark = "" if level in ("debug", "info") else f"{level}: "
        return f"{clock} {mark}{_plain(record)}"

    return _lines(fd, line)


def prefixed(fd: int) -> Write:
    """Lines with systemd's ``<6>`` level prefix (sd-daemon(3)), for a journal behind stderr."""
    return _lines(fd, lambda record: f"<{LEVELS[record[1]]}>{_plain(record)}")


def _lines(fd: int, line: Callable[[LogRecord], str]) -> Write:
    def write(*records: LogRecord) -> Sequence[LogRecord]:
        text = "".join(line(record) + "\n" for record in records)
        try:
            _write_all(fd, text.encode("utf-8", "backslashreplace"))
        except OSError:
            return records
        return ()

    return write


def journal(path: str, fallback: Write) -> Write:
    """Datagrams in the journal's native protocol, one field each, written by hand.

    python3-systemd would wait, holding the interpreter's lock, for a journald that is
    stopped. Here the socket has a timeout, only this thread waits, and what cannot be
    sent goes to ``fallback`` when there is no journal at all.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    # The kernel's timeout: for one of Python's each message takes two system calls.
    patience = struct.pack("@ll", JOURNAL_PATIENCE, 0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, patience)

    def write(*records: LogRecord) -> Sequence[LogRecord]:
        lost: list[LogRecord] = []
        for record in records:
            try:
                sock.sendto(_datagram(record), path)
            except (FileNotFoundError, ConnectionRefusedError):
                lost.extend(fallback(record))
            except OSError:
                lost.append(record)
        return lost

    return write


def _datagram(record: LogRecord) -> bytes:
    _when, level, name, fields = record
    lines, blocks = [_head(name, level)], b""
    for key, value in (("", _plain(record)), *fields.items()):
        if value is None:
            continue
        text = value if isinstance(value, str) else str(value)
        if "\n" in text:
            data = text.encode("utf-8", "backslashreplace")
            blocks += b"%s\n%s%s\n" % (_variable(key).encode(), _SIZE.pack(len(data)), data)
        else:
            lines.append(f"{_variable(key)}={text}\n")
    return "".join(lines).encode("utf-8", "backslashreplace") + blocks


@functools.lru_cache(256)
def _head(name: str, level: str) -> str:
    """What all entries of an event say."""
    # What a job has printed needs no explanation.
    explained = f"MESSAGE_ID={message_id(name)}\n" if name != "output" else ""
    priority = f"PRIORITY={LEVELS[level]}\n"
    return f"{explained}{priority}SYSLOG_IDENTIFIER=workerd\nWORKERD_EVENT={name}\n"


@functools.lru_cache(256)
def _variable(key: str) -> str:
    return "WORKERD_" + key.upper() if key else "MESSAGE"


@functools.cache
def message_id(event: str) -> str:
    """The event's MESSAGE_ID: what `journalctl -x` finds its explanation by, the same for ever."""
    import uuid  # only where there is a journal

    return uuid.uuid5(uuid.UUID("6f1c5b1e-7d0f-4b55-9d86-3f1a0c6e2b47"), event).hex


def _plain(record: LogRecord) -> str:
    """An event as one safe line. A job's own output is shown as it was printed."""
    _when, _level, name, fields = record
    if name == "output":
        whose = fields.get("job_id") or fields.get("handler")
        return f"{_quoted(whose)} {fields.get('stream')}: {fields.get('text')}"
    shown = (
        f"{key}={_quoted(value)}"
        for key, value in fields.items()
        if value is not None and value != "" and key != "instance"
    )
    return " ".join((name, *shown))


def _quoted(value: object) -> str:
    text = str(value)
    if _BARE.fullmatch(text):
        return text
    if not text or re.search(r'[\s"=]', text):
        text = json.dumps(text, ensure_ascii=False)
    return safe(text)


def _stamp(when: float) -> str:
    return _millisecond(int(when * 1000))


@functools.lru_cache(2)
def _millisecond(when: int) -> str:
    seconds, rest = divmod(when, 1000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{rest:03d}Z"


def _write_all(fd: int, data: bytes) -> None:
    while data:
        try:
            data = data[os.write(fd, data) :]
        except BlockingIOError:
            # Somebody else made our stderr non-blocking, as a shell's terminal often is.
            select.select([], [fd], [])
