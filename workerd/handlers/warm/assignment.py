"""A job on its way through a warm handler: what it has said so far, and who waits for its end."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import time
from typing import TYPE_CHECKING

from workerd.core.handler import MayBegin, Started
from workerd.core.job import Job, Report
from workerd.handlers.output import Transcript

if TYPE_CHECKING:
    from workerd.handlers.warm.child_process import ChildProcess

_arrivals = itertools.count()


class Assignment:
    """A job that waits for a warm process, or is in the hands of one."""

    def __init__(self, job: Job, started: Started, may_begin: MayBegin, lines: int) -> None:
        self.job = job
        self.may_begin = may_begin
        #: Counts the jobs as they came.
        self.arrival = next(_arrivals)
        #: It is not to run any more.
        self.stopped = False
        #: When it began, an instant of the monotonic clock.
        self.began = 0.0
        self.report: asyncio.Future[Report] = asyncio.get_running_loop().create_future()
        #: The process that holds it.
        self.child: ChildProcess | None = None
        #: Its number among the jobs of that process, and the bytes that it takes there.
        self.number = self.size = 0
        self._started: Started | None = started
        # What the job says is logged with the fields of whoever waits for it.
        self._context = contextvars.copy_context()
        self._lines = lines
        self._said: Transcript | None = None

    def begin(self) -> None:
        """Its process comes to it; told once, even if another gets it after that one."""
        self.began = time.monotonic()
        if self._started is not None:
            started, self._started = self._started, None
            assert self.child is not None
            self._context.run(started, self.child.pid)

    @property
    def said(self) -> Transcript:
        """What it has said so far: of most jobs, nothing."""
        if self._said is None:
            self._said = Transcript(self._context, self._lines)
        return self._said

    def end(self, report: Report) -> None:
        """Tell whoever waits for it. All that it has printed is in the log then."""
        if self._said is not None:
            self._said.close()
        if not self.report.done():
            self.report.set_result(report)
