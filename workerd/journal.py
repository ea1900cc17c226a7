"""What one host remembers of jobs: each instance writes a journal, the others read it.

<state>/<instance>/<number> are segments of 36-byte records, appended without fsync: they
survive the end of the process in any way, and of the host except for its last seconds. A
record is its kind, the channel, the job's key, the time and a checksum; one that is torn or
spoilt is skipped. A new segment begins whenever the memory begins a new generation, and the
segment of a forgotten generation is removed, so nothing is ever rewritten.

The lock on the folder is held for as long as the process lives. What an instance without it
has begun and not ended is over: killed with its daemon.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import struct
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from workerd.ledger import ALL_CLOSED, NEVER_SENT, Elsewhere, Memory

#: A process begins (or goes on, in a new segment). The key tells processes apart.
OPEN = b"O"
#: A run begins; its delivery came on this channel.
START = b"S"
#: A run has ended with a verdict, sent on this channel; 0: on none, for want of one.
END = b"E"
#: A run has ended, and its job goes back.
BACK = b"B"
#: A delivery goes back that never ran: nothing known of this key counts any more.
FORGET = b"F"
#: A channel was lost, and perhaps what was sent on it.
LOST = b"L"
#: A channel was closed in an orderly way: all that was sent on it has been read.
CLOSED = b"C"

_BODY = struct.Struct("<cxxxI16sd")
_SUM = struct.Struct("<I")
RECORD = _BODY.size + _SUM.size
_NO_KEY = bytes(16)

#: Seconds until a disk that refused to be written is tried again.
RETRY = 60.0

Record = tuple[bytes, int, bytes, float]


def encode(kind: bytes, channel: int, key: bytes, now: float) -> bytes:
    body = _BODY.pack(kind, channel, key, now)
    return body + _SUM.pack(zlib.crc32(body))


def decode(data: bytes) -> Iterator[Record]:
    """The records in ``data``, a multiple of RECORD bytes; those that are spoilt are skipped."""
    for offset in range(0, len(data), RECORD):
        body = data[offset : offset + _BODY.size]
        if _SUM.unpack_from(data, offset + _BODY.size)[0] == zlib.crc32(body):
            yield _BODY.unpack(body)


class HostMemory(Memory):
    """The memory of an instance, on disk, and a look into those of its siblings.

    ``on_trouble`` is told, once, when the disk cannot be written (the memory is then in this
    process alone) and, with "", when it can be again.
    """

    def __init__(
        self,
        state: Path,
        instance: str,
        remember: float,
        on_trouble: Callable[[str], None],
        size: int = 100_000,
    ) -> None:
        super().__init__(size)
        self._state = state
        self._instance = instance
        self._on_trouble = on_trouble
        self._remember = remember
        self._file = -1
        self._lock = -1
        self._retry_at = 0.0
        self._troubled = False
        self._segments: list[Path] = []
        self._process = os.urandom(16)
        #: Runs that have begun and not ended, to be carried into each new segment, and the
        #: channels that brought them; 0 for one that is lost.
        self._running: dict[bytes, list[int]] = {}
        self._siblings: dict[str, History] = {}
        self._asked = False
        self._begin_segment()

    # What the ledger tells.

    def started(self, key: bytes, channel: int) -> None:
        self._running.setdefault(key, []).append(channel)
        self._append(START, channel, key)

    def add(self, key: bytes, channel: int) -> None:
        super().add(key, channel)
        self._over(key)
        self._append(END, channel, key)

    def back(self, key: bytes) -> None:
        super().back(key)
        self._over(key)
        self._append(BACK, 0, key)

    def forget(self, key: bytes) -> None:
        super().forget(key)
        self._append(FORGET, 0, key)

    def lost(self, channel: int) -> None:
        for channels in self._running.values():
            channels[:] = [0 if each == channel else each for each in channels]
        self._append(LOST, channel, _NO_KEY)

    def closed(self, channel: int) -> None:
        self._append(CLOSED, channel, _NO_KEY)

    def age(self) -> None:
        super().age()
        self._begin_segment()
        if not self._asked:
            self._siblings.clear()  # they take memory, and outages are rare
        self._asked = False
        while len(self._segments) > self.GENERATIONS:
            with contextlib.suppress(OSError):
                self._segments.pop(0).unlink()

    def elsewhere(self, key: bytes) -> Elsewhere:
        self._asked = True
        oldest = time.time() - self._remember
        best = Elsewhere.UNKNOWN
        for sibling in self._look_around():
            answer = sibling.ask(key, oldest)
            if answer is Elsewhere.FINISHED:
                return answer
            best = max(best, answer, key=lambda each: each.value)
        return best

    def close(self) -> None:
        """Nothing more is written; the lock stays until the process ends."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    # The disk.

    def _over(self, key: bytes) -> None:
        runs = self._running.get(key)
        if runs:
            runs.pop()
            if not runs:
                del self._running[key]

    def _load(self) -> None:
        """Take the folder, and remember what earlier processes of this instance have finished.

        Raises OSError.
        """
        folder = self._state / self._instance
        folder.mkdir(mode=0o750, parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _hold(lock)
            segments = _segments(folder)
            history = History(folder)
            history.catch_up()
        except OSError:
            os.close(lock)
            raise
        self._lock = lock
        self._segments = segments
        history.end_process()
        oldest = time.time() - self._remember
        for key, verdicts in history.finished.items():
            for sent in verdicts:
                if sent.when >= oldest:
                    self._put(key, NEVER_SENT if history.is_gone(sent) else ALL_CLOSED)
        super().age()

    def _begin_segment(self) -> None:
        self.close()
        try:
            if self._lock < 0:
                self._load()
            numbers = [int(segment.name) for segment in self._segments]
            path = self._state / self._instance / f"{max(numbers, default=0) + 1:08d}"
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._file = os.open(path, flags, 0o640)
        except OSError as error:
            self._fail(error)
            return
        self._segments.append(path)
        self._append(OPEN, 0, self._process)
        for key, channels in self._running.items():
            for channel in channels:
                self._append(START, channel, key)

    def _append(self, kind: bytes, channel: int, key: bytes) -> None:
        if self._file < 0:
            if time.monotonic() < self._retry_at:
                return
            self._begin_segment()
            if self._file < 0:
                return
        record = encode(kind, channel, key, time.time())
        try:
            if os.write(self._file, record) != RECORD:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._fail(error)
            return
        if self._troubled:
            self._troubled = False
            self._on_trouble("")

    def _fail(self, error: OSError) -> None:
        # A record may be torn; whatever comes later goes into a segment of its own.
        self.close()
        self._retry_at = time.monotonic() + RETRY
        if not self._troubled:
            self._troubled = True
            self._on_trouble(str(error))

    def _look_around(self) -> Iterable[History]:
        """The other instances that have ever run on this host."""
        with contextlib.suppress(OSError):
            for name in os.listdir(self._state):
                if name != self._instance and name not in self._siblings:
                    self._siblings[name] = History(self._state / name)
        return self._siblings.values()


class _Sent(NamedTuple):
    """A verdict: on which channel of which process it was sent, and when."""

    process: int
    channel: int
    when: float


class History:
    """What the journal of an instance tells: its finished jobs, and those that it runs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._begin()

    def _begin(self) -> None:
        #: How far each segment has been read.
        self._offsets: dict[Path, int] = {}
        self._nonce = b""
        #: Counts the processes that wrote: each numbers its channels anew.
        self._process = 0
        self.finished: dict[bytes, list[_Sent]] = {}
        #: The channels that brought the running jobs.
        self._running: dict[bytes, list[int]] = {}
        #: Channels on which nothing can have been lost: those that are open, and those that
        #: were closed in an orderly way, until another one is lost.
        self._open: set[tuple[int, int]] = set()
        self._closed: set[tuple[int, int]] = set()

    def ask(self, key: bytes, oldest: float) -> Elsewhere:
        """What it knows of a job; a verdict from before ``oldest`` (seconds since 1970) is none."""
        try:
            self.catch_up()
            if key not in self.finished and key not in self._running:
                return Elsewhere.UNKNOWN
            alive = _is_held(self._folder)
        except OSError:
            return Elsewhere.UNKNOWN
        if not alive:
            self.end_process()
        verdicts = [sent for sent in self.finished.get(key, ()) if sent.when >= oldest]
        for sent in verdicts:
            if self.is_gone(sent):
                # Used up: another redelivery of an equal job needs a verdict of its own.
                self.finished[key].remove(sent)
                return Elsewhere.FINISHED
        running = self._running.get(key, [])
        if any((self._process, channel) not in self._open for channel in running):
            return Elsewhere.ORPHANED
        return Elsewhere.ATTACHED if running or verdicts else Elsewhere.UNKNOWN

    def is_gone(self, sent: _Sent) -> bool:
        """Whether the channel of a verdict was lost since, and perhaps the verdict with it."""
        channel = (sent.process, sent.channel)
        return channel not in self._open and channel not in self._closed

    def catch_up(self) -> None:
        """Read what has been written since. Raises OSError."""
        segments = _segments(self._folder)
        if not set(segments).issuperset(self._offsets):
            self._begin()  # one was removed, and what it held is no longer remembered
        for segment in segments:
            read = self._offsets.get(segment, 0)
            data = _read(segment, read)
            self._offsets[segment] = read + len(data)
            for record in decode(data):
                self._take(*record)

    def _take(self, kind: bytes, channel: int, key: bytes, when: float) -> None:
        place = (self._process, channel)
        if kind == OPEN:
            if key != self._nonce:
                self.end_process()
                self._nonce = key
                self._process += 1
            self._running.clear()  # in a new segment, those that go on follow
        elif kind == START:
            self._running.setdefault(key, []).append(channel)
            if channel != NEVER_SENT:
                self._open.add(place)
        elif kind == LOST:
            self._open.discard(place)
            self._closed.clear()
        elif kind == CLOSED:
            self._open.discard(place)
            self._closed.add(place)
        elif kind == FORGET:
            self.finished.pop(key, None)
        else:
            runs = self._running.get(key)
            if runs:
                runs.pop()
                if not runs:
                    del self._running[key]
            if kind == END:
                self.finished.setdefault(key, []).append(_Sent(self._process, channel, when))
                if channel != NEVER_SENT:
                    self._open.add(place)
            else:
                self.finished.pop(key, None)

    def end_process(self) -> None:
        """The process that wrote is no more, and its jobs with it; so are its open channels.

        What it was running comes again: an equal job's verdict must not settle that.
        """
        for key in self._running:
            self.finished.pop(key, None)
        self._running.clear()
        self._open.clear()


def _segments(folder: Path) -> list[Path]:
    return sorted(Path(entry.path) for entry in os.scandir(folder) if entry.name.isdigit())


def _read(segment: Path, offset: int) -> bytes:
    """What a segment has from ``offset`` on, in whole records."""
    with open(segment, "rb") as file:
        file.seek(offset)
        data = file.read()
    return data[: len(data) - len(data) % RECORD]


def _hold(lock: int) -> None:
    """Take the lock for good. A sibling that looks whether it is held has it for an instant."""
    for attempt in itertools.count():
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if attempt == 50:
                raise
            time.sleep(0.01)


def _is_held(folder: Path) -> bool:
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False
