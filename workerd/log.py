"""The log: events of one or two words with facts as fields, to the journal, as JSON, or plain.

`event("start", handler="resize")` returns at once. One thread writes; what it cannot
write in time is dropped and counted, so that a stopped journald or a full pipe never
holds up a job. Fields of the running job are added from a context variable, to all
events of its task and to the lines it prints.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import json
import os
import re
import select
import socket
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Literal

LEVELS = {"debug": 7, "info": 6, "warning": 4, "error": 3}
Level = Literal["debug", "info", "warning", "error"]
Record = tuple[float, str, str, Mapping[str, object]]

#: Records that may wait for the writer; beyond that, the newest are dropped.
BACKLOG = 20_000
#: Seconds for which more records gather before they are written: waking the thread for each of
#: many would hold up the loop.
LINGER = 0.005
JOURNAL_SOCKET = "/run/systemd/journal/socket"

_NO_FIELDS: Mapping[str, object] = MappingProxyType({})
_job: contextvars.ContextVar[Mapping[str, object]] = contextvars.ContextVar(
    "job", default=_NO_FIELDS
)
# C0 and C1 controls, and what else terminals or log viewers take as the end of a line or
# a change of direction.
_UNSAFE = re.compile(
    "[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def event(name: str, level: Level = "info", **fields: object) -> None:
    """Log an event. ``name`` is a constant of one or two words; facts are the fields."""
    _log.put(name, level, fields)


def debug(name: str, **fields: object) -> None:
    _log.put(name, "debug", fields)


def warning(name: str, **fields: object) -> None:
    _log.put(name, "warning", fields)


def error(name: str, **fields: object) -> None:
    _log.put(name, "error", fields)


@contextlib.contextmanager
def job_fields(**fields: object) -> Iterator[None]:
    """Add these fields to every event of this task, and of callbacks registered in it."""
    token = _job.set(fields)
    try:
        yield
    finally:
        _job.reset(token)


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


class Log:
    """The backlog and the thread that writes it."""

    def __init__(self) -> None:
        self.threshold = LEVELS["info"]
        self.instance = ""
        self._write: Callable[[Record], None] = console(sys.stderr.fileno())
        self._records: deque[Record] = deque()
        #: Records that were never written, and how many of them the log has told of.
        self.dropped = 0
        self._told = 0
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, write: Callable[[Record], None], level: Level, instance: str) -> None:
        """From now on write through ``write``, in a thread of its own."""
        self._write = write
        self.instance = instance
        self.threshold = LEVELS[level]
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="log", daemon=True)
            self._thread.start()

    def put(self, name: str, level: Level, fields: dict[str, object]) -> None:
        if LEVELS[level] > self.threshold:
            return
        merged = {**_job.get(), **fields, "instance": self.instance or None}
        record = (time.time(), level, name, merged)
        if self._thread is None:
            self._write(record)
        elif len(self._records) >= BACKLOG:
            self.dropped += 1
        else:
            self._records.append(record)
            if not self._wake.is_set():
                self._wake.set()

    def flush(self, timeout: float) -> None:
        """Wait until everything is written, but not longer than ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        while (
            self._thread and (self._records or self._wake.is_set()) and time.monotonic() < deadline
        ):
            time.sleep(0.005)  # the loop is over by now; nothing else is held up

    def _run(self) -> None:
        while True:
            self._wake.wait()
            while self._records:
                self._write_one(self._records[0])
                self._records.popleft()
            self._wake.clear()
            if self._records:
                self._wake.set()
            time.sleep(LINGER)

    def _write_one(self, record: Record) -> None:
        try:
            self._write(record)
        except OSError:
            # A reader of the log that went away is no reason to stop working.
            self.dropped += 1
        else:
            # Told only once something can be written again, and not among too much else.
            if self.dropped > self._told and len(self._records) < BACKLOG // 2:
                lost = self.dropped - self._told
                self._told += lost
                self.put("log dropped", "warning", {"records": lost})


def writer(style: str) -> Callable[[Record], None]:
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


def json_lines(fd: int) -> Callable[[Record], None]:
    """One JSON object a line: time, level, event, then the fields."""
    encode = json.JSONEncoder(default=str).encode

    def write(record: Record) -> None:
        when, level, name, fields = record
        facts = {key: value for key, value in fields.items() if value is not None}
        entry = {"time": _stamp(when), "level": level, "event": name, **facts}
        _write_all(fd, encode(entry).encode("utf-8", "backslashreplace") + b"\n")

    return write


def console(fd: int) -> Callable[[Record], None]:
    """For eyes: time, event, fields."""

    def write(record: Record) -> None:
        when, level, _name, _fields = record
        clock = time.strftime("%H:%M:%S", time.localtime(when)) + f".{int(when * 1000) % 1000:03d}"
        mark = "" if level in ("debug", "info") else f"{level}: "
        _write_all(fd, f"{clock} {mark}{_plain(record)}\n".encode("utf-8", "backslashreplace"))

    return write


def prefixed(fd: int) -> Callable[[Record], None]:
    """Lines with systemd's ``<6>`` level prefix (sd-daemon(3)), for a journal behind stderr."""

    def write(record: Record) -> None:
        line = f"<{LEVELS[record[1]]}>{_plain(record)}\n"
        _write_all(fd, line.encode("utf-8", "backslashreplace"))

    return write


def journal(path: str, fallback: Callable[[Record], None]) -> Callable[[Record], None]:
    """Datagrams in the journal's native protocol, one field each, written by hand.

    python3-systemd would wait, holding the interpreter's lock, for a journald that is
    stopped. Here the socket has a timeout, only this thread waits, and what cannot be
    sent goes to ``fallback`` when there is no journal at all.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.settimeout(5.0)

    def write(record: Record) -> None:
        _when, level, name, fields = record
        entry: dict[str, object] = {
            "MESSAGE": _plain(record),
            # What a job has printed needs no explanation.
            "MESSAGE_ID": message_id(name) if name != "output" else None,
            "PRIORITY": LEVELS[level],
            "SYSLOG_IDENTIFIER": "workerd",
            "WORKERD_EVENT": name,
        }
        entry.update({"WORKERD_" + key.upper(): value for key, value in fields.items()})
        datagram = b"".join(_field(key, value) for key, value in entry.items() if value is not None)
        try:
            sock.sendto(datagram, path)
        except (FileNotFoundError, ConnectionRefusedError):
            fallback(record)

    return write


@functools.cache
def message_id(event: str) -> str:
    """The event's MESSAGE_ID: what `journalctl -x` finds its explanation by, the same for ever."""
    import uuid  # only where there is a journal

    return uuid.uuid5(uuid.UUID("6f1c5b1e-7d0f-4b55-9d86-3f1a0c6e2b47"), event).hex


def _field(name: str, value: object) -> bytes:
    data = str(value).encode("utf-8", "backslashreplace")
    if b"\n" in data:
        return name.encode() + b"\n" + struct.pack("<Q", len(data)) + data + b"\n"
    return name.encode() + b"=" + data + b"\n"


def _plain(record: Record) -> str:
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
    if not text or re.search(r'[\s"=]', text):
        text = json.dumps(text, ensure_ascii=False)
    return safe(text)


def _stamp(when: float) -> str:
    return _second(int(when)) + f".{int(when * 1000) % 1000:03d}Z"


@functools.lru_cache(2)
def _second(when: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(when))


def _write_all(fd: int, data: bytes) -> None:
    while data:
        try:
            data = data[os.write(fd, data) :]
        except BlockingIOError:
            # Somebody else made our stderr non-blocking, as a shell's terminal often is.
            select.select([], [fd], [])


def dropped() -> int:
    """How many records were never written, since the process has begun."""
    return _log.dropped


_log = Log()
begin = _log.begin
flush = _log.flush
