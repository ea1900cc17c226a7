"""Slots: which of the delivered jobs may start, which wait in line, which must run alone. Pure.

Each queue that is consumed has so many slots; a job has one until it has its verdict. Those that
are *ahead* are with their handler already, and have none until they begin. *Suspects* may have
brought the daemon down: they stand in a line of their own, before all others.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from workerd.core.job import Delivery, Job, Run
from workerd.core.states import DISPATCHED, READY


@dataclass(slots=True)
class _Line:
    """The jobs of one queue: those that wait, and how many are with their handlers."""

    waiting: deque[Delivery] = field(default_factory=deque)
    #: With a slot.
    busy: int = 0
    #: Without one.
    dispatched: int = 0


class Slots:
    """Hands out the slots: a job is lined up, started, and released once it has its verdict."""

    def __init__(self, concurrency: Mapping[str, int], capacity: Callable[[Job], int]) -> None:
        """``capacity`` says how many jobs the handler of this one could have, slots or not."""
        self._capacity = capacity
        #: Nothing starts any more.
        self.draining = False
        #: Queues of which nothing may start at present.
        self.paused: set[str] = set()
        #: Whether a job may start only while no other runs.
        self.one_at_a_time = False
        self._lines: dict[str, _Line] = {}
        self._waiting_isolated: deque[Delivery] = deque()
        #: How many jobs of each type are with their handler, whether they have begun or not.
        self._handed_out: Counter[str | None] = Counter()
        #: Those with a slot whose handler has not ended, and the one that must be alone there.
        self._active: set[Run] = set()
        self._isolated: Run | None = None
        self.configure(concurrency)

    def configure(self, concurrency: Mapping[str, int]) -> None:
        """The slots of each queue that is consumed. Jobs that run now go on, whatever it says."""
        self.concurrency = dict(concurrency)
        for queue in concurrency:
            self._lines.setdefault(queue, _Line())

    def line_up(self, delivery: Delivery, suspect: bool) -> None:
        """Let it wait for its turn."""
        line = self._waiting_isolated if suspect else self._lines[delivery.job.queue].waiting
        # Delayed jobs have waited before, and come first.
        place = sum(each.delayed for each in line) if delivery.delayed else len(line)
        line.insert(place, delivery)

    def take_out(self, channel: int) -> list[Delivery]:
        """Nothing that came on this channel waits any longer; returns what did."""
        out = []
        for waiting in self._all_waiting():
            gone = [delivery for delivery in waiting if delivery.channel == channel]
            for delivery in gone:
                waiting.remove(delivery)
            out += gone
        return out

    @property
    def in_line(self) -> Iterator[Delivery]:
        """Everything that waits."""
        return itertools.chain.from_iterable(self._all_waiting())

    def _all_waiting(self) -> list[deque[Delivery]]:
        return [self._waiting_isolated, *(line.waiting for line in self._lines.values())]

    def next(self) -> Run | None:
        """A job that may start now, started; None when there is none."""
        if self._is_closed():
            return None
        suspect = self._suspect()
        if suspect:
            if self._active:
                return None
            self._waiting_isolated.remove(suspect)
            self._isolated = self._start(suspect)
            return self._isolated
        for queue, line in self._lines.items():
            if line.waiting and self._is_open(queue):
                if self._has_slot(queue):
                    return self._start(line.waiting.popleft())
                job = line.waiting[0].job
                if self._handed_out[job.type] < self._capacity(job):
                    return self._start(line.waiting.popleft(), dispatched=True)
        return None

    def may_begin(self, run: Run, behind: str | None = None) -> bool:
        """Whether a job that is with its handler may begin now.

        Or, ``behind`` one of this queue in the same process, once that one has ended.
        """
        if run.withdrawn:
            return False
        if not run.dispatched:
            return True
        if self._is_closed() or self._suspect() or not self._is_open(run.job.queue):
            return False
        return self._has_slot(run.job.queue) if behind is None else behind == run.job.queue

    def _is_closed(self) -> bool:
        """Whether nothing at all may start."""
        isolated = self._isolated is not None or (self.one_at_a_time and bool(self._active))
        return self.draining or isolated

    def _suspect(self) -> Delivery | None:
        """The next job that must run alone."""
        if not self._waiting_isolated:
            return None
        return next(
            (each for each in self._waiting_isolated if self._is_open(each.job.queue)), None
        )

    def _is_open(self, queue: str) -> bool:
        return queue in self.concurrency and queue not in self.paused

    def _has_slot(self, queue: str) -> bool:
        return self._lines[queue].busy < self.concurrency[queue]

    def _start(self, delivery: Delivery, dispatched: bool = False) -> Run:
        run = Run(delivery.job, delivery, DISPATCHED if dispatched else READY)
        line = self._lines[run.job.queue]
        self._handed_out[run.job.type] += 1
        if dispatched:
            line.dispatched += 1
        else:
            line.busy += 1
            self._active.add(run)
        return run

    def begins(self, run: Run) -> None:
        """One that was ahead begins: from now on it has a slot."""
        line = self._lines[run.job.queue]
        line.dispatched -= 1
        line.busy += 1
        self._active.add(run)

    def ended(self, run: Run) -> None:
        """Its handler has ended. It keeps its slot until its verdict is carried out."""
        self._active.discard(run)
        if self._isolated is run:
            self._isolated = None

    def released(self, run: Run) -> None:
        """It has its verdict, and its slot is free."""
        self._lines[run.job.queue].busy -= 1
        self._handed_out[run.job.type] -= 1

    def is_isolated(self, run: Run) -> bool:
        """Whether nothing starts until this one has ended."""
        return run is self._isolated

    @property
    def has_free_slot(self) -> bool:
        """Whether a job that is ahead could have a slot."""
        return any(
            line.dispatched and self._is_open(queue) and self._has_slot(queue)
            for queue, line in self._lines.items()
        )

    @property
    def in_use(self) -> int:
        """How many jobs have a slot."""
        return sum(line.busy for line in self._lines.values())

    def busy(self, queue: str) -> int:
        """How many jobs of a queue have a slot."""
        return self._lines[queue].busy

    def waiting(self, queue: str) -> int:
        """How many delivered jobs of a queue wait for a slot."""
        line = self._lines[queue]
        return len(line.waiting) + line.dispatched

    @property
    def isolated(self) -> int:
        """How many jobs wait to run alone, before anything else."""
        return len(self._waiting_isolated)
