"""Warm handlers: processes that handle one job after another. Start at `WarmHandler.run`.

`dispatch` decides who gets which job; this is the shell that carries it out. Whatever happens to a
job or to a process is reported to it, and one round of its steps follows, soon: no caller has to
ask for one.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from workerd import log, log_formats
from workerd.config.model import Handler
from workerd.core.handler import Degraded, Interrupt, MayBegin, Started
from workerd.core.job import Job, Outcome, Report
from workerd.handlers.guardian import Guardian
from workerd.handlers.program import Program
from workerd.handlers.warm.assignment import Assignment
from workerd.handlers.warm.child_process import ChildProcess
from workerd.handlers.warm.dispatch import (
    Dismiss,
    Dispatch,
    Give,
    GiveUp,
    Start,
    TakeBack,
    TurnAway,
)
from workerd.handlers.warm.respawn import Respawner

#: Run by the application's interpreter, by its path.
CHILD = Path(__file__).parents[1] / "child_boot.py"
#: Of a job that no process came to, and none will.
NOT_BEGUN = Report(Outcome.INTERRUPTED, "not begun", ran=False)


class WarmHandler:
    """Runs the jobs of a python or stream handler; see `run`.

    At most ``processes`` of them live, besides those that are about to leave. Each has one job
    at a time, and up to ``depth`` in its pipe. Those in the pipe of a python process have not
    begun: they go to another one that has nothing to do, and where they came from in a drain.
    A process that cannot be started is tried again after a pause, jobs or not; the others go on.
    ``changed`` is called when the handler becomes `degraded`, and when that is over.
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
        if settings.python is not None:
            program = str(settings.interpreter or sys.executable)
            self._arguments = [os.fsencode(CHILD), settings.python.encode(), level.encode()]
        else:
            program, *arguments = settings.stream
            self._arguments = [argument.encode() for argument in arguments]
        self._program = Program(program, settings, environ)
        self._respawner = Respawner(settings.name, self._hand_out_soon, changed)
        self._dispatch: Dispatch[Assignment, ChildProcess] = Dispatch(
            settings.processes, depth, self._asks, lambda: not self._respawner.paused
        )
        #: Processes that take no job any more.
        self._leaving: set[ChildProcess] = set()
        self._gone = asyncio.Event()
        self._handing_out: asyncio.Handle | None = None

    @property
    def capacity(self) -> int:
        """See `core.handler.Handler`."""
        return self._dispatch.capacity

    @property
    def processes(self) -> int:
        """How many there are."""
        return len(self._dispatch.processes) + len(self._leaving)

    @property
    def in_use(self) -> bool:
        """Whether the handler has jobs or processes."""
        return bool(self.processes or self._dispatch.waiting)

    @property
    def degraded(self) -> Degraded | None:
        """See `core.handler.Handler`."""
        return self._respawner.degraded(self._dispatch.processes)

    def start(self) -> None:
        """Have a process ready before the first job comes; try one that failed again at once."""
        self._dispatch.want(1)
        self._respawner.end_pause()
        self._hand_out_soon()

    async def run(
        self,
        job: Job,
        stop: Interrupt,
        started: Started,
        may_begin: MayBegin = lambda behind=None, /: True,
    ) -> Report:
        """Have the job done by the next free process; when ``stop`` is done, interrupt it.

        ``started`` is called when a process comes to the job, not before it ``may_begin``. Where no
        process can start, the report says so at once. Raises nothing on the job's account.
        """
        if self._dispatch.draining or stop.done():
            return NOT_BEGUN
        assignment = Assignment(job, started, may_begin, self._output_lines)

        def interrupt(_stop: object) -> None:
            self._interrupt(assignment)

        self._dispatch.arrived(assignment)
        self._hand_out_soon()
        stop.add_done_callback(interrupt)
        try:
            return await assignment.report
        finally:
            stop.remove_done_callback(interrupt)
            if not assignment.report.done() or assignment.report.cancelled():
                self._interrupt(assignment)

    def _interrupt(self, assignment: Assignment) -> None:
        assignment.stopped = True
        if assignment.holder is not None:
            assignment.holder.interrupt(assignment)
        else:
            self._dispatch.withdrawn(assignment)
        self._hand_out_soon()

    def hold(self) -> None:
        """Start no job any more; those that wait go on waiting until `drain`."""
        self._dispatch.held = True
        self.recall()

    def recall(self) -> None:
        """Nothing that has not begun begins, unless it still may."""
        for child in (*self._dispatch.processes, *self._leaving):
            if child.assignments:
                child.freeze()
        self._hand_out_soon()

    def retire(self) -> None:
        """Another takes its place: every process leaves once no job is left for it."""
        self._dispatch.retired = True
        self._hand_out_soon()

    def drain(self) -> None:
        """Start no job any more: those that wait are interrupted, those that run go on."""
        self._dispatch.draining = True
        self.retire()

    async def close(self) -> None:
        """Drain, and wait until every process is gone: twice ``kill_grace`` at most."""
        self.drain()
        while self.in_use:
            self._gone.clear()
            await self._gone.wait()

    # From jobs to processes.

    def hand_out(self) -> None:
        """Carry out one round of the dispatch, now: jobs may begin that could not before."""
        takers = set()
        for step in self._dispatch.round():
            match step:
                case Give(assignment, child):
                    child.take(assignment)
                    takers.add(child)
                case TakeBack(child):
                    self._dispatch.returned(child.take_back())
                case Start():
                    self._spawn()
                case GiveUp(assignment):
                    assert self._respawner.trouble is not None
                    assignment.end(self._respawner.trouble)
                case TurnAway(assignment):
                    assignment.end(NOT_BEGUN)
                case Dismiss(child):
                    child.leave("retired")
        for child in takers:
            child.send()

    def _hand_out_soon(self) -> None:
        """The same, once for all that happens in this turn of the loop."""
        if self._handing_out is None:
            self._handing_out = asyncio.get_running_loop().call_soon(self._hand_out_now)

    def _hand_out_now(self) -> None:
        self._handing_out = None
        self.hand_out()
        self._gone.set()

    def _spawn(self) -> None:
        """Start one more process; if that fails, no other is started for a while."""
        # What happens to processes is no business of the job that happens to cause it.
        with log.job_fields(handler=self.settings.name):
            try:
                child = ChildProcess(
                    self,
                    self.settings,
                    self._program,
                    self._arguments,
                    self._output_lines,
                    self._guardian,
                    self._asks,
                    self.before_sending,
                )
            except OSError as error:
                self._start_failed("cannot-run", self._program.cannot_run(error))
            else:
                self._dispatch.added(child)

    def _start_failed(self, reason: str, text: str) -> None:
        self._dispatch.start_failed()
        self._respawner.failed(reason, text, self._dispatch.processes)
        self._hand_out_soon()

    # What the processes report; see `child_process.Owner`.

    def ready(self, child: ChildProcess) -> None:
        log.debug("child ready", child=child.pid)
        self._respawner.ready(child)
        self._hand_out_soon()

    def start_failed(self, child: ChildProcess, text: str) -> None:
        self._dispatch.removed(child)
        self._leaving.add(child)
        self._start_failed("cannot-start", text)

    def answered(self, child: ChildProcess, seconds: float) -> None:
        self._respawner.works(child)
        self._dispatch.pace.learn(seconds)
        if self._dispatch.has_use_for(child):
            self._hand_out_soon()

    def returned(self, assignments: list[Assignment]) -> None:
        if assignments:
            self._dispatch.returned(assignments)
            self._hand_out_soon()

    def leaves(self, child: ChildProcess, reason: str) -> None:
        handler = self.settings.name
        log.debug("child leaves", handler=handler, child=child.pid, reason=reason, jobs=child.count)
        self._dispatch.removed(child)
        self._leaving.add(child)
        if child.count:
            self._respawner.works(child)
        self._hand_out_soon()

    def ended(self, child: ChildProcess, unbegun: list[Assignment]) -> None:
        self._dispatch.removed(child)
        self._leaving.discard(child)
        if child.count:
            # Where it was there is room for another, whatever there was none of.
            self._respawner.end_pause()
        self._dispatch.returned(unbegun)
        self._hand_out_soon()
