"""What a job prints: lines into the log, and the end of it kept."""

from __future__ import annotations

import contextvars
from collections import deque

from workerd import log, log_formats

#: The end of stderr that a dead letter carries, in bytes.
ERROR_LIMIT = 8192
#: Longer lines are cut; journald's own limit is 48 KiB.
MAX_LINE = 8192
#: The bytes among which the last lines are looked for.
_TAIL = 256 * 1024


class Output:
    """One stream of one job.

    The first half of ``lines`` is logged as it comes, the last half at the end, and one
    line counts what was left out in between. ``tail`` is the end of it, at most ``keep``
    bytes. Takes any amount in constant memory.
    """

    def __init__(self, stream: str, level: log_formats.Level, lines: int, keep: int) -> None:
        self._stream = stream
        self._level = level
        self._head = lines - lines // 2
        self._last = lines // 2
        self._keep = keep
        self._kept = bytearray()
        self._line = bytearray()
        self._rest = bytearray()
        self._rest_lines = 0

    @property
    def tail(self) -> bytes:
        return bytes(self._kept[-self._keep :])

    def feed(self, data: bytes) -> None:
        """More of the stream."""
        _append(self._kept, data, self._keep)
        start = 0
        while self._head > 0:
            end = data.find(b"\n", start)
            if end < 0:
                # What is beyond the limit is not kept even while the line goes on.
                self._line += data[start : start + MAX_LINE + 1 - len(self._line)]
                return
            self._log(self._line + data[start : min(end, start + MAX_LINE + 1)])
            self._line.clear()
            self._head -= 1
            start = end + 1
        self._rest_lines += data.count(b"\n", start)
        _append(self._rest, data[start:], _TAIL)

    def close(self) -> None:
        """The end of the stream: log what was held back."""
        if self._line:
            self._log(self._line)
        if self._rest and not self._rest.endswith(b"\n"):
            self._rest_lines += 1
        kept = self._rest.removesuffix(b"\n").split(b"\n") if self._rest else []
        if 1 < len(kept) < self._rest_lines:
            del kept[0]  # its beginning is gone
        last = kept[-self._last :] if self._last else []
        omitted = self._rest_lines - len(last)
        if omitted > 0:
            log.event("output omitted", self._level, stream=self._stream, lines=omitted)
        for line in last:
            self._log(line)

    def _log(self, line: bytes | bytearray) -> None:
        text = log_formats.text_of(bytes(line[:MAX_LINE].removesuffix(b"\r")))
        log.event(
            "output",
            self._level,
            stream=self._stream,
            text=text + ("…" if len(line) > MAX_LINE else ""),
        )


class LogLines:
    """What one job logs through its language's logging; bounded like an `Output`."""

    def __init__(self, lines: int) -> None:
        self._head = lines - lines // 2
        self._last: deque[tuple[log_formats.Level, str, str]] = deque(maxlen=lines // 2)
        self._rest_lines = 0

    def add(self, level: log_formats.Level, logger: str, text: str) -> None:
        """One text; each of its lines is a line of the log."""
        for line in text.split("\n"):
            if self._head > 0:
                self._head -= 1
                self._log(level, logger, line)
            else:
                self._rest_lines += 1
                self._last.append((level, logger, line))

    def close(self) -> None:
        """The end of them: log what was held back."""
        omitted = self._rest_lines - len(self._last)
        if omitted > 0:
            log.event("output omitted", stream="log", lines=omitted)
        for entry in self._last:
            self._log(*entry)

    @staticmethod
    def _log(level: log_formats.Level, logger: str, line: str) -> None:
        text = log_formats.safe(line[:MAX_LINE])
        log.event("output", level, stream="log", logger=log_formats.safe(logger[:200]), text=text)


class Transcript:
    """What a warm process prints and logs for one job, or between two; logged in ``context``."""

    def __init__(self, context: contextvars.Context, lines: int) -> None:
        self._context = context
        self._lines = lines
        self._outputs: dict[str, Output] = {}
        self._log_lines: LogLines | None = None

    def printed(self, stream: str, data: bytes) -> None:
        """More of one of the two output streams."""
        output = self._outputs.get(stream)
        if output is None:
            keep = ERROR_LIMIT if stream == "stderr" else 0
            output = self._outputs[stream] = Output(stream, "info", self._lines, keep)
        self._context.run(output.feed, data)

    def logged(self, level: log_formats.Level, logger: str, text: str) -> None:
        """A text that came through the language's logging."""
        if self._log_lines is None:
            self._log_lines = LogLines(self._lines)
        self._context.run(self._log_lines.add, level, logger, text)

    @property
    def stderr(self) -> str:
        """The end of what was written to standard error."""
        output = self._outputs.get("stderr")
        return log_formats.text_lines(output.tail) if output else ""

    def close(self) -> None:
        """Log what was held back; what comes after that is counted anew."""
        for output in self._outputs.values():
            self._context.run(output.close)
        self._outputs.clear()
        if self._log_lines is not None:
            self._context.run(self._log_lines.close)
            self._log_lines = None


def _append(buffer: bytearray, data: bytes, limit: int) -> None:
    """Append, and now and then cut the front off, so that about ``limit`` bytes stay."""
    buffer += data[-limit:] if limit else b""
    if len(buffer) > 2 * limit:
        del buffer[:-limit]
