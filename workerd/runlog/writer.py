"""The run log of an instance: what is known of its jobs, written to disk; others read it.

Records are appended without fsync: they survive the end of the process in any way, and the
end of the host except for its last seconds. A new segment begins whenever `Dedup` begins a new
generation, and the segment of a forgotten generation is removed, so nothing is ever rewritten
while jobs run. What a record says is in `records`, what follows from it in `reader`.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from workerd.core.dedup import ALL_CLOSED, GONE, NEVER_SENT, Dedup, Elsewhere
from workerd.runlog.in_hand import InHand
from workerd.runlog.lock import hold
from workerd.runlog.reader import (
    CutOff,
    Return,
    Returns,
    RunLogReader,
    claimed,
    outstanding,
    process_of,
    segments,
)
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
    WAIT,
    encode,
)

_NO_KEY = bytes(16)

#: Seconds for which it is remembered how often a job ended with its daemon: longer than a job
#: takes that ends so again and again.
CUT_OFF_KEPT = 7 * 86_400.0
#: Seconds until a disk that refused to be written is tried again.
RETRY = 5.0
#: Records that wait for such a disk at most; beyond that, the oldest half is given up.
MOST_PENDING = 100_000


class RunLog(Dedup):
    """The run log of an instance, and a look into those of the other instances of the host.

    ``on_failure`` is called once when the disk cannot be written, with the reason (what is known
    is then in this process alone), and with "" when the disk can be written again. ``remember``
    is in seconds, ``lock`` is what `hold` has returned, where that was called before. ``soon``
    has a function called before the loop does anything else: then records are written together,
    but before a job begins. ``later`` has `retry` called after so many seconds.
    """

    def __init__(
        self,
        state: Path,
        instance: str,
        remember: float,
        on_failure: Callable[[str], None],
        size: int = 100_000,
        lock: int = -1,
        soon: Callable[[Callable[[], None]], object] | None = None,
        later: Callable[[float, Callable[[], None]], object] | None = None,
    ) -> None:
        super().__init__(size)
        self.remember = remember
        self._state = state
        self._folder = state / instance
        self._on_failure = on_failure
        self._file = -1
        self._soon = soon
        self._later = later
        #: Whether `retry` will be called.
        self._retrying = False
        #: The records that are not written yet.
        self._pending: list[bytes] = []
        #: The lock, once it is ours; and the same, once all has been read and we may write.
        self._held = lock
        self._lock = -1
        self._segments: list[Path] = []
        self._nonce = os.urandom(16)
        self._process = process_of(self._nonce)
        self._in_hand = InHand()
        self._returns: dict[bytes, Returns] = {}
        #: The attempts that were cut off by the end of an earlier process.
        self._cut_off: dict[bytes, CutOff] = {}
        #: When a channel was last lost, in seconds since 1970.
        self._lost_at = 0.0
        #: The other instances that have ever run on this host, by name.
        self._siblings: dict[str, RunLogReader] = {}
        #: Those among them that could be read at the last look.
        self._readable: list[RunLogReader] = []
        self._asked = False
        self._open()

    # What the ledger tells.

    def waits(self, key: bytes) -> None:
        self._append(WAIT, NEVER_SENT, key, self._in_hand.wait(key))

    def dropped(self, key: bytes) -> None:
        self._append(DROPPED, NEVER_SENT, key, self._in_hand.end_wait(key))

    def started(self, key: bytes, channel: int, begun: bool = True) -> None:
        serial = self._in_hand.start(key, channel, begun)
        self._append(START if begun else TAKE, channel, key, serial)
        if begun:
            self.flush()

    def begun(self, key: bytes) -> None:
        self._in_hand.begin(key)
        self._append(BEGIN, NEVER_SENT, key)

    def settled(self, key: bytes, channel: int, ran: bool = True) -> None:
        super().settled(key, channel)
        serial = self._in_hand.end_run(key) if ran else 0
        self._cut_off.pop(key, None)
        self._append(END, channel, key, serial)

    def forgotten(self, key: bytes) -> None:
        self._cut_off.pop(key, None)
        self._append(OVER, NEVER_SENT, key, self._in_hand.end_run(key))

    def returned(self, key: bytes, ran: bool) -> None:
        serial = (self._in_hand.end_run if ran else self._in_hand.end_wait)(key)
        back = Return(time.time(), self._process, serial)
        self._returns.setdefault(key, []).append(back)
        self._append(BACK if ran else RETURNED, NEVER_SENT, key, serial)

    def spent(self, key: bytes) -> None:
        before = self._cut_off[key].number if key in self._cut_off else 0
        self._cut_off[key] = CutOff(before + 1, time.time())
        self._append(CUT_OFF, before + 1, key, 0)

    def lost(self, channel: int) -> None:
        self._lost_at = time.time()
        self._in_hand.lost(channel)
        self._append(LOST, channel, _NO_KEY)

    def closed(self, channel: int) -> None:
        self._append(CLOSED, channel, _NO_KEY)

    def age(self) -> None:
        super().age()
        oldest = time.time() - self.remember
        self._returns = {k: each for k, each in self._returns.items() if each[-1].when >= oldest}
        oldest = time.time() - CUT_OFF_KEPT
        self._cut_off = {k: each for k, each in self._cut_off.items() if each.when >= oldest}
        if not self.failure:
            self._begin_segment()
        if not self._asked:
            self._readable.clear()
            self._siblings.clear()  # they take memory, and outages are rare
        self._asked = False
        while len(self._segments) > self.GENERATIONS:
            with contextlib.suppress(OSError):
                self._segments.pop(0).unlink()

    # What the ledger asks. The answers are for redeliveries alone, which are rare.

    def look(self) -> None:
        self._asked = True
        names: list[str] = []
        with contextlib.suppress(OSError):
            names = os.listdir(self._state)
        self._readable.clear()
        for name in names:
            folder = self._state / name
            if folder != self._folder:
                sibling = self._siblings.setdefault(name, RunLogReader(folder))
                with contextlib.suppress(OSError):
                    sibling.catch_up()
                    self._readable.append(sibling)

    def recall(self, key: bytes, begun: bool = False) -> bool:
        known = outstanding(self._all_returns(key))
        back = [(each.process, each.serial) for each in known]
        back = back or self._elsewhere_in_hand(key, begun=False)
        if begun and not back:
            back = self._elsewhere_in_hand(key, begun=True)
        if not back:
            return False
        process, serial = back[0]
        claim = Return(time.time(), process, serial, claimed=True)
        self._returns.setdefault(key, []).append(claim)
        self._append(RECALLED, process, key, serial)
        return True

    def runs_elsewhere(self, key: bytes) -> bool:
        return bool(self._elsewhere_in_hand(key, begun=True))

    def _elsewhere_in_hand(self, key: bytes, begun: bool) -> list[tuple[int, int]]:
        """What others have in hand of a job, and no redelivery was taken for."""
        claims = claimed(self._all_returns(key))
        known = [each.in_hand(key, begun) for each in self._readable]
        return [each for each in itertools.chain(*known) if not claims[each]]

    def _all_returns(self, key: bytes) -> Iterable[Return]:
        known = [each.returns.get(key, ()) for each in self._readable]
        return itertools.chain(self._returns.get(key, ()), *known)

    def elsewhere(self, key: bytes) -> Elsewhere:
        oldest = time.time() - self.remember
        claims = claimed(self._all_returns(key))
        best = Elsewhere.UNKNOWN
        for sibling in self._readable:
            answer = sibling.ask(key, oldest, self._lost_at, claims)
            if answer is Elsewhere.FINISHED:
                return answer
            best = max(best, answer, key=lambda each: each.value)
        return best

    def cut_off(self, key: bytes) -> int | None:
        known = [each.cut_off for each in self._readable] + [self._cut_off]
        numbers = [each[key].number for each in known if key in each]
        return sum(numbers) if numbers else None

    # The disk.

    def retry(self) -> None:
        """Try a disk that could not be written; what was not written is written then."""
        self._retrying = False
        if self._lock < 0:
            self._open()
        elif self._file < 0:
            self._begin_segment()

    def _open(self) -> None:
        """Remember what earlier processes of this instance knew, and begin to write."""
        past = RunLogReader(self._folder)
        try:
            if self._held < 0:
                # Without patience: this may be the event loop.
                self._held = hold(self._folder, 0.0)
            self._segments = segments(self._folder)
            past.catch_up()
        except OSError as error:
            self._fail(error)
            return
        self._lock = self._held
        past.end_process()
        # Before what has happened since, should this not be the start.
        self._pending[:0] = self._take_over(past)
        self._begin_segment()
        if self._file >= 0:
            # The new segment says all that the old ones said.
            for segment in self._segments[:-1]:
                with contextlib.suppress(OSError):
                    segment.unlink()
            del self._segments[:-1]

    def _take_over(self, past: RunLogReader) -> Iterable[bytes]:
        """Remember what an earlier run log tells; returns the records for that."""
        oldest = time.time() - self.remember
        for key, sent in past.finished():
            if sent.when >= oldest:
                channel = GONE if past.is_gone(sent) else ALL_CLOSED
                self._put(key, channel)
                yield encode(END, channel, key, sent.when)
        for key, returns in past.returns.items():
            if returns[-1].when >= oldest:
                self._returns.setdefault(key, []).extend(returns)
                for when, process, serial, is_claim in returns:
                    yield encode(RECALLED if is_claim else RETURNED, process, key, when, serial)
        self._cut_off = past.cut_off | self._cut_off  # written into each new segment

    def _begin_segment(self) -> None:
        self.close()
        if self._lock < 0:
            return  # somebody else's run log, or none
        numbers = [int(segment.name) for segment in self._segments]
        path = self._folder / f"{max(numbers, default=0) + 1:08d}"
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            self._file = os.open(path, flags, 0o640)
        except OSError as error:
            self._fail(error)
            return
        self._segments.append(path)
        opening = list(self._opening())
        # Of a time when the disk could not be written: what follows supersedes what they say is
        # in hand, and nothing before them is.
        missed = [opening[0], *self._pending] if self._pending else []
        written = self._write([*missed, *opening])
        del self._pending[: max(0, written - 1)]
        if self._file >= 0:
            self._recovered()
        elif not written:
            # Not one more file at every attempt.
            self._segments.remove(path)
            path.unlink()

    def _opening(self) -> Iterator[bytes]:
        """The records with which a new segment begins: all that a reader must not forget."""
        now = time.time()
        yield encode(OPEN, NEVER_SENT, self._nonce, now)
        yield from self._in_hand.runs()
        for key, cut_off in self._cut_off.items():
            yield encode(CUT_OFF, cut_off.number, key, cut_off.when)
        yield from self._in_hand.waits()

    def _append(self, kind: bytes, channel: int, key: bytes, serial: int = 0) -> None:
        if self._file < 0:
            self._keep_for_later(kind, channel, key, serial)
            return
        if not self._pending and self._soon is not None:
            self._soon(self.flush)
        self._pending.append(encode(kind, channel, key, time.time(), serial))
        if self._soon is None:
            self.flush()

    def _keep_for_later(self, kind: bytes, channel: int, key: bytes, serial: int) -> None:
        # A new segment begins with all that is in hand.
        if kind not in (START, TAKE, BEGIN, WAIT):
            self._pending.append(encode(kind, channel, key, time.time(), serial))
            if len(self._pending) > MOST_PENDING:
                del self._pending[: MOST_PENDING // 2]

    def flush(self) -> None:
        """Write what is not written yet."""
        if self._pending and self._file >= 0:
            del self._pending[: self._write(self._pending)]

    def _write(self, records: list[bytes]) -> int:
        """Write records; returns how many have been written: not all, when the disk fails."""
        data = b"".join(records)
        written = 0
        try:
            written = os.write(self._file, data)
            if written < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._fail(error)
        # None is written twice: an equal job would be settled by the second.
        return written // RECORD

    def close(self) -> None:
        """Nothing more is written; the lock stays until the process ends."""
        self.flush()
        self._drop_file()

    def _drop_file(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _fail(self, error: OSError) -> None:
        # A record may be torn; whatever comes later goes into a segment of its own.
        self._drop_file()
        before, self.failure = self.failure, str(error)
        if not before:
            self._on_failure(self.failure)
        if self._later and not self._retrying:
            # By time: on an idle host nothing else would come, and others wait for our verdicts.
            self._retrying = True
            self._later(RETRY, self.retry)

    def _recovered(self) -> None:
        if self.failure:
            self.failure = ""
            self._on_failure("")
