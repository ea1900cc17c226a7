"""What an instance has in hand: which deliveries wait, which runs go on, each with its number."""

from __future__ import annotations

import time
from collections.abc import Iterator

from workerd.core.dedup import NEVER_SENT
from workerd.runlog.records import START, TAKE, WAIT, encode

#: As many numbers as fit a record; that they begin anew does no harm.
_NUMBERS = 0xFFFF


class InHand:
    """The deliveries of one process that have not come to their end.

    Numbers tell apart equal jobs: those that end first are those that came first.
    """

    def __init__(self) -> None:
        #: The number of the latest delivery.
        self._latest = 0
        #: By key, the channels that brought what runs, NEVER_SENT for one that is lost; with
        #: the numbers.
        self._running: dict[bytes, list[tuple[int, int]]] = {}
        #: How many of those have not begun.
        self._unbegun: dict[bytes, int] = {}
        #: The numbers of what has not started.
        self._waiting: dict[bytes, list[int]] = {}

    def wait(self, key: bytes) -> int:
        """A delivery waits; returns its number."""
        number = self._next()
        self._waiting.setdefault(key, []).append(number)
        return number

    def start(self, key: bytes, channel: int, begun: bool) -> int:
        """A run starts, of a delivery that waited, or of one that comes now; returns its number."""
        number = self.end_wait(key) or self._next()
        self._running.setdefault(key, []).append((channel, number))
        if not begun:
            self._unbegun[key] = self._unbegun.get(key, 0) + 1
        return number

    def begin(self, key: bytes) -> None:
        """One that had not begun begins."""
        self._unbegun[key] -= 1
        if not self._unbegun[key]:
            del self._unbegun[key]

    def lost(self, channel: int) -> None:
        """A channel is gone: what it brought has nothing to settle there."""
        for runs in self._running.values():
            runs[:] = [(NEVER_SENT if each == channel else each, number) for each, number in runs]

    def end_wait(self, key: bytes) -> int:
        """One waits no longer: its number, 0 when none did."""
        numbers = self._waiting.get(key)
        if not numbers:
            return 0
        number = numbers.pop(0)
        if not numbers:
            del self._waiting[key]
        return number

    def end_run(self, key: bytes) -> int:
        """One runs no longer: its number, 0 when none did."""
        runs = self._running.get(key)
        if not runs:
            return 0
        _, number = runs.pop()
        if not runs:
            del self._running[key]
        return number

    def runs(self) -> Iterator[bytes]:
        """The records of what runs."""
        now = time.time()
        for key, runs in self._running.items():
            unbegun = self._unbegun.get(key, 0)
            for place, (channel, number) in enumerate(runs):
                yield encode(TAKE if place < unbegun else START, channel, key, now, number)

    def waits(self) -> Iterator[bytes]:
        """The records of what waits."""
        now = time.time()
        for key, numbers in self._waiting.items():
            for number in numbers:
                yield encode(WAIT, NEVER_SENT, key, now, number)

    def _next(self) -> int:
        self._latest = self._latest % _NUMBERS + 1
        return self._latest
