"""Which warm process gets which job, and how many may lie in its pipe. Pure: `pool` is the shell.

The pool reports what happens, and after that carries out one `Dispatch.round` of steps. The rules:

1.  A job goes to a process that has nothing to do, otherwise to the one with the most room; of the
    jobs that wait, the one that came first among those that may begin there.
2.  A process that has nothing to do begins what it is given, and one that does not ask begins
    everything: those get only what may begin now. Others get what may begin behind their last job.
3.  No job lies behind another while it could begin in a process that has nothing to do: it is
    taken back from there first.
4.  There are as many processes as there were, and one more for each job that could begin and has
    none, up to ``limit``. Without any, and while none can be started, such a job is given up.
5.  Of a handler that is held nothing begins; of one that drains, what waits is turned away.
6.  The processes of a handler that has been replaced leave once no job waits.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

from workerd.core.job import value

#: Jobs for so many seconds may lie in the pipe of a process that can give them back, and so many.
LOOK_AHEAD, MOST_AHEAD = 0.02, 100
#: The part of a job's duration that enters the mean.
_WEIGHT = 1 / 8


class Candidate(Protocol):
    """A job, as far as its place in line is concerned."""

    @property
    def arrival(self) -> int:
        """A number that is greater for each job that comes later."""

    @property
    def stopped(self) -> bool:
        """Whether the job is not to run any more."""

    @property
    def queue(self) -> str:
        """The queue that the job came from."""

    def may_begin(self, behind: str | None = None, /) -> bool:
        """Whether the job may begin now, or ``behind`` one of this queue."""


J = TypeVar("J", bound=Candidate)


J_co = TypeVar("J_co", bound=Candidate, covariant=True)


class Taker(Protocol[J_co]):
    """A process, as far as its jobs are concerned."""

    @property
    def is_starting(self) -> bool:
        """Whether it is not ready yet."""

    @property
    def assignments(self) -> Sequence[J_co]:
        """Its jobs: the first is being done."""

    def room(self, depth: int, /) -> int:
        """How many more jobs it takes when it may have ``depth``."""


P = TypeVar("P", bound=Taker)  # type: ignore[type-arg]  # of J, which cannot be said


@value
class Give(Generic[J, P]):
    """Let this process have the job."""

    job: J
    process: P


@value
class TakeBack(Generic[P]):
    """Take the jobs back that lie in this pipe, and report them as `Dispatch.returned`."""

    process: P


@value
class Start:
    """Start one more process, and report it as `Dispatch.added`; or none can be started."""


@value
class GiveUp(Generic[J]):
    """There is no process for this job."""

    job: J


@value
class TurnAway(Generic[J]):
    """This job is not to begin here any more."""

    job: J


@value
class Dismiss(Generic[P]):
    """Have this process leave."""

    process: P


Step = Give[J, P] | TakeBack[P] | Start | GiveUp[J] | TurnAway[J] | Dismiss[P]


class Pace:
    """How long jobs take, and so how many of them one process may have: its ``depth``."""

    def __init__(self, most: int, asks: bool) -> None:
        """``most`` at any time; all of them where they cannot be taken back."""
        self.most = min(most, MOST_AHEAD) if asks else most
        self.depth = 1 if asks else most
        self._asks = asks
        #: Seconds.
        self._mean = math.inf

    def learn(self, seconds: float) -> None:
        """A job has taken so long. One that takes long is believed at once."""
        if self._mean > LOOK_AHEAD or seconds > LOOK_AHEAD:
            self._mean = seconds
        else:
            self._mean += (seconds - self._mean) * _WEIGHT
        if self._asks:
            self.depth = min(self.most, 1 + int(LOOK_AHEAD / (self._mean + 1e-6)))


class Dispatch(Generic[J, P]):
    """The jobs and the processes of one handler; see the rules above.

    Processes that ``ask`` can have a job behind another that they have not begun.
    """

    def __init__(
        self, limit: int, depth: int, asks: bool, may_start: Callable[[], bool] = lambda: True
    ) -> None:
        """``may_start`` says whether a process can be started at present."""
        self.limit = limit
        self.pace = Pace(depth, asks)
        #: Jobs that no process has, in the order in which they came.
        self.waiting: deque[J] = deque()
        #: The processes that start, wait or work, and none that leaves.
        self.processes: list[P] = []
        self.held = False
        self.retired = False
        self.draining = False
        self._asks = asks
        self._may_start = may_start
        #: How many processes there are to be, jobs or not.
        self._wanted = 0
        #: Jobs that are to be turned away.
        self._refused: deque[J] = deque()

    @property
    def capacity(self) -> int:
        """How many jobs could be in hand besides those with a slot: 0, unless pipes take some."""
        if not self._asks or self.held or self.retired:
            return 0
        return len(self.processes) * self.pace.depth

    # What is reported.

    def arrived(self, job: J) -> None:
        """A job waits for a process."""
        self.waiting.append(job)

    def returned(self, jobs: Iterable[J]) -> None:
        """A process has not begun these jobs, and will not."""
        jobs = list(jobs)
        if jobs:
            self._refused += (job for job in jobs if job.stopped)
            self.waiting += (job for job in jobs if not job.stopped)
            self.waiting = deque(sorted(self.waiting, key=lambda job: job.arrival))

    def withdrawn(self, job: J) -> None:
        """Nobody wants this job done any more; no process has it."""
        if job in self.waiting:
            self.waiting.remove(job)
            self._refused.append(job)

    def want(self, processes: int) -> None:
        """So many processes are to be there before jobs come."""
        self._wanted = max(self._wanted, processes)

    def added(self, process: P) -> None:
        """A process starts."""
        self.processes.append(process)
        self.want(len(self.processes))

    def removed(self, process: P) -> None:
        """A process takes no job any more."""
        if process in self.processes:
            self.processes.remove(process)

    def start_failed(self) -> None:
        """A process did not come up, and has been removed: one at a time is tried again."""
        self._wanted = len(self.processes) + 1

    def has_use_for(self, process: P) -> bool:
        """Whether a round is needed, now that the process has done a job."""
        return bool(self.waiting) or self.retired or not process.assignments

    # What is to be done.

    def round(self) -> Iterator[Step[J, P]]:
        """The steps to be taken now; each is done and reported before the next is asked for."""
        if self.draining:
            self._refused += self.waiting
            self.waiting.clear()
        while self._refused:
            yield TurnAway(self._refused.popleft())
        if not self.held:
            if self.waiting:
                yield from self._give()
            if self._asks and any(len(each.assignments) > 1 for each in self.processes):
                yield from self._share()
            if len(self.processes) < self.limit:
                yield from self._start()
        if self.retired and not self.waiting:
            for process in self.processes.copy():
                yield Dismiss(process)

    def _give(self) -> Iterator[Give[J, P]]:
        """Rules 1 and 2."""
        depth = self.pace.depth
        rooms = {process: process.room(depth) for process in self.processes}
        while self.waiting and (found := self._match(rooms)):
            self.waiting.remove(found.job)
            rooms[found.process] -= 1
            yield found

    def _match(self, rooms: dict[P, int]) -> Give[J, P] | None:
        free = [process for process, room in rooms.items() if room > 0]
        # One that has nothing to do comes first, even if it takes few more before it leaves.
        free.sort(key=lambda process: (not process.assignments, rooms[process]), reverse=True)
        nothing_begins = False
        for process in free:
            begins = not self._asks or not process.assignments
            if begins and nothing_begins:
                continue
            # Without a slot a job can only be the next of a process that has one of its queue.
            behind = None if begins else process.assignments[-1].queue
            for job in self.waiting:
                if job.may_begin(behind):
                    return Give(job, process)
            nothing_begins = nothing_begins or begins
        return None

    def _share(self) -> Iterator[Step[J, P]]:
        """Rule 3."""
        asked: set[P] = set()
        while self._is_idle():
            lenders = [each for each in self._lenders() if each not in asked]
            if not lenders:
                return
            lender = max(lenders, key=lambda process: len(process.assignments))
            asked.add(lender)
            yield TakeBack(lender)
            yield from self._give()

    def _is_idle(self) -> bool:
        """Whether a process has nothing to do, and could have a job."""
        depth = self.pace.depth
        return any(not each.assignments and each.room(depth) > 0 for each in self.processes)

    def _lenders(self) -> Iterator[P]:
        """The processes where a job lies behind another, and could begin."""
        for process in self.processes:
            if any(job.may_begin() for job in itertools.islice(process.assignments, 1, None)):
                yield process

    def _start(self) -> Iterator[Start | GiveUp[J]]:
        """Rule 4."""
        while len(self.processes) < self.limit and self._wants_more() and self._may_start():
            yield Start()
        if not self.processes and not self._may_start():
            for job in [job for job in self.waiting if job.may_begin()]:
                self.waiting.remove(job)
                yield GiveUp(job)

    def _wants_more(self) -> bool:
        if not self.retired and len(self.processes) < self._wanted:
            return True
        behind = (itertools.islice(each.assignments, 1, None) for each in self.processes)
        jobs = itertools.chain(self.waiting, *behind)
        ready = sum(bool(job.may_begin()) for job in jobs)
        return ready > sum(bool(each.is_starting) for each in self.processes)
