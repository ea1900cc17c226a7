"""Warm handlers: processes that handle one job after another. Start at `WarmHandler.run`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from workerd import log
from workerd.handlers.guardian import Guardian
from workerd.handlers.program import Program
from workerd.handlers.runner import Runner, Turn
from workerd.job import Job, Outcome, Report
from workerd.options import Handler
from workerd.retry import backoff

#: Run by the application's interpreter, by its path.
CHILD = Path(__file__).with_name("child.py")
#: Seconds without an attempt to start a process after one that failed: at first, and at most.
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 10.0


class WarmHandler:
    """Runs the jobs of a python or stream handler; see `run`.

    At most ``processes`` of them live, besides those that are about to leave. Each has one job
    at a time, or up to ``depth`` in its pipe.
    """

    immediate = False

    def __init__(
        self,
        settings: Handler,
        environ: Mapping[str, str],
        output_lines: int,
        guardian: Guardian,
        level: log.Level = "info",
        depth: int = 1,
    ) -> None:
        self.settings = settings
        self._output_lines = output_lines
        self._guardian = guardian
        self._depth = depth
        if settings.python is not None:
            program = str(settings.interpreter or sys.executable)
            self._arguments = [os.fsencode(CHILD), settings.python.encode(), level.encode()]
        else:
            program, *arguments = settings.stream
            self._arguments = [argument.encode() for argument in arguments]
        self._program = Program(program, settings, environ)
        #: Jobs that no process has, first come first.
        self._waiting: deque[Turn] = deque()
        #: Processes that start, wait or work; `_leaving`: that take no job any more.
        self._runners: list[Runner] = []
        self._leaving: set[Runner] = set()
        self._held = False
        self._draining = False
        self._retired = False
        #: Why the last one could not start; None once one has done a job.
        self._trouble: Report | None = None
        self._pauses: Iterator[float] = iter(())
        self._next_start = 0.0
        self._gone = asyncio.Event()

    @property
    def processes(self) -> int:
        """How many there are."""
        return len(self._runners) + len(self._leaving)

    def start(self) -> None:
        """Have a process ready before the first job comes."""
        with self._fields():
            self._spawn()

    async def run(
        self, job: Job, stop: asyncio.Future[None], started: Callable[[int], None]
    ) -> Report:
        """Have the job done by the next free process; when ``stop`` is done, interrupt it.

        ``started`` is called when a process gets it. Where none can start, the report says so
        at once. Raises nothing on the job's account.
        """
        if self._draining or stop.done():
            return Report(Outcome.INTERRUPTED, "drain")
        turn = Turn(job, started, self._output_lines)

        def interrupt(_stop: object) -> None:
            self._interrupt(turn)

        self._waiting.append(turn)
        # What happens to processes is no business of this job's.
        with self._fields():
            self._hand_out()
        stop.add_done_callback(interrupt)
        try:
            return await turn.report
        finally:
            stop.remove_done_callback(interrupt)
            if not turn.report.done() or turn.report.cancelled():
                self._interrupt(turn)

    def hold(self) -> None:
        """Start no job any more; those that wait go on waiting until `drain`."""
        self._held = True

    def retire(self) -> None:
        """Another takes its place: every process leaves once no job is left for it."""
        self._retired = True
        with self._fields():
            self._dismiss_idle()

    def drain(self) -> None:
        """Start no job any more: those that wait are interrupted, those that run go on."""
        self._draining = True
        for turn in self._waiting:
            turn.end(Report(Outcome.INTERRUPTED, "drain"))
        self._waiting.clear()
        self.retire()

    async def close(self) -> None:
        """Drain, and wait until every process is gone: twice ``kill_grace`` at most."""
        self.drain()
        while self.processes:
            self._gone.clear()
            await self._gone.wait()

    # From jobs to processes.

    def _hand_out(self) -> None:
        """Give what waits to who is free, evenly; start processes for the rest, or give up."""
        if self._held:
            return
        while self._waiting:
            runner = max(self._runners, key=self._room, default=None)
            if runner is None or self._room(runner) <= 0:
                break
            runner.take(self._waiting.popleft())
        starting = sum(runner.state == "starting" for runner in self._runners)
        for _ in range(len(self._waiting) - starting):
            if len(self._runners) >= self.settings.processes or not self._spawn():
                break
        if not self._runners and self._waiting:
            assert self._trouble is not None
            for turn in self._waiting:
                turn.end(self._trouble)
            self._waiting.clear()

    def _fields(self) -> contextlib.AbstractContextManager[None]:
        """What is logged meanwhile, and later by what is registered meanwhile, is the handler's."""
        return log.job_fields(handler=self.settings.name)

    def _room(self, runner: Runner) -> int:
        return runner.room(self._depth)

    def _spawn(self) -> bool:
        """Start one more process, unless one has just failed; returns whether it was started."""
        if asyncio.get_running_loop().time() < self._next_start:
            return False
        try:
            runner = Runner(
                self, self._program, self._arguments, self._output_lines, self._guardian
            )
        except OSError as error:
            self._cannot_start("cannot-run", self._program.cannot_run(error))
            return False
        self._runners.append(runner)
        return True

    def _cannot_start(self, reason: str, text: str) -> None:
        if self._trouble is None:
            self._pauses = backoff(FIRST_PAUSE, LONGEST_PAUSE)
        pause = next(self._pauses)
        if self._trouble is None or self._trouble.error != text:
            log.error("child failed", reason=reason, error=text[-2000:])
        self._trouble = Report(Outcome.UNAVAILABLE, reason, error=text)
        self._next_start = asyncio.get_running_loop().time() + pause

    def _interrupt(self, turn: Turn) -> None:
        if turn in self._waiting:
            self._waiting.remove(turn)
            turn.end(Report(Outcome.INTERRUPTED, "drain"))
        elif turn.runner is not None and turn in turn.runner.turns:
            turn.runner.end("drain")

    def _dismiss_idle(self) -> None:
        if self._retired and not self._waiting:
            for runner in list(self._runners):
                runner.leave("retired")

    # What the processes tell.

    def ready(self, runner: Runner) -> None:
        log.debug("child ready", child=runner.pid)
        self._next_start = 0.0
        self._hand_out()
        self._dismiss_idle()

    def unfit(self, runner: Runner, text: str) -> None:
        self._runners.remove(runner)
        self._leaving.add(runner)
        self._cannot_start("cannot-start", text)
        self._hand_out()

    def free(self, runner: Runner) -> None:
        self._works()
        if self._waiting:
            self._hand_out()
        elif self._retired:
            runner.leave("retired")

    def leaves(self, runner: Runner, reason: str) -> None:
        log.debug("child leaves", child=runner.pid, reason=reason, jobs=runner.count)
        self._runners.remove(runner)
        self._leaving.add(runner)
        if runner.count:
            self._works()
        self._replace()

    def ended(self, runner: Runner, unbegun: list[Turn]) -> None:
        self._leaving.discard(runner)
        if runner in self._runners:
            self._runners.remove(runner)
            if not runner.taken:
                self._cannot_start("cannot-start", "it ended as soon as it was ready")
            self._replace()
        for turn in reversed(unbegun):
            if self._draining:
                turn.end(Report(Outcome.INTERRUPTED, "drain"))
            elif not turn.report.done():
                self._waiting.appendleft(turn)
        self._hand_out()
        self._dismiss_idle()
        self._gone.set()

    def _works(self) -> None:
        """A process has done a job: whatever kept another from it is no reason to wait."""
        self._trouble = None
        self._next_start = 0.0

    def _replace(self) -> None:
        """As many as there were: the next job is not to wait for a start."""
        if not self._retired and len(self._runners) < self.settings.processes:
            self._spawn()
