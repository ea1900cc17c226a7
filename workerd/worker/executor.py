"""Attempts at jobs: which handler has one, when it begins, how it ends, who cuts it short."""

from __future__ import annotations

import asyncio
import functools
import time
import traceback
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from workerd import log
from workerd.core.admission import admit
from workerd.core.breaker import Breaker
from workerd.core.cancellations import Cancellations
from workerd.core.handler import Degraded
from workerd.core.job import BadJob, Job, Outcome, Report, Run, submitter
from workerd.errors import EX_TEMPFAIL

if TYPE_CHECKING:
    from workerd.worker.worker import Worker


class Executor:
    """What the handlers make of the runs that start; see `make`."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        #: Of every run whose handler has not ended.
        self.progress: dict[Run, Progress] = {}
        self._cancellations = Cancellations()
        self.configure()

    def configure(self) -> None:
        """Work with the handlers of the worker's settings; jobs that run keep theirs."""
        self.handlers = self._worker.registry.of(self._worker.settings, self._looked_after)
        # What was wrong with a handler may be right now.
        self._breaker = Breaker()

    async def make(self, run: Run) -> Report:
        """Give the job to its handler, if there is one that may have it, and log what it made."""
        worker, job = self._worker, run.job
        came = time.monotonic()
        progress = self.progress[run] = Progress(worker.loop.create_future())
        if run.withdrawn or worker.drain.interrupt.done():
            progress.end()

        def started(pid: int) -> None:
            progress.began, progress.pid = time.monotonic(), pid
            worker.ledger.begins(run)
            worker.counters.began(run, time.time())
            alone = True if worker.ledger.slots.is_isolated(run) else None
            routine = worker.settings.log.routine
            log.event("start", routine, redelivered=job.redelivered, alone=alone)
            self._resume(str(job.type))

        try:
            self._cancellations.check(job, time.time())
            handler = self.handlers[admit(job, worker.settings, time.time()).name]
            if self._breaker.holds(str(job.type), came):
                return Report(Outcome.UNAVAILABLE, ran=False)
            report = await handler.run(
                job, progress.stop, started, functools.partial(worker.ledger.slots.may_begin, run)
            )
            if progress.cancelled and report.outcome is Outcome.INTERRUPTED:
                report = replace(report, outcome=Outcome.REJECTED, reason="cancelled")
        except BadJob as bad:
            report = Report(Outcome.REJECTED, bad.reason, error=str(bad), ran=False)
        except Exception:  # noqa: BLE001 - whatever a handler does, the job is not lost
            ran = progress.began is not None
            outcome = Outcome.FAILED if ran else Outcome.UNAVAILABLE
            error = traceback.format_exc().rstrip()
            report = Report(outcome, "bug", error=error, ran=ran)
        finally:
            del self.progress[run]
        if report.outcome is Outcome.UNAVAILABLE:
            self._pause(str(job.type), report)
        else:
            self._log_outcome(report, time.monotonic() - (progress.began or came))
        worker.counters.ended(job, progress.began, time.monotonic())
        return report

    def cancel(self, job_id: str, owner: int | None) -> list[Run]:
        """End the runs of a job, and let no other begin; returns the runs that are ended.

        With an ``owner``, only what this user has submitted.
        """
        self._cancellations.add(job_id, owner, time.time())
        ended = []
        for run, progress in self.progress.items():
            if run.job.id == job_id and owner in (None, submitter(run.job.message)):
                progress.cancelled = True
                progress.end()
                ended.append(run)
        return ended

    def withdraw(self, channel: int) -> None:
        """What came on this channel and has not begun does not begin: others may get it now."""
        worker = self._worker
        runs = [
            run for run in worker.ledger.unbegun if run.delivery and run.delivery.channel == channel
        ]
        for run in runs:
            run.withdrawn = True
        if runs:
            # Some may have begun, and the daemon not know it yet: those go on.
            worker.registry.recall()
        for run in runs:
            progress = self.progress.get(run)
            if run.begun:
                run.withdrawn = False
            elif progress:
                progress.end()

    # Handlers, and what keeps them from their work.

    @property
    def degraded(self) -> dict[str, Degraded]:
        """The handlers that run no jobs, or fewer at once than they should, by name."""
        found = {name: handler.degraded for name, handler in self.handlers.items()}
        paused = {name: Degraded(True, pause.error) for name, pause in self._breaker.paused.items()}
        return {name: why for name, why in sorted({**found, **paused}.items()) if why}

    def seconds_put_off(self, job: Job) -> float:
        """For how long a job is to be put off whose handler is paused."""
        return self._breaker.delay(str(job.type), time.monotonic())

    def begins_at_once(self, job: Job) -> bool:
        """Whether nothing but its slot keeps a job from beginning."""
        handler = self.handlers.get(str(job.type))
        return handler is None or handler.immediate

    def capacity(self, job: Job) -> int:
        """How many jobs of this one's handler may be with it, slots or not."""
        handler = self.handlers.get(str(job.type))
        return handler.capacity if handler else 0

    def _pause(self, handler: str, report: Report) -> None:
        if self._breaker.unavailable(handler, report.error, time.monotonic()):
            log.error("handler paused", handler=handler, reason=report.reason, error=report.error)
            self._worker.changed()

    def _resume(self, handler: str) -> None:
        if self._breaker.available(handler):
            log.event("handler resumed", handler=handler)
            self._worker.changed()

    def _looked_after(self, handler: str) -> None:
        """It has become degraded, or is no longer: then no job needs to try it."""
        known = self.handlers.get(handler)
        if known and known.degraded is None:
            self._resume(handler)
        self._worker.changed()

    def _log_outcome(self, report: Report, seconds: float) -> None:
        facts = {
            "outcome": report.outcome.value,
            "duration_ms": round(seconds * 1000),
            "reason": report.reason or None,
            "exit_status": report.exit_status,
            "signal": report.signal,
            "note": report.note or None,
        }
        if report.outcome is Outcome.DONE:
            log.event("done", self._worker.settings.log.routine, **facts)
        elif not report.ran and report.outcome is Outcome.INTERRUPTED:
            log.debug("interrupted", **facts)
        elif report.outcome is Outcome.INTERRUPTED or report.exit_status == EX_TEMPFAIL:
            # That status asks for another attempt: it has failed without a warning.
            log.event(report.outcome.value, "info", **facts)
        else:
            log.warning(report.outcome.value, **facts, error=report.error[-500:] or None)


@dataclass(slots=True)
class Progress:
    """How far a run is. ``began`` is an instant of the monotonic clock, None before the start.

    When ``stop`` is done, the handler ends the job. ``pid`` is that of its process.
    """

    stop: asyncio.Future[None]
    began: float | None = None
    pid: int | None = None
    cancelled: bool = False

    def end(self) -> None:
        """Let the handler end the job, with its grace."""
        if not self.stop.done():
            self.stop.set_result(None)
