"""Random episodes for the dispatch: a small model of a pool, its processes and the worker's slots.

`Episode` plays all that the dispatch does not decide: jobs of two queues that come and are
interrupted, slots that are free or not, processes that start, work, die and leave, a reload, a
drain. What must hold is asserted at each step, and at the end of each round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import product

from workerd.handlers.warm.dispatch import (
    Dismiss,
    Dispatch,
    Give,
    GiveUp,
    Start,
    Step,
    TakeBack,
    TurnAway,
)

SLOTS = {"narrow": 1, "wide": 3}
LIMIT = 3
SHORT, LONG = 0.001, 5.0


@dataclass(eq=False)
class Piece:
    """A job; it has a slot from its beginning to its end."""

    episode: Episode
    arrival: int
    queue: str
    stopped: bool = False
    begun: bool = False
    #: How it ended.
    end: str = ""

    def may_begin(self, behind: str | None = None, /) -> bool:
        """As the slots of the worker say."""
        if self.stopped:
            return False
        if self.begun:
            return True
        if self.queue in self.episode.paused:
            return False
        return self.episode.has_slot(self.queue) if behind is None else behind == self.queue

    def __str__(self) -> str:
        return f"job {self.arrival} of {self.queue}"


@dataclass(eq=False)
class Child:
    """A process; it has answered so many jobs, and leaves after ``last`` of them."""

    number: int
    last: int
    is_starting: bool = True
    #: It has been told to end.
    ending: bool = False
    leaving: bool = False
    count: int = 0
    assignments: list[Piece] = field(default_factory=list)

    def room(self, depth: int, /) -> int:
        if self.is_starting or self.ending or self.leaving:
            return 0
        return min(depth, self.last - self.count) - len(self.assignments)

    def __str__(self) -> str:
        return f"process {self.number}"


class Episode:
    """A pool and its dispatch; every public method is something that may happen."""

    def __init__(self, asks: bool, depth: int) -> None:
        self.asks = asks
        self.can_start = True
        self.paused: set[str] = set()
        self.story: list[str] = []
        self.jobs: list[Piece] = []
        self.children: list[Child] = []
        self.count = 0
        self.dispatch: Dispatch[Piece, Child] = Dispatch(LIMIT, depth, asks, lambda: self.can_start)

    def has_slot(self, queue: str) -> bool:
        busy = sum(job.begun and not job.end and job.queue == queue for job in self.jobs)
        return busy < SLOTS[queue]

    # The worker.

    def come(self, queue: str, count: int) -> None:
        for _ in range(count):
            job = Piece(self, len(self.jobs), queue)
            self.story.append(f"{job} comes")
            self.jobs.append(job)
            if self.dispatch.draining:
                job.end = "turned away"
            else:
                self.dispatch.arrived(job)
        self.round()

    def interrupt(self, which: int) -> None:
        """A job is to end: its process with it, if it has begun."""
        alive = [job for job in self.jobs if not job.end]
        if not alive:
            return
        job = alive[which % len(alive)]
        self.story.append(f"{job} is interrupted")
        job.stopped = True
        holder = self._holder(job)
        if holder is None:
            self.dispatch.withdrawn(job)
        else:
            self._take_back(holder)
            if job in holder.assignments:
                holder.ending = True
        self.round()

    def pause(self, queue: str) -> None:
        self.story.append(f"{queue} paused")
        self.paused.add(queue)
        self.recall()

    def resume(self, queue: str) -> None:
        self.story.append(f"{queue} resumed")
        self.paused.discard(queue)
        self.round()

    def recall(self) -> None:
        for child in self.children:
            self._take_back(child)
        self.round()

    def hold(self) -> None:
        self.story.append("held")
        self.dispatch.held = True
        self.recall()

    def retire(self) -> None:
        self.story.append("replaced")
        self.dispatch.retired = True
        self.round()

    def drain(self) -> None:
        self.story.append("drain")
        self.dispatch.draining = self.dispatch.retired = True
        self.round()

    def want(self) -> None:
        self.dispatch.want(1)
        self.round()

    # The processes.

    def become_ready(self, which: int) -> None:
        starting = [child for child in self.children if child.is_starting]
        if starting:
            child = starting[which % len(starting)]
            self.story.append(f"{child} is ready")
            child.is_starting = False
            self.round()

    def fail_to_start(self, which: int) -> None:
        starting = [child for child in self.children if child.is_starting]
        if starting:
            child = starting[which % len(starting)]
            self.story.append(f"{child} does not come up")
            self.children.remove(child)
            self.dispatch.removed(child)
            self.dispatch.start_failed()
            self.can_start = False
            self.round()

    def answer(self, which: int, count: int, seconds: float) -> None:
        """A process has done some of its jobs; the next of them has begun before that is known."""
        busy = [child for child in self.children if child.assignments]
        if not busy:
            return
        child = busy[which % len(busy)]
        for _ in range(count):
            if not child.assignments:
                break
            job = child.assignments.pop(0)
            self.story.append(f"{child} has done {job}")
            assert job.begun
            job.end = "done"
            child.count += 1
            if child.assignments and not child.assignments[0].begun:
                self._begin(child.assignments[0])
            if child.count == child.last:
                child.leaving = True
                self.dispatch.removed(child)
            elif not child.leaving:
                self.dispatch.pace.learn(seconds)
        if child.leaving and not child.assignments:
            self.children.remove(child)
        self.round()

    def die(self, which: int) -> None:
        """A process ends in the middle of its first job."""
        if not self.children:
            return
        child = self.children.pop(which % len(self.children))
        self.story.append(f"{child} dies")
        for job in child.assignments[:1]:
            job.end = "crashed"
        others, child.assignments = child.assignments[1:], []
        for job in others:
            job.begun = False
        self.dispatch.removed(child)
        self.dispatch.returned(others)
        self.round()

    def start_again(self) -> None:
        """The pause after a start that failed is over."""
        self.can_start = True
        self.round()

    # What the dispatch decides.

    def round(self) -> None:
        for step in self.dispatch.round():
            self._carry_out(step)
        self._check()

    def _carry_out(self, step: Step[Piece, Child]) -> None:
        match step:
            case Give(job, child):
                self._give(job, child)
            case TakeBack(child):
                assert self.asks, "taken back from one that does not ask"
                self._take_back(child)
            case Start():
                assert self.can_start, "a start in a pause"
                assert not self.dispatch.held, "a start while nothing may begin"
                self._start()
            case GiveUp(job):
                assert not self.dispatch.processes, "given up beside a process"
                assert job.may_begin()
                self._end(job, "given up")
            case TurnAway(job):
                assert job.stopped or self.dispatch.draining, "turned away for nothing"
                self._end(job, "turned away")
            case Dismiss(child):
                assert self.dispatch.retired, "dismissed for nothing"
                assert not self.dispatch.waiting, "dismissed while a job waits"
                self._leave(child)

    def _start(self) -> None:
        self.count += 1
        child = Child(self.count, last=4 if self.count % 2 else 1000)
        self.story.append(f"  {child} starts")
        self.children.append(child)
        self.dispatch.added(child)
        assert len(self.dispatch.processes) <= LIMIT

    def _give(self, job: Piece, child: Child) -> None:
        self.story.append(f"  {child} gets {job}")
        assert not self.dispatch.held, "given while nothing may begin"
        assert self._holder(job) is None, "in two processes"
        assert not job.end
        assert child.room(self.dispatch.pace.depth) > 0, "more than it takes"
        begins = not child.assignments or not self.asks
        behind = None if begins else child.assignments[-1].queue
        assert job.may_begin(behind), "it may not begin there"
        earlier = [each for each in self.dispatch.waiting if each.arrival < job.arrival]
        assert not any(each.may_begin(behind) for each in earlier), "out of order"
        if child.assignments:
            depth = self.dispatch.pace.depth
            idle = [c for c in self.dispatch.processes if not c.assignments and c.room(depth) > 0]
            assert not (idle and job.may_begin()), "behind another beside one with nothing to do"
        child.assignments.append(job)
        if begins:
            self._begin(job)

    def _begin(self, job: Piece) -> None:
        assert job.may_begin(), "begins without a slot"
        job.begun = True

    def _take_back(self, child: Child) -> None:
        """A process of those that ask gives back what it has not begun."""
        if not self.asks:
            return
        back = [job for job in child.assignments if not job.begun]
        child.assignments = [job for job in child.assignments if job.begun]
        if back:
            self.story.append(f"  {child} gives {len(back)} back")
            self.dispatch.returned(back)

    def _leave(self, child: Child) -> None:
        if child.ending:
            return
        self.story.append(f"  {child} leaves")
        child.leaving = True
        self.dispatch.removed(child)
        if child.is_starting or not child.assignments:
            self.children.remove(child)

    def _end(self, job: Piece, end: str) -> None:
        self.story.append(f"  {job} is {end}")
        assert self._holder(job) is None
        assert not job.end
        job.end = end

    def _holder(self, job: Piece) -> Child | None:
        holders = [child for child in self.children if job in child.assignments]
        assert len(holders) <= 1, "in two processes"
        return holders[0] if holders else None

    # What must hold after each round.

    def _check(self) -> None:
        dispatch = self.dispatch
        for job in self.jobs:
            places = (job in dispatch.waiting) + (self._holder(job) is not None) + bool(job.end)
            assert places == 1, f"{job} is in {places} places"
        arrivals = [job.arrival for job in dispatch.waiting]
        assert arrivals == sorted(arrivals), "out of order"
        assert len(dispatch.processes) <= LIMIT
        assert 1 <= dispatch.pace.depth <= dispatch.pace.most
        if dispatch.draining:
            assert not dispatch.waiting, "waits in a drain"
        if not dispatch.held:
            self._check_idle()

    def _check_idle(self) -> None:
        """A process that has nothing to do is there only where no job could begin."""
        depth = self.dispatch.pace.depth
        idle = [c for c in self.dispatch.processes if not c.assignments and c.room(depth) > 0]
        if idle:
            assert not any(job.may_begin() for job in self.dispatch.waiting), "waits for nothing"
        if idle and self.asks:
            behind = [job for child in self.dispatch.processes for job in child.assignments[1:]]
            assert not any(job.may_begin() for job in behind), "lies behind another for nothing"

    def conclude(self) -> None:
        """All troubles are over: whatever is left comes to its end."""
        self.story.append("everything comes to its end")
        self.paused.clear()
        self.can_start = True
        if self.dispatch.held:
            self.drain()
        self.round()
        while not all(job.end for job in self.jobs):
            before = len(self.story)
            for child in self.children.copy():
                if child.ending:
                    self.die(self.children.index(child))
                elif child.is_starting:
                    self.become_ready(0)
                elif child.assignments:
                    self.answer(0, 100, SHORT)
            assert len(self.story) > before, "nothing moves any more"
        if self.dispatch.retired:
            for child in self.children.copy():
                if child.ending or child.assignments:
                    self.die(self.children.index(child))
            assert not self.dispatch.processes, "a process of a replaced handler stays"


@dataclass(frozen=True)
class Event:
    """Something that may happen next; does nothing without an action."""

    action: Callable[..., None] | None
    arguments: tuple[object, ...] = ()

    def __call__(self, episode: Episode) -> None:
        if self.action:
            self.action(episode, *self.arguments)

    def __repr__(self) -> str:
        return f"{self.action.__name__}{self.arguments}" if self.action else "-"


def _each(action: Callable[..., None], *choices: Iterable[object], weight: int = 1) -> list[Event]:
    return [Event(action, arguments) for arguments in product(*choices)] * weight


#: All of them, the likelier ones more than once.
EVENTS = [
    Event(None),
    *_each(Episode.come, SLOTS, (1, 3, 8), weight=5),
    *_each(Episode.answer, range(3), (1, 2), [SHORT], weight=4),
    *_each(Episode.answer, range(3), [1], [LONG]),
    *_each(Episode.become_ready, range(2), weight=6),
    *_each(Episode.interrupt, range(5)),
    *_each(Episode.fail_to_start, range(2)),
    *_each(Episode.start_again, weight=3),
    *_each(Episode.die, range(3)),
    *_each(Episode.pause, SLOTS),
    *_each(Episode.resume, SLOTS, weight=2),
    *_each(Episode.recall),
    *_each(Episode.want),
    *_each(Episode.hold),
    *_each(Episode.retire),
    *_each(Episode.drain),
]
