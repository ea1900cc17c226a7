"""Warm handlers: processes that handle one job after another. Start at `WarmHandler.run`."""

from __future__ import annotations

import asyncio
import itertools
import math
import operator
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from workerd import log, log_formats
from workerd.config.model import Handler
from workerd.core.handler import Degraded, MayBegin, Started
from workerd.core.job import Job, Outcome, Report
from workerd.handlers.guardian import Guardian
from workerd.handlers.program import Program
from workerd.handlers.warm.assignment import Assignment
from workerd.handlers.warm.child_process import ChildProcess
from workerd.handlers.warm.respawn import Respawner

#: Run by the application's interpreter, by its path.
CHILD = Path(__file__).parents[1] / "child_boot.py"
#: Jobs for so many seconds may lie in the pipe of a process that can give them back, and so many.
LOOK_AHEAD, MOST_AHEAD = 0.02, 100
#: Of a job that no process came to, and none will.
NOT_BEGUN = Report(Outcome.INTERRUPTED, "not begun", ran=False)
#: The part of a job's duration that enters the mean.
_WEIGHT = 1 / 8


class WarmHandler:
    """Runs the jobs of a python or stream handler; see `run`.

    At most ``processes`` of them live, besides those that are about to leave. Each has one job
    at a time, and up to ``depth`` in its pipe. Those in the pipe of a python process have not
    begun: they go to another one that has nothing to do, and where they came from in a drain.
    One that cannot be started is tried again after a pause, jobs or not; the others go on.
    ``changed`` is called when it becomes `degraded`, and when that is over.
    """

    immediate = False

    def __init__(
        self,
        settings: Handler,
        environ: Mapping[str, str],
        output_lines: int,
        guardian: Guardian,
        level: log_formats.Level = "info",
        depth: int = 1,
        changed: Callable[[], object] = lambda: None,
        before_sending: Callable[[], None] = lambda: None,
    ) -> None:
        self.settings = settings
        self.before_sending = before_sending
        self._output_lines = output_lines
        self._guardian = guardian
        self._asks = settings.python is not None
        self._most = min(depth, MOST_AHEAD) if self._asks else depth
        #: How many jobs one process may have, and how many seconds one takes.
        self._depth = 1 if self._asks else depth
        self._mean = math.inf
        if settings.python is not None:
            program = str(settings.interpreter or sys.executable)
            self._arguments = [os.fsencode(CHILD), settings.python.encode(), level.encode()]
        else:
            program, *arguments = settings.stream
            self._arguments = [argument.encode() for argument in arguments]
        self._program = Program(program, settings, environ)
        #: Jobs that no process has, first come first.
        self._waiting: deque[Assignment] = deque()
        #: Processes that start, wait or work; `_leaving`: that take no job any more.
        self._children: list[ChildProcess] = []
        self._leaving: set[ChildProcess] = set()
        self._held = False
        self._draining = False
        self._retired = False
        self._respawner = Respawner(settings.name, self._try_again, changed)
        self._gone = asyncio.Event()
        self._handing_out: asyncio.Handle | None = None

    @property
    def capacity(self) -> int:
        """How many jobs it could have in hand: more than may run, when the pipes take some."""
        if not self._asks or self._held or self._retired:
            return 0
        return len(self._children) * self._depth

    @property
    def processes(self) -> int:
        """How many there are."""
        return len(self._children) + len(self._leaving)

    @property
    def in_use(self) -> bool:
        """Whether it has jobs or processes."""
        return bool(self.processes or self._waiting)

    @property
    def degraded(self) -> Degraded | None:
        """See `handling.Handler`."""
        return self._respawner.degraded(self._children)

    def start(self) -> None:
        """Have a process ready before the first job comes; try one that failed again at once."""
        if self._respawner.paused or not self._children:
            self._respawner.end_pause()
            self._spawn()

    async def run(
        self,
        job: Job,
        stop: asyncio.Future[None],
        started: Started,
        may_begin: MayBegin = lambda behind=None: True,
    ) -> Report:
        """Have the job done by the next free process; when ``stop`` is done, interrupt it.

        ``started`` is called when a process comes to it, not before it ``may_begin``. Where none
        can start, the report says so at once. Raises nothing on the job's account.
        """
        if self._draining or stop.done():
            return NOT_BEGUN
        assignment = Assignment(job, started, may_begin, self._output_lines)

        def interrupt(_stop: object) -> None:
            self._interrupt(assignment)

        self._waiting.append(assignment)
        self._hand_out_soon()
        stop.add_done_callback(interrupt)
        try:
            return await assignment.report
        finally:
            stop.remove_done_callback(interrupt)
            if not assignment.report.done() or assignment.report.cancelled():
                self._interrupt(assignment)

    def hold(self) -> None:
        """Start no job any more; those that wait go on waiting until `drain`."""
        self._held = True
        self.recall()

    def recall(self) -> None:
        """Nothing that has not begun begins, unless it still may."""
        for child in (*self._children, *self._leaving):
            if child.assignments:
                child.freeze()
        self.hand_out()

    def retire(self) -> None:
        """Another takes its place: every process leaves once no job is left for it."""
        self._retired = True
        self._dismiss_idle()

    def drain(self) -> None:
        """Start no job any more: those that wait are interrupted, those that run go on."""
        self._draining = True
        self._turn_away()
        self.retire()

    async def close(self) -> None:
        """Drain, and wait until every process is gone: twice ``kill_grace`` at most."""
        self.drain()
        while self.processes:
            self._gone.clear()
            await self._gone.wait()

    def _turn_away(self) -> None:
        for assignment in self._waiting:
            assignment.stopped = True
        self._line_up(())

    # From jobs to processes.

    def hand_out(self) -> None:
        """Give what waits to who is free, evenly; start processes for the rest, or give up.

        To be called whenever jobs may begin that could not before.
        """
        if self._held:
            return
        self._share()
        takers = set()
        while (found := self._next()) is not None:
            assignment, child = found
            self._waiting.remove(assignment)
            child.take(assignment)
            takers.add(child)
        for child in takers:
            child.send()
        if len(self._children) < self.settings.processes:
            self._start_more()

    def _hand_out_soon(self) -> None:
        """The same, once for all that comes and ends in this turn of the loop."""
        if self._handing_out is None:
            self._handing_out = asyncio.get_running_loop().call_soon(self._hand_out_now)

    def _hand_out_now(self) -> None:
        self._handing_out = None
        self.hand_out()

    def _start_more(self) -> None:
        """Start processes for jobs that could begin, or tell why there is none."""
        behind = itertools.chain.from_iterable(
            itertools.islice(child.assignments, 1, None) for child in self._children
        )
        ready = [assignment for assignment in (*self._waiting, *behind) if assignment.may_begin()]
        starting = sum(child.state == "starting" for child in self._children)
        for _ in range(len(ready) - starting):
            if len(self._children) >= self.settings.processes or not self._spawn():
                break
        if ready and not self._children:
            assert self._respawner.trouble is not None
            for assignment in ready:
                self._waiting.remove(assignment)
                assignment.end(self._respawner.trouble)

    def _next(self) -> tuple[Assignment, ChildProcess] | None:
        """A job that waits, and the process that is to have it."""
        if not self._waiting:
            return None
        # Those that have nothing to do come first, even if they take few more before they leave.
        rooms = [(not each.assignments, each.room(self._depth), each) for each in self._children]
        free = sorted(
            (each for each in rooms if each[1] > 0), key=operator.itemgetter(0, 1), reverse=True
        )
        for number, (_, _, child) in enumerate(free):
            if not child.assignments or not child.asks:
                if number:
                    continue  # nothing could begin in the first of these
                queue = None
            else:
                # Without a slot it can only be the next of a process that has one of its queue.
                queue = child.assignments[-1].job.queue
            for assignment in self._waiting:
                if assignment.may_begin(queue):
                    return assignment, child
        return None

    def _share(self) -> None:
        """Where a process has nothing to do, jobs are not to wait behind others."""
        if self._waiting or not any(
            self._room(each) > 0 and not each.assignments for each in self._children
        ):
            return
        longest = max(self._children, key=lambda each: len(each.assignments))
        if len(longest.assignments) > 1 and longest.assignments[1].may_begin():
            self._line_up(longest.take_back())

    def _line_up(self, assignments: Iterable[Assignment]) -> None:
        """They wait again, in the order in which they came, unless they are not to run any more."""
        waiting = sorted((*self._waiting, *assignments), key=lambda assignment: assignment.arrival)
        self._waiting = deque(assignment for assignment in waiting if not assignment.stopped)
        for assignment in waiting:
            if assignment.stopped:
                assignment.end(NOT_BEGUN)

    def _room(self, child: ChildProcess) -> int:
        return child.room(self._depth)

    def _spawn(self) -> bool:
        """Start one more process, unless one has just failed; returns whether it was started."""
        if self._respawner.paused:
            return False
        # What happens to processes is no business of the job that happens to cause it.
        with log.job_fields(handler=self.settings.name):
            try:
                child = ChildProcess(
                    self,
                    self._program,
                    self._arguments,
                    self._output_lines,
                    self._guardian,
                    self._asks,
                )
            except OSError as error:
                trouble = self._program.cannot_run(error)
                self._respawner.failed("cannot-run", trouble, self._children)
                return False
        self._children.append(child)
        return True

    def _try_again(self) -> None:
        """Whoever looks after this handler waits for it, if no job does."""
        self._replace()
        self.hand_out()

    def _interrupt(self, assignment: Assignment) -> None:
        assignment.stopped = True
        child = assignment.child
        if assignment in self._waiting:
            self._line_up(())
        elif child is not None and assignment in child.assignments:
            child.freeze()
            if assignment in child.assignments:
                child.end("drain")
            self.hand_out()
        self._dismiss_idle()

    def _dismiss_idle(self) -> None:
        if self._retired and not self._waiting:
            for child in list(self._children):
                child.leave("retired")

    # What the processes tell.

    def ready(self, child: ChildProcess) -> None:
        """It takes jobs."""
        log.debug("child ready", child=child.pid)
        self._respawner.ready(child)
        self.hand_out()
        self._dismiss_idle()

    def startup_failed(self, child: ChildProcess, text: str) -> None:
        """It never came so far, or ended before it did anything."""
        self._children.remove(child)
        self._leaving.add(child)
        self._respawner.failed("cannot-start", text, self._children)
        self.hand_out()

    def free(self, child: ChildProcess, seconds: float) -> None:
        """It has done a job in this time, and could take another."""
        self._respawner.works(child)
        self._learn(seconds)
        if self._waiting or not child.assignments:
            self._hand_out_soon()
        if self._retired and not self._waiting:
            child.leave("retired")

    def returned(self, assignments: list[Assignment]) -> None:
        """Their process does not come to these, and another may have them."""
        if assignments:
            self._line_up(assignments)

    def leaves(self, child: ChildProcess, reason: str) -> None:
        """It takes no further job; what it has it will still do."""
        log.debug(
            "child leaves",
            handler=self.settings.name,
            child=child.pid,
            reason=reason,
            jobs=child.count,
        )
        self._children.remove(child)
        self._leaving.add(child)
        if child.count:
            self._respawner.works(child)
        self._replace()

    def ended(self, child: ChildProcess, unbegun: list[Assignment]) -> None:
        """It is over; these jobs were in its pipe, and it never came to them."""
        self._leaving.discard(child)
        vacant = child in self._children or self._respawner.paused
        if child.count:
            # Where it was there is room for another, whatever there was none of.
            self._respawner.end_pause()
        if child in self._children:
            self._children.remove(child)
            if not child.taken and not child.told_to_end:
                text = "it ended as soon as it was ready"
                self._respawner.failed("cannot-start", text, self._children)
        if vacant:
            self._replace()
        self._line_up(unbegun)
        if self._draining:
            self._turn_away()
        self.hand_out()
        self._dismiss_idle()
        self._gone.set()

    def _learn(self, seconds: float) -> None:
        """How long jobs take: one that takes long is believed at once."""
        if self._mean > LOOK_AHEAD or seconds > LOOK_AHEAD:
            self._mean = seconds
        else:
            self._mean += (seconds - self._mean) * _WEIGHT
        if self._asks:
            self._depth = min(self._most, 1 + int(LOOK_AHEAD / (self._mean + 1e-6)))

    def _replace(self) -> None:
        """As many as there were: the next job is not to wait for a start."""
        if not (self._held or self._retired) and len(self._children) < self.settings.processes:
            self._spawn()
