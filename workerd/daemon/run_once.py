"""`workerd run-once`: one job, run by its handler as the daemon would, without a broker."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import time
from dataclasses import replace

from workerd import log, log_formats, output
from workerd.aio import complete
from workerd.check.programs import untrusted_programs
from workerd.config.load import load
from workerd.config.model import Settings
from workerd.config.permissions import drop_to_service_user
from workerd.config.text import did_you_mean
from workerd.core import job as jobs
from workerd.core.admission import admit
from workerd.core.decode import decode
from workerd.core.job import BadJob, Job, Outcome, Report
from workerd.errors import EX_DATAERR, EX_TEMPFAIL, EX_UNAVAILABLE, EX_USAGE, SettingsError
from workerd.handlers.guardian import Guardian
from workerd.handlers.registry import HandlerRegistry
from workerd.ids import new_id

TIMED_OUT = 124


def run_once(args: argparse.Namespace) -> int:
    """Carry the command out; returns the exit status. Raises SettingsError."""
    settings = load(args.config, args.instance)
    handler = settings.handlers.get(args.handler)
    headers = dict(header.partition("=")[::2] for header in args.header)
    problem = ""
    if handler is None:
        hint = did_you_mean(args.handler, settings.handlers)
        problem = f"no handler is named {args.handler!r}{hint}"
    elif not all("=" in header for header in args.header):
        problem = "--header: expected NAME=VALUE"
    elif args.attempt < 1:
        problem = "--attempt: expected 1 or more"
    if handler is None or problem:
        output.warn(problem, "workerd run-once")
        return EX_USAGE
    # The application's code gets no more rights than a job has.
    drop_to_service_user()
    settings = replace(settings, handlers={handler.name: handler})
    if problems := untrusted_programs(settings):
        raise SettingsError(*problems)
    message = jobs.Message(
        sys.stdin.buffer.read(),
        type=handler.name,
        message_id=args.id or new_id(),
        headers={**headers, jobs.ATTEMPT: args.attempt - 1},
    )
    guardian = Guardian()
    log.begin(log_formats.writer(settings.log.format), settings.log.level, args.instance)
    try:
        report = complete(_run(settings, decode(message, handler.queue), guardian))
    finally:
        guardian.close()
        log.flush(2.0)
    output.print_bytes(report.output)
    return exit_status(report)


async def _run(settings: Settings, job: Job, guardian: Guardian) -> Report:
    (handler,) = settings.handlers.values()
    loop = asyncio.get_running_loop()
    stop: asyncio.Future[None] = loop.create_future()

    def interrupt() -> None:
        if not stop.done():
            stop.set_result(None)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt)
    handlers = HandlerRegistry(os.environ, guardian)
    runs = handlers.of(settings)[handler.name]
    with log.job_fields(job_id=job.id, job_type=job.type, queue=job.queue, attempt=job.attempt):
        began = time.monotonic()
        try:
            admit(job, settings, time.time())
            report = await runs.run(
                job, stop, lambda _details: log.event("start"), lambda _behind=None, /: True
            )
        except BadJob as bad:
            report = Report(Outcome.REJECTED, bad.reason, error=str(bad), ran=False)
        log.event(
            report.outcome.value,
            "info" if report.outcome is Outcome.DONE else "warning",
            duration_ms=round((time.monotonic() - began) * 1000),
            reason=report.reason or None,
            exit_status=report.exit_status,
            signal=report.signal,
            retry_after=report.retry_after,
            note=report.note or None,
            error=report.error or None,
        )
    await handlers.close()
    return report


def exit_status(report: Report) -> int:
    """The exit status that tells how a job has ended."""
    match report.outcome:
        case Outcome.DONE:
            return 0
        case Outcome.UNAVAILABLE:
            return EX_UNAVAILABLE
        case Outcome.INTERRUPTED:
            return 128 + signal.SIGINT
        case Outcome.REJECTED:
            return report.exit_status or EX_DATAERR
        case Outcome.FAILED:
            return _of_failure(report)


def _of_failure(report: Report) -> int:
    if report.reason == "timeout":
        return TIMED_OUT
    if report.signal:
        name, _, number = report.signal.partition(" ")
        return 128 + (int(number) if number else signal.Signals[name])
    if report.retry_after is not None:
        return EX_TEMPFAIL
    return report.exit_status or 1
