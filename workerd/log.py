"""The log: events of one or two words with facts as fields, to the journal, as JSON, or plain.

`event("start", handler="resize")` returns at once. One thread writes; what it cannot
write in time is dropped and counted, so that a stopped journald or a full pipe never
holds up a job. Fields of the running job are added from a context variable, to all
events of its task and to the lines it prints.
"""

from __future__ import annotations

import contextvars
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from types import MappingProxyType

from workerd.log_formats import LEVELS, Level, LogRecord, Write, console

#: Records that may wait for the writer; beyond that, the newest are dropped.
BACKLOG = 20_000
#: Records that are written at once. A system call for each would have the loop wait as often for
#: the interpreter's lock.
BATCH = 64
#: Seconds for which more records gather before they are written: waking the thread for each of
#: many would hold up the loop.
LINGER = 0.005

_NO_FIELDS: Mapping[str, object] = MappingProxyType({})
_job: contextvars.ContextVar[Mapping[str, object]] = contextvars.ContextVar(
    "job", default=_NO_FIELDS
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


class job_fields:  # noqa: N801 - used like a function
    """Add these fields to every event of this task, and of callbacks registered in it."""

    def __init__(self, **fields: object) -> None:
        self._fields = fields

    def __enter__(self) -> None:
        self._token = _job.set(self._fields)

    def __exit__(self, *_: object) -> None:
        _job.reset(self._token)


class Log:
    """The backlog and the thread that writes it."""

    def __init__(self) -> None:
        self.threshold = LEVELS["info"]
        self.instance = ""
        self._write: Write = console(sys.stderr.fileno() if sys.stderr else 2)
        self._records: deque[LogRecord] = deque()
        #: Records that were never written, and how many of them the log has told of.
        self.dropped = 0
        self._told = 0
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, write: Write, level: Level, instance: str) -> None:
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
                # Not by an iterator: that fails when something is added before its next step.
                count = min(BATCH, len(self._records))
                self._write_some([self._records[number] for number in range(count)])
            self._wake.clear()
            if self._records:
                self._wake.set()
            time.sleep(LINGER)

    def _write_some(self, records: list[LogRecord]) -> None:
        """Write the first of the backlog, which these are."""
        # A reader of the log that went away is no reason to stop working.
        lost = self._write(*records)
        self.dropped += len(lost)
        for _ in records:
            self._records.popleft()
        # Told only once something can be written again, and not among too much else.
        again = not lost or lost[-1] is not records[-1]
        if again and self.dropped > self._told and len(self._records) < BACKLOG // 2:
            untold = self.dropped - self._told
            self._told += untold
            self.put("log dropped", "warning", {"records": untold})


def dropped() -> int:
    """How many records were never written, since the process has begun."""
    return _log.dropped


_log = Log()
begin = _log.begin
flush = _log.flush
