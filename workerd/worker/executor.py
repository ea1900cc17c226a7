"""Executing a job: which handler has it, when it begins, how it ends, who cuts it short."""

from __future__ import annotations

import asyncio
import functools
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from workerd import log
from workerd.config.model import Settings
from workerd.core.admission import admit
from workerd.core.breaker import Breaker
from workerd.core.cancellations import Cancellations
from workerd.core.counters import Counters
from workerd.core.handler import Degraded, Details, Registry
from workerd.core.job import BadJob, Job, Outcome, Report, Run, submitter
from workerd.core.ledger import Ledger
from workerd.core.states import IllegalInput
from workerd.errors import EX_TEMPFAIL
from workerd.worker.stop import Stop


@dataclass(slots=True)
class Progress:
    """How far a run is. ``began`` is an instant of the monotonic clock, None before the start.

    When ``stop`` is done, the handler ends the job. ``details`` are its handler's.
    """

    stop: asyncio.Future[None]
    began: float | None = None
    details: Details = field(default_factory=dict)
    cancelled: bool = False

    def end(self) -> None:
        """Let the handler end the job, with its grace."""
        if not self.stop.done():
            self.stop.set_result(None)


class Executor:
    """Gives runs to their handlers; see `execute`.

    ``changed`` is called when a handler can run no more, or again.
    """

    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        ledger: Ledger,
        counters: Counters,
        stop: Stop,
        changed: Callable[[], object],
    ) -> None:
        self._registry = registry
        self._ledger = ledger
        self._counters = counters
        self._stop = stop
        self._changed = changed
        #: Of every run whose handler has not ended.
        self.progress: dict[Run, Progress] = {}
        self._cancellations = Cancellations()
        self.configure(settings)

    def configure(self, settings: Settings) -> None:
        """Work with the handlers of these settings; jobs that run keep theirs."""
        self._settings = settings
        self.handlers = self._registry.of(settings, self._looked_after)
        # What was wrong with a handler may be right now.
        self._breaker = Breaker()

    async def execute(self, run: Run) -> Report:
        """Have the job done by its handler, if one may have it, and log how that ends."""
        job = run.job
        came = time.monotonic()
        progress = self.progress[run] = Progress(asyncio.get_running_loop().create_future())
        if run.withdrawn or self._stop.interrupt.done():
            progress.end()

        def started(details: Details) -> None:
            progress.began, progress.details = time.monotonic(), details
            self._ledger.begins(run)
            self._counters.began(run, time.time())
            isolated = True if self._ledger.slots.is_isolated(run) else None
            routine = self._settings.log.routine
            log.event("start", routine, redelivered=job.redelivered, isolated=isolated)
            self._resume(str(job.type))

        try:
            self._cancellations.check(job, time.time())
            handler = self.handlers[admit(job, self._settings, time.time()).name]
            if self._breaker.holds(str(job.type), came):
                return Report(Outcome.UNAVAILABLE, ran=False)
            may_begin = functools.partial(self._ledger.slots.may_begin, run)
            report = await handler.run(job, progress.stop, started, may_begin)
            if progress.cancelled and report.outcome is Outcome.INTERRUPTED:
                report = replace(report, outcome=Outcome.REJECTED, reason="cancelled")
        except BadJob as bad:
            report = Report(Outcome.REJECTED, bad.reason, error=str(bad), ran=False)
        except IllegalInput:
            raise  # the bug is not the handler's
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
        self._counters.ended(job, progress.began, time.monotonic())
        return report

    @property
    def all_have_begun(self) -> bool:
        """Whether no job that is with its handler has yet to begin."""
        return all(progress.began is not None for progress in self.progress.values())

    def interrupt(self) -> None:
        """End every job that runs, with its grace."""
        for progress in self.progress.values():
            progress.end()

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
        runs = self._ledger.withdraw(channel)
        if runs:
            # Some may have begun, and the daemon not know it yet: those go on.
            self._registry.recall()
        for run in runs:
            progress = self.progress.get(run)
            if progress and not run.begun:
                progress.end()

    # Handlers, and what keeps them from their work.

    @property
    def trouble(self) -> str:
        """What is wrong with what all handlers need; "" when nothing is."""
        return self._registry.trouble

    @property
    def degraded(self) -> dict[str, Degraded]:
        """The handlers that run no jobs, or fewer at once than they should, by name."""
        found = {name: handler.degraded for name, handler in self.handlers.items()}
        paused = {name: Degraded(True, pause.error) for name, pause in self._breaker.paused.items()}
        return {name: why for name, why in sorted({**found, **paused}.items()) if why}

    def pause_of(self, job: Job) -> float:
        """For how many seconds a job is postponed whose handler is paused."""
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
            self._changed()

    def _resume(self, handler: str) -> None:
        if self._breaker.available(handler):
            log.event("handler resumed", handler=handler)
            self._changed()

    def _looked_after(self, handler: str) -> None:
        """It has become degraded, or is no longer: then no job needs to try it."""
        known = self.handlers.get(handler)
        if known and known.degraded is None:
            self._resume(handler)
        self._changed()

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
            log.event("done", self._settings.log.routine, **facts)
        elif not report.ran and report.outcome is Outcome.INTERRUPTED:
            log.debug("interrupted", **facts)
        elif report.outcome is Outcome.INTERRUPTED or report.exit_status == EX_TEMPFAIL:
            # That status asks for another attempt: it has failed without a warning.
            log.event(report.outcome.value, "info", **facts)
        else:
            log.warning(report.outcome.value, **facts, error=report.error[-500:] or None)
