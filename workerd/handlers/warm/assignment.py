"""A job on its way through a warm handler: what it has printed so far, who waits for its end."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import time
from typing import Protocol

from workerd.core.handler import Details, MayBegin, Started
from workerd.core.job import Job, Report
from workerd.handlers.output import Transcript

_arrivals = itertools.count()


class Holder(Protocol):
    """The process that has a job."""

    def interrupt(self, assignment: Assignment) -> None:
        """Give the job back, or end it if it has begun."""


class Assignment:
    """A job that waits for a warm process, or that one has."""

    def __init__(self, job: Job, started: Started, may_begin: MayBegin, lines: int) -> None:
        self.job = job
        self.may_begin = may_begin
        #: Counts the jobs as they came.
        self.arrival = next(_arrivals)
        self.queue = job.queue
        #: Whether it is not to run any more.
        self.stopped = False
        #: When it began, an instant of the monotonic clock.
        self.began = 0.0
        self.report: asyncio.Future[Report] = asyncio.get_running_loop().create_future()
        #: None while it waits, and once it is over.
        self.holder: Holder | None = None
        #: Its number among the jobs of that process, and the bytes that it takes there.
        self.number = self.size = 0
        self._started: Started | None = started
        # What the job prints is logged with the fields of whoever waits for it.
        self._context = contextvars.copy_context()
        self._lines = lines
        self._transcript: Transcript | None = None

    def begin(self, details: Details) -> None:
        """A process comes to it; reported once, even if another gets it after that one."""
        self.began = time.monotonic()
        if self._started is not None:
            started, self._started = self._started, None
            self._context.run(started, details)

    @property
    def transcript(self) -> Transcript:
        """What it has printed so far: of most jobs, nothing."""
        if self._transcript is None:
            self._transcript = Transcript(self._context, self._lines)
        return self._transcript

    def end(self, report: Report) -> None:
        """It is over. All that it has printed is in the log then."""
        self.holder = None
        if self._transcript is not None:
            self._transcript.close()
        if not self.report.done():
            self.report.set_result(report)
