"""A run log as it is read: by its own instance when that starts, and by the others of the host.

<state>/<instance>/<number> are segments of 36-byte records. A record is its kind, a channel,
the job's key, the time and a checksum; one that is torn or spoilt is skipped. The lock on the
folder is held for as long as the process lives that writes: what an instance without it has
begun and not ended is over, killed with its daemon.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections import Counter
from collections.abc import Container, Iterable, Iterator
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
    DROPPED,
    END,
    LOST,
    OPEN,
    OVER,
    RECALLED,
    RECORD,
    RETURNED,
    START,
    TAKE,
    VERSION,
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


class Return(NamedTuple):
    """A job went back, or (``claimed``) came again: ``process`` had it, under this number.

    The number 0 is that of versions without numbers: such a claim is of any one.
    """

    when: float
    process: int
    serial: int
    claimed: bool = False


Returns = list[Return]


class RunLogReader:
    """What the run log of an instance tells: its finished jobs, and those that it runs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._begin()

    def _begin(self) -> None:
        #: How far each segment has been read.
        self._offsets: dict[Path, int] = {}
        #: When the first record of each was written.
        self._since: dict[Path, float] = {}
        #: Segments that this version does not understand.
        self._opaque: set[Path] = set()
        self._nonce = b""
        #: When the last record was written.
        self._last = 0.0
        #: Counts the processes that wrote: each numbers its channels anew.
        self._process = 0
        self._finished: dict[Path, KeySet] = {}
        self.returns: dict[bytes, Returns] = {}
        self.cut_off: dict[bytes, CutOff] = {}
        #: The channels that brought the running jobs, and the numbers of those deliveries.
        self._running: dict[bytes, list[tuple[int, int]]] = {}
        #: How many of those have not begun.
        self._unbegun: Counter[bytes] = Counter()
        #: The numbers of what is in hand and has not started.
        self._waiting: dict[bytes, list[int]] = {}
        #: Channels on which nothing can have been lost: those that are open, and those that
        #: were closed in an orderly way, until another one is lost.
        self._open: set[tuple[int, int]] = set()
        self._closed: set[tuple[int, int]] = set()

    def ask(
        self, key: bytes, oldest: float, lost_at: float, claims: Container[tuple[int, int]]
    ) -> Elsewhere:
        """What the instance knows of a job; a verdict from before ``oldest`` is none.

        ``lost_at`` is when we last lost a channel, which may have been a broker that forgot
        what it had read before. Both are in seconds since 1970. Its runs that are among the
        ``claims`` belong to another redelivery.
        """
        runs = self._running.get(key, ())
        running = [channel for channel, serial in runs if (self.process, serial) not in claims]
        if any((self._process, channel) not in self._open for channel in running):
            return Elsewhere.ORPHANED
        if running:
            return Elsewhere.ATTACHED
        verdicts = False
        for finished in self._finished.values():
            for packed in finished.find(key):
                sent = Sent(*_SENT.unpack(packed))
                if sent.when >= oldest and self.is_gone(sent, lost_at):
                    # Used up: another redelivery of an equal job needs a verdict of its own.
                    finished.remove(key, packed)
                    return Elsewhere.FINISHED
                verdicts |= sent.when >= oldest
        if self._opaque:
            return Elsewhere.MAY_RUN
        if verdicts:
            return Elsewhere.ATTACHED
        return Elsewhere.WAITING if key in self._waiting else Elsewhere.UNKNOWN

    def in_hand(self, key: bytes, begun: bool) -> Iterator[tuple[int, int]]:
        """What it has in hand of a job: what waits, or what has ``begun``; as in a `Return`."""
        waiting = self._waiting.get(key, ())
        for serial in [s for _, s in self._running.get(key, ())] if begun else waiting:
            yield self.process, serial

    def finished(self) -> Iterator[tuple[bytes, Sent]]:
        """The key of every finished job, and its verdict."""
        for finished in self._finished.values():
            for key, sent in finished:
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
        removed = set(self._offsets) - set(found)
        if removed and not self._goes_on(found):
            self._begin()  # another process writes, and has repeated what holds of all before
        else:
            self._forget(removed)
        for segment in found:
            self._catch_up(segment)
        alive = self._running or self._waiting or self._open or self._opaque
        if alive and not is_held(self._folder):
            self.end_process()

    def _catch_up(self, segment: Path) -> None:
        read = self._offsets.get(segment, 0)
        data = _read(segment, read)
        self._offsets[segment] = read + len(data)
        records = decode(data)
        if data and not read:
            first = next(decode(data[:RECORD]), None)
            if first is None or first[0] != OPEN:
                self._opaque.add(segment)
        finished = self._finished.setdefault(segment, KeySet(_SENT.size))
        for kind, version, serial, channel, key, when in records:
            if version > VERSION:
                self._opaque.add(segment)
                continue
            self._since.setdefault(segment, when)
            # A redelivery that was settled again ends no run.
            ends = serial or not version
            self._take(kind, channel, key, when, serial, bool(ends))
            if kind == END:
                finished.add(key, _SENT.pack(self._process, channel, when))

    def _goes_on(self, found: list[Path]) -> bool:
        """Whether all that is there was written by the process that has been read."""
        for segment in found:
            first = next(decode(_read(segment, 0, RECORD)), None)
            if first is None or first[0] != OPEN or first[4] != self._nonce:
                return False
        return bool(found)

    def _forget(self, removed: set[Path]) -> None:
        """What these segments held is no longer remembered."""
        for each in removed:
            for kept in (self._offsets, self._since, self._finished):
                kept.pop(each, None)
            self._opaque.discard(each)
        if removed:
            oldest = min(self._since.values(), default=math.inf)
            self.returns = {k: each for k, each in self.returns.items() if each[-1].when >= oldest}

    def _take(
        self, kind: bytes, channel: int, key: bytes, when: float, serial: int, ends: bool
    ) -> None:
        place = (self._process, channel)
        self._last = when
        if kind == WAIT:
            self._waiting.setdefault(key, []).append(serial)
        elif kind in (START, TAKE):
            self._end_wait(key, serial)
            self._unbegun[key] += kind == TAKE
            self._running.setdefault(key, []).append((channel, serial))
            if channel != NEVER_SENT:
                self._open.add(place)
        elif kind == BEGIN:
            self._unbegun[key] -= 1
        elif kind in (END, OVER, BACK):
            if ends:
                self._end_run(key, serial)
            if kind == BACK:
                self.returns.setdefault(key, []).append(Return(when, self.process, serial))
            else:
                self.cut_off.pop(key, None)
            if kind == END:
                if channel > 0:
                    self._open.add(place)
                elif channel == ALL_CLOSED:
                    self._closed.add(place)
        elif kind == DROPPED:
            self._end_wait(key, serial)
        elif kind == RETURNED:
            if channel == NEVER_SENT:
                self._end_wait(key, serial)
            back = Return(when, channel or self.process, serial)
            self.returns.setdefault(key, []).append(back)
        elif kind == RECALLED:
            self.returns.setdefault(key, []).append(Return(when, channel, serial, claimed=True))
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

    @property
    def process(self) -> int:
        """By what claims know the process that wrote last."""
        return process_of(self._nonce)

    def _end_wait(self, key: bytes, serial: int) -> None:
        waiting = self._waiting.get(key)
        if waiting:
            waiting.pop(waiting.index(serial) if serial in waiting else 0)
            if not waiting:
                del self._waiting[key]

    def _end_run(self, key: bytes, serial: int) -> None:
        runs = self._running.get(key)
        if runs:
            numbers = [each for _, each in runs]
            runs.pop(numbers.index(serial) if serial in numbers else -1)
            if not runs:
                del self._running[key]

    def end_process(self) -> None:
        """The process that wrote is no more, and its jobs with it; so are its open channels."""
        for key, runs in self._running.items():
            # Once, for each of several equal jobs. Of one that has not begun nobody knows for
            # sure: a process may have come to it without the daemon's knowledge.
            begun = len(runs) > self._unbegun[key]
            self.cut_off[key] = CutOff(self._lost_starts(key) + begun, self._last)
            self._waiting.setdefault(key, []).extend(serial for _, serial in runs)
        # What was in hand went back, and must run, whatever equal ones have been finished.
        for key, serials in self._waiting.items():
            back = [Return(self._last, self.process, serial) for serial in serials]
            self.returns.setdefault(key, []).extend(back)
        self._running.clear()
        self._unbegun.clear()
        self._waiting.clear()
        self._open.clear()
        self._opaque.clear()


def outstanding(returns: Iterable[Return]) -> list[Return]:
    """The jobs that went back and have not come again, by what several run logs say of them."""
    known = sorted(returns)
    claims = claimed(known)
    left: list[Return] = []
    for each in known:
        if each.claimed:
            if not each.serial and left:
                left.pop(0)
        elif each.serial and claims[each.process, each.serial]:
            claims[each.process, each.serial] -= 1
        elif not each.serial or each not in left:  # told by its process, and again by the next
            left.append(each)
    return left


def claimed(returns: Iterable[Return]) -> Counter[tuple[int, int]]:
    """The deliveries, by process and number, for which a redelivery was taken."""
    return Counter((each.process, each.serial) for each in returns if each.claimed)


def process_of(nonce: bytes) -> int:
    """By what claims know a process; never 0."""
    return int.from_bytes(nonce[:4], "little", signed=True) or 1


def segments(folder: Path) -> list[Path]:
    """The segments of a run log, oldest first. Raises OSError."""
    return sorted(folder / name for name in os.listdir(folder) if _SEGMENT.fullmatch(name))


def _read(segment: Path, offset: int, size: int = -1) -> bytes:
    """What a segment has from ``offset`` on, in whole records."""
    with open(segment, "rb") as file:
        file.seek(offset)
        data = file.read(size)
    return data[: len(data) - len(data) % RECORD]
