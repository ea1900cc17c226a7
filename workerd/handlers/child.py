"""A warm Python child: calls one function for one job after another (docs/protocol.md).

    main([MODULE:FUNCTION, LEVEL])       jobs come on descriptor 3, answers go to 4
    main(["--check", MODULE:FUNCTION])   only imports it

On descriptor 5 come tokens: the numbers of the frames that may begin, eight bytes each. Whoever
reads a token first has the job: the daemon, which can read them as well, takes back what is to
wait, or to go to another process. So jobs can lie in the pipe, and none is bound to this process.

The application's own interpreter runs this file, Python 3.8 or later, by its path (child_boot.py):
there is nothing but the standard library, and nothing of workerd can be imported.
"""

from __future__ import annotations

# What `signal` makes of the same functions takes ten times as long.
import _signal  # type: ignore[import-not-found]
import contextlib
import contextvars
import faulthandler
import fcntl
import functools
import importlib
import importlib.util
import io
import json
import logging
import os
import signal
import struct
import sys
import termios
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterator

# For the type checker alone: `typing` takes more memory than any other module here.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

#: The longest traceback, note or logged text, in characters.
MAX_TEXT = 8192
#: Above the descriptors that an application is likely to name.
_HIGH = 64
_CHUNK = 1 << 16
#: Seconds for the daemon to read what a job has printed; it may be busy.
_PATIENCE = 1.0
_TOKEN = struct.Struct("=Q")
_SIGNALS = sorted(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})
_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}


class Retry(Exception):
    """Raised by a job: this attempt has failed; the next one is to come after ``delay`` seconds."""

    __module__ = "workerd"

    def __init__(self, note: object = "", *, delay: float | None = None) -> None:
        super().__init__(note)
        self.note = note
        self.delay = None if delay is None else max(0.0, float(delay))


class Reject(Exception):
    """Raised by a job: it is wrong in itself, and no attempt could help."""

    __module__ = "workerd"

    def __init__(self, reason: object = "") -> None:
        super().__init__(reason)
        self.note = reason


class Terminated(SystemExit):
    """SIGTERM came while a job ran; on its way up, the job puts its things in order."""


class Job:
    """What a function gets: one attempt at a piece of work."""

    __module__ = "workerd"

    def __init__(self, frame: dict[str, Any], body: bytes, log: logging.Logger) -> None:
        self.id: str = frame["id"]
        self.type: str | None = frame["type"]
        self.queue: str = frame["queue"]
        self.attempt: int = frame["attempt"]
        self.max_attempts: int = frame["max_attempts"]
        self.redelivered: bool = frame["redelivered"]
        self.content_type: str | None = frame["content_type"]
        self.content_encoding: str | None = frame["content_encoding"]
        self.headers: dict[str, Any] = frame["headers"]
        self.body = body
        self.log = log

    def json(self) -> Any:
        """The body, parsed. Raises ValueError when it is not JSON."""
        return json.loads(self.body)

    def __repr__(self) -> str:
        return f"<job {self.id}, type {self.type}, attempt {self.attempt}>"


class Channel:
    """The private descriptors; a forked copy of this process loses them."""

    def __init__(self, *descriptors: int) -> None:
        # Closed for what the application starts, and out of the way of what it opens.
        self._all = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _HIGH) for fd in descriptors]
        for fd in descriptors:
            os.close(fd)
        self._read, self._write, self._tokens = self._all
        self._files = [_file(fd) for fd in self._all]
        self._buffer = bytearray()
        # Re-entrant, for a signal handler may print in the middle of a print.
        self._lock = threading.RLock()
        self.ours = True
        os.register_at_fork(after_in_child=self._forked)

    def frames(self) -> Iterator[tuple[dict[str, Any], bytes]]:
        """One job after another, until the daemon closes its end."""
        with contextlib.suppress(EOFError):
            while token := os.read(self._tokens, _TOKEN.size):
                (number,) = _TOKEN.unpack(token)
                frame, body = self._next()
                while frame["frame"] != number:  # the daemon has taken that one back
                    frame, body = self._next()
                yield frame, body

    def _next(self) -> tuple[dict[str, Any], bytes]:
        """The next frame. Raises EOFError."""
        buffer = self._buffer
        while (end := buffer.find(b"\n") + 1) == 0:
            self._more()
        frame = json.loads(buffer[:end])
        end_of_body = end + frame["length"]
        while len(buffer) < end_of_body:
            self._more()
        body = bytes(buffer[end:end_of_body])
        del buffer[:end_of_body]
        return frame, body

    def _more(self) -> None:
        data = os.read(self._read, _CHUNK)
        if not data:
            raise EOFError
        self._buffer += data

    def send(self, message: dict[str, Any], payload: bytes = b"") -> None:
        """One message to the daemon, in one piece whichever thread it comes from."""
        if payload:
            message["length"] = len(payload)
        rest = memoryview(json.dumps(message).encode() + b"\n" + payload)
        with self._lock:
            while rest:
                rest = rest[os.write(self._write, rest) :]

    def output(self, stream: str, data: bytes) -> None:
        """Send what was printed. A forked copy prints it: no two processes mix messages."""
        if self.ours:
            self.send({"output": stream}, data)
        else:
            os.write(1 if stream == "stdout" else 2, data)

    def log(self, level: str, logger: str, text: str) -> None:
        """Send what was logged; a forked copy prints it."""
        if self.ours:
            self.send({"log": level, "logger": logger, "text": _cut(text)})
        else:
            os.write(2, f"{level}: {text}\n".encode("utf-8", "backslashreplace"))

    @property
    def broken(self) -> bool:
        """Whether a descriptor was closed, and perhaps opened as something else."""
        return [_file(fd) for fd in self._all] != self._files

    def _forked(self) -> None:
        self.ours = False
        self._lock = threading.RLock()  # another thread may have held it
        for fd in self._all:
            with contextlib.suppress(OSError):
                os.close(fd)


class _Raw(io.RawIOBase):
    """Standard output or standard error as messages: in order, and never another job's."""

    def __init__(self, channel: Channel, name: str, fd: int) -> None:
        self._channel = channel
        self._stream = name
        self._fd = fd
        self.name = f"<{name}>"

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd  # for what is started with it

    def write(self, data: Any) -> int:
        data = bytes(data)
        self._channel.output(self._stream, data)
        return len(data)


def _text_stream(channel: Channel, name: str, fd: int) -> io.TextIOWrapper:
    buffer = io.BufferedWriter(_Raw(channel, name, fd))
    return io.TextIOWrapper(buffer, "utf-8", "backslashreplace", line_buffering=True)


class _LogHandler(logging.Handler):
    """Sends what is logged as messages, each with its level."""

    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        level = next((name for name in _NAMES if record.levelno >= _LEVELS[name]), "debug")
        try:
            self._channel.log(level, record.name, self.format(record))
        except Exception:
            self.handleError(record)


_NAMES = ("error", "warning", "info")


class Baseline:
    """What a job may change of its process, as it was before the first job."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._folder = os.open(".", os.O_PATH | os.O_CLOEXEC)
        self._umask = os.umask(0)
        os.umask(self._umask)
        self._environ = os.environ
        self._variables = dict(os.environb)
        self._handlers = [_signal.getsignal(number) for number in _SIGNALS]
        self._mask = _signal.pthread_sigmask(signal.SIG_BLOCK, [])
        self._descriptors = {
            fd: (_file(fd), fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _HIGH)) for fd in (1, 2)
        }
        self._streams = sys.stdin, sys.stdout, sys.stderr
        self._threads = set(threading.enumerate())
        self._warned = False

    @property
    def stderr(self) -> int:
        """Standard error, wherever descriptor 2 leads."""
        return self._descriptors[2][1]

    def has_printed(self) -> bool:
        """Whether something printed past the messages waits to be read."""
        try:
            return any(_waits(copy) for _, copy in self._descriptors.values())
        except OSError:
            return False

    def await_reader(self) -> None:
        """Wait until that has been read: it is the last job's, and not the next one's."""
        until = time.monotonic() + _PATIENCE
        while self.has_printed() and time.monotonic() < until:
            time.sleep(0.0002)

    def restore(self) -> bool:
        """Put back what can be put back cheaply; returns False if this process had better end."""
        try:
            return self._restore()
        except OSError:
            return False  # a copy that it would be restored from was closed

    def _restore(self) -> bool:
        for stream in (sys.stdout, sys.stderr):
            _flush(stream)
        self._restore_streams()
        signal.setitimer(signal.ITIMER_REAL, 0)
        restored = self._restore_signals()
        for fd, (file, copy) in self._descriptors.items():
            if _file(fd) != file:
                os.dup2(copy, fd)
        os.fchdir(self._folder)
        os.umask(self._umask)
        self._restore_environment()
        self._watch_threads()
        return restored

    def _restore_streams(self) -> None:
        if (sys.stdin, sys.stdout, sys.stderr) != self._streams:
            for stream in self._streams[1:]:
                _flush(stream)
            sys.stdin, sys.stdout, sys.stderr = self._streams
        for name, fd in (("stdout", 1), ("stderr", 2)):
            if getattr(sys, name).closed:
                setattr(sys, name, _text_stream(self._channel, name, fd))
                self._streams = sys.stdin, sys.stdout, sys.stderr

    def _restore_signals(self) -> bool:
        now = [_signal.getsignal(number) for number in _SIGNALS]
        if now != self._handlers:
            for number, before, handler in zip(_SIGNALS, self._handlers, now):
                if handler != before:
                    if before is None:
                        return False  # it was set by something that is not Python
                    signal.signal(number, before)
        if _signal.pthread_sigmask(signal.SIG_BLOCK, []) != self._mask:
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        return True

    def _restore_environment(self) -> None:
        os.environ = self._environ  # noqa: B003 - the real one, if it was replaced
        # The dictionary below the mapping: comparing what it decodes takes much longer.
        if getattr(self._environ, "_data", None) == self._variables:
            return
        for name in set(os.environb) - set(self._variables):
            del os.environb[name]
        for name, value in self._variables.items():
            if os.environb.get(name) != value:
                os.environb[name] = value

    def _watch_threads(self) -> None:
        if self._warned or threading.active_count() <= len(self._threads):
            return
        left = [thread.name for thread in threading.enumerate() if thread not in self._threads]
        self._warned = True
        text = f"left running by a job: thread {', '.join(left)} (logged once)"
        self._channel.log("warning", "workerd", text)


class Child:
    """The loop over the jobs."""

    def __init__(self, channel: Channel, function: Callable[[Job], Any]) -> None:
        self._channel = channel
        self._function = function
        # Not one of the tree of loggers: no configuration of those disables it.
        self._log = logging.Logger("job")
        self._log.addHandler(_LogHandler(channel))
        self._loop: Any = None
        #: SIGTERM may raise `Terminated`: while a job runs, or none.
        self._may_end = False
        self._terminated = False
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._terminate)
            self._masks = threading.local()
            os.register_at_fork(
                before=self._hold_sigterm,
                after_in_parent=self._release_sigterm,
                after_in_child=self._be_mortal,
            )
        self._baseline = Baseline(channel)
        faulthandler.enable(self._baseline.stderr)

    def run(self) -> None:
        """Do one job after another, until no more can come."""
        try:
            self._allow_end()
            for frame, body in self._channel.frames():
                self._may_end = False
                stay = self._perform(frame, body)
                if not (stay or self._terminated):
                    break
                self._allow_end()
        except Terminated:
            self._die()
        if self._loop is not None:
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()

    def _perform(self, frame: dict[str, Any], body: bytes) -> bool:
        """Do a job and answer; returns whether this process is fit for another."""
        answer: dict[str, Any] = {"frame": frame["frame"], "outcome": "failed"}
        result = b""
        fit = True
        try:
            job = Job(frame, body, self._log)
            try:
                self._allow_end()
                # What it sets of context variables is gone after it.
                value = contextvars.copy_context().run(self._function, job)
                if hasattr(value, "__await__"):
                    value = self._await(value)
            finally:
                self._may_end = False
            if not self._channel.ours:
                self._end_copy(0)
            result = _encode(value)
            answer["outcome"] = "done"
        except Retry as retry:
            answer.update(retry_after=retry.delay, note=_text(retry.note), error=_described(retry))
        except Reject as reject:
            answer.update(outcome="rejected", note=_text(reject.note), error=_text(reject.note))
        except BaseException as error:
            if isinstance(error, Terminated):
                raise
            if not self._channel.ours:
                self._end_copy(error)
            answer["error"] = _described(error)
            # Who ends the process means it; without memory or stack anything may be half done.
            fit = isinstance(error, Exception) and not isinstance(
                error, (MemoryError, RecursionError)
            )
        if self._channel.broken:
            os.write(self._baseline.stderr, b"the job has closed the descriptors of the protocol\n")
            os._exit(70)
        fit = self._baseline.restore() and fit
        if not fit:
            answer["last"] = True
        printed = self._baseline.has_printed()
        if printed:
            answer["printed"] = True
        self._channel.send(answer, result)
        if printed:
            self._baseline.await_reader()
        return fit

    def _await(self, awaitable: Any) -> Any:
        import asyncio  # takes its time and memory: only where it is used

        async def outcome() -> Any:
            return await awaitable

        if self._loop is None:
            # One for all jobs: what they keep open, such as connections, belongs to a loop.
            self._loop = asyncio.new_event_loop()
        task = self._loop.create_task(outcome())
        try:
            return self._loop.run_until_complete(task)
        finally:
            # Nothing of this job goes on during the next.
            left = asyncio.all_tasks(self._loop)
            for each in left:
                each.cancel()
            if left:
                self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))

    def _end_copy(self, end: int | BaseException) -> NoReturn:
        """End a forked copy that came back from the function: it must never answer for the job."""
        status = end if isinstance(end, int) else 1
        if isinstance(end, SystemExit):
            status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        elif isinstance(end, BaseException):
            traceback.print_exception(type(end), end, end.__traceback__)
        for stream in (sys.stdout, sys.stderr):
            _flush(stream)
        os._exit(status & 255)

    def _allow_end(self) -> None:
        """Let SIGTERM raise `Terminated` from now on; it may have come already."""
        self._may_end = True
        if self._terminated:
            raise Terminated

    def _terminate(self, _number: int, _frame: object) -> None:
        self._terminated = True
        if self._may_end:
            raise Terminated

    # A forked copy dies of SIGTERM at once, as it would if this process did not handle it: also
    # in the moment before it waits for a lock, when no handler would run; and in its first moment.

    def _hold_sigterm(self) -> None:
        self._masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])

    def _release_sigterm(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._masks.before)

    def _be_mortal(self) -> None:
        if signal.getsignal(signal.SIGTERM) == self._terminate:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._release_sigterm()

    def _die(self) -> NoReturn:
        """End as a program ends that does not know SIGTERM."""
        for stream in (sys.stdout, sys.stderr):
            _flush(stream)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(128 + signal.SIGTERM)  # it was blocked


def _file(fd: int) -> tuple[int, int] | None:
    try:
        status = os.fstat(fd)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _waits(pipe: int) -> int:
    """How many bytes of a pipe have not been read."""
    count: int = struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, b"    "))[0]
    return count


def _flush(stream: Any) -> None:
    with contextlib.suppress(Exception):
        stream.flush()


def _encode(value: Any) -> bytes:
    """What a function has returned, as bytes. Raises TypeError and ValueError."""
    if value is None:
        return b""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    if isinstance(value, str):
        return value.encode()
    return json.dumps(value).encode()


def _described(error: BaseException) -> str:
    """The traceback of an exception, without the frames of this file."""
    try:
        place = error.__traceback__
        while place is not None and place.tb_frame.f_code.co_filename == __file__:
            place = place.tb_next
        return _cut("".join(traceback.format_exception(type(error), error, place)).rstrip())
    except BaseException as second:
        return f"{type(error).__name__}, and showing it ended in {type(second).__name__}"


def _text(value: object) -> str:
    """A note or a reason as text, whatever it is."""
    try:
        return _cut(str(value))
    except BaseException as error:
        return f"{type(value).__name__}, and showing it ended in {type(error).__name__}"


def _cut(text: str) -> str:
    """The text, without its middle when it is too long."""
    if len(text) <= MAX_TEXT:
        return text
    return f"{text[: MAX_TEXT // 4]}\n[…]\n{text[-MAX_TEXT // 2 :]}"


def _offer_names() -> None:
    """`from workerd import Retry, Reject`, unless the application has a workerd of its own."""
    spec = importlib.util.find_spec("workerd")
    places = list(spec.submodule_search_locations or ()) if spec else []
    if spec is None or spec.origin is None:
        module = types.ModuleType("workerd", "What workerd offers to a job.")
        module.__path__ = places
        sys.modules["workerd"] = module
    elif any(os.path.isfile(os.path.join(place, "handlers", "child.py")) for place in places):
        module = importlib.import_module("workerd")
    else:
        return
    module.__dict__.update(Retry=Retry, Reject=Reject, Job=Job)


def _load(name: str) -> Callable[[Job], Any]:
    """The function of this name, such as "myapp.jobs:resize"."""
    _offer_names()
    module, _, inside = name.partition(":")
    try:
        found = functools.reduce(getattr, inside.split("."), importlib.import_module(module))
    except SystemExit:
        raise ImportError(f"{module} ends the process when it is imported") from None
    if not callable(found):
        raise TypeError(f"{inside} is not a function")
    function: Callable[[Job], Any] = found
    return function


def _check(name: str) -> NoReturn:
    """Import the function, and say in the last line of standard error what is wrong with it."""
    sys.argv = [name]
    status = 0
    try:
        _load(name)
    except BaseException as error:
        sys.stderr.write("".join(traceback.format_exception_only(type(error), error)))
        status = 1
    for stream in (sys.stdout, sys.stderr):
        _flush(stream)
    os._exit(status)  # whatever the module has started


def main(arguments: list[str]) -> None:
    if arguments[0] == "--check":
        _check(arguments[1])
    name, level = arguments
    channel = Channel(3, 4, 5)
    sys.argv = [name]
    sys.stdout = sys.__stdout__ = _text_stream(channel, "stdout", 1)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = _text_stream(channel, "stderr", 2)  # type: ignore[misc]
    logging.root.addHandler(_LogHandler(channel))
    logging.root.setLevel(_LEVELS[level])
    try:
        function = _load(name)
    except BaseException as error:
        channel.send({"error": _described(error)})
        os._exit(1)
    child = Child(channel, function)
    channel.send({"ready": 1})
    child.run()
