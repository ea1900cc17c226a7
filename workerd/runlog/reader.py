"""A run log as it is read: by its own instance when that starts, and by the others of the host.

<state>/<instance>/<number> are segments of 36-byte records. A record is its kind, a channel,
the job's key, the time and a checksum; one that is torn or spoilt is skipped. The lock on the
folder is held for as long as the process lives that writes: what an instance without it has
begun and not ended is over, killed with its daemon.
"""

from __future__ import annotations

import os
import re
import struct
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from workerd.core.dedup import ALL_CLOSED, NEVER_SENT, Elsewhere
from workerd.core.keyset import KeySet
from workerd.paths import is_held
from workerd.runlog.records import (
    BACK,
    BEGIN,
    CLOSED,
    CUT_OFF,
    END,
    LOST,
    OPEN,
    OVER,
    RECALLED,
    RECORD,
    RETURNED,
    START,
    TAKE,
    WAIT,
    decode,
)

#: A verdict as it is kept: many are, of which few are ever asked for.
_SENT = struct.Struct("<iid")
_SEGMENT = re.compile("[0-9]+")


class Sent(NamedTuple):
    """A verdict: on which channel of which process it was sent, and when."""

    process: int
    channel: int
    when: float


class CutOff(NamedTuple):
    """How many attempts of a job ended with their process, if any, and when the last did."""

    number: int
    when: float


#: When jobs of a key went back (+1) and came again (-1).
Returns = list[tuple[float, int]]


class RunLogReader:
    """What the run log of an instance tells: its finished jobs, and those that it runs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._begin()

    def _begin(self) -> None:
        #: How far each segment has been read.
        self._offsets: dict[Path, int] = {}
        self._nonce = b""
        #: When the last record was written.
        self._last = 0.0
        #: Counts the processes that wrote: each numbers its channels anew.
        self._process = 0
        self._finished = KeySet(_SENT.size)
        self.returns: dict[bytes, Returns] = {}
        self.cut_off: dict[bytes, CutOff] = {}
        #: The channels that brought the running jobs.
        self._running: dict[bytes, list[int]] = {}
        #: How many of those have not begun.
        self._unbegun: Counter[bytes] = Counter()
        #: How many jobs of each key are in hand and have not started.
        self._waiting: Counter[bytes] = Counter()
        #: Channels on which nothing can have been lost: those that are open, and those that
        #: were closed in an orderly way, until another one is lost.
        self._open: set[tuple[int, int]] = set()
        self._closed: set[tuple[int, int]] = set()

    def ask(self, key: bytes, oldest: float, lost_at: float) -> Elsewhere:
        """What the instance knows of a job; a verdict from before ``oldest`` is none.

        ``lost_at`` is when we last lost a channel, which may have been a broker that forgot
        what it had read before. Both are in seconds since 1970.
        """
        running = self._running.get(key, [])
        if any((self._process, channel) not in self._open for channel in running):
            return Elsewhere.ORPHANED
        known = [Sent(*_SENT.unpack(each)) for each in self._finished.find(key)]
        verdicts = [sent for sent in known if sent.when >= oldest]
        for sent in verdicts:
            if self.is_gone(sent, lost_at):
                # Used up: another redelivery of an equal job needs a verdict of its own.
                self._finished.remove(key, _SENT.pack(*sent))
                return Elsewhere.FINISHED
        return Elsewhere.ATTACHED if running or verdicts else Elsewhere.UNKNOWN

    def finished(self) -> Iterator[tuple[bytes, Sent]]:
        """The key of every finished job, and its verdict."""
        for key, sent in self._finished:
            yield key, Sent(*_SENT.unpack(sent))

    def _lost_starts(self, key: bytes) -> int:
        return self.cut_off[key].number if key in self.cut_off else 0

    def is_gone(self, sent: Sent, lost_at: float = 0.0) -> bool:
        """Whether the channel of a verdict was lost since, and perhaps the verdict with it."""
        channel = (sent.process, sent.channel)
        if channel in self._closed:
            return sent.when < lost_at
        return channel not in self._open

    def catch_up(self) -> None:
        """Read what has been written since. Raises OSError."""
        found = segments(self._folder)
        if not set(found).issuperset(self._offsets):
            self._begin()  # one was removed, and what it held is no longer remembered
        for segment in found:
            read = self._offsets.get(segment, 0)
            data = _read(segment, read)
            self._offsets[segment] = read + len(data)
            for record in decode(data):
                self._take(*record)
        if (self._running or self._waiting or self._open) and not is_held(self._folder):
            self.end_process()

    def _take(self, kind: bytes, channel: int, key: bytes, when: float) -> None:
        place = (self._process, channel)
        self._last = when
        if kind == WAIT:
            self._waiting[key] += 1
        elif kind in (START, TAKE):
            self._end_wait(key)
            self._unbegun[key] += kind == TAKE
            self._running.setdefault(key, []).append(channel)
            if channel != NEVER_SENT:
                self._open.add(place)
        elif kind == BEGIN:
            self._unbegun[key] -= 1
        elif kind in (END, OVER, BACK):
            self._end_run(key)
            if kind == BACK:
                self.returns.setdefault(key, []).append((when, 1))
            else:
                self.cut_off.pop(key, None)
            if kind == END:
                self._finished.add(key, _SENT.pack(self._process, channel, when))
                if channel > 0:
                    self._open.add(place)
                elif channel == ALL_CLOSED:
                    self._closed.add(place)
        elif kind in (RETURNED, RECALLED):
            if kind == RETURNED:
                self._end_wait(key)
            self.returns.setdefault(key, []).append((when, 1 if kind == RETURNED else -1))
        elif kind == LOST:
            self._open.discard(place)
            self._closed.clear()
        elif kind == CLOSED:
            self._open.discard(place)
            self._closed.add(place)
        elif kind == CUT_OFF:
            self.cut_off[key] = CutOff(channel, when)
        elif kind == OPEN and key != self._nonce:
            self.end_process()
            self._nonce = key
            self._process += 1
        elif kind == OPEN:
            # In a new segment, those that are in hand follow.
            self._running.clear()
            self._unbegun.clear()
            self._waiting.clear()

    def _end_wait(self, key: bytes) -> None:
        if key in self._waiting:
            self._waiting[key] -= 1
            if not self._waiting[key]:
                del self._waiting[key]

    def _end_run(self, key: bytes) -> None:
        runs = self._running.get(key)
        if runs:
            runs.pop()
            if not runs:
                del self._running[key]

    def end_process(self) -> None:
        """The process that wrote is no more, and its jobs with it; so are its open channels."""
        for key, runs in self._running.items():
            # Once, for each of several equal jobs. Of one that has not begun nobody knows for
            # sure: a process may have come to it without the daemon's knowledge.
            begun = len(runs) > self._unbegun[key]
            self.cut_off[key] = CutOff(self._lost_starts(key) + begun, self._last)
            self._waiting[key] += len(runs)
        # What was in hand went back, and must run, whatever equal ones have been finished.
        for key, count in self._waiting.items():
            self.returns.setdefault(key, []).extend([(self._last, 1)] * count)
        self._running.clear()
        self._unbegun.clear()
        self._waiting.clear()
        self._open.clear()


def outstanding(returns: Iterable[tuple[float, int]]) -> int:
    """How many jobs went back and have not come again, by what several run logs say of them."""
    count = 0
    for _when, change in sorted(returns):
        count = max(0, count + change)
    return count


def segments(folder: Path) -> list[Path]:
    """The segments of a run log, oldest first. Raises OSError."""
    return sorted(folder / name for name in os.listdir(folder) if _SEGMENT.fullmatch(name))


def _read(segment: Path, offset: int) -> bytes:
    """What a segment has from ``offset`` on, in whole records."""
    with open(segment, "rb") as file:
        file.seek(offset)
        data = file.read()
    return data[: len(data) - len(data) % RECORD]
