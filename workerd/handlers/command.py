"""Command handlers: one process for each job, never through a shell."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping

from workerd import log_formats
from workerd.config.model import Handler
from workerd.config.template import Placeholder, Template
from workerd.core.handler import Interrupt, Started
from workerd.core.job import BadJob, Job, Outcome, Report
from workerd.core.retry import limit
from workerd.handlers import report_file
from workerd.handlers.arguments import HEADER_VALUE_LIMIT, HEADERS_LIMIT, JobValues, text_of
from workerd.handlers.guardian import Guardian
from workerd.handlers.output import ERROR_LIMIT, Output
from workerd.handlers.poller import Poller
from workerd.handlers.process import Process, ending
from workerd.handlers.program import Program


class CommandHandler:
    """Runs the command of a handler; see `run`."""

    immediate = True
    capacity = 0
    degraded = None

    def __init__(
        self, settings: Handler, environ: Mapping[str, str], output_lines: int, guardian: Guardian
    ) -> None:
        self._settings = settings
        self._guardian = guardian
        self._poller = Poller()
        self._templates = [Template.parse(argument) for argument in settings.command]
        self._output_lines = output_lines
        self._program = Program(settings.command[0], settings, environ)

    async def run(
        self,
        job: Job,
        stop: Interrupt,
        started: Started,
        _may_begin: object = None,
    ) -> Report:
        """Run the job in a process of its own until that ends, times out, or ``stop`` is done.

        Raises BadJob when there can be no such process.
        """
        try:
            report = report_file.create()
        except OSError as error:
            return self._spawn_failed(error)
        try:
            return await self._run(job, stop, started, report)
        finally:
            os.close(report)

    async def _run(self, job: Job, stop: Interrupt, started: Started, report: int) -> Report:
        settings = self._settings
        stdout = Output("stdout", "info", self._output_lines, settings.output_limit)
        stderr = Output("stderr", "info", self._output_lines, ERROR_LIMIT)
        try:
            process = Process(
                self._arguments(job),
                self._environment_for(job),
                self._program.directory,
                job.body,
                stdout.feed,
                stderr.feed,
                self._guardian,
                [report],
                poller=self._poller,
            )
        except ValueError:
            raise BadJob("bad-argument", "an argument contains a NUL byte") from None
        except OSError as error:
            return self._spawn_failed(error)
        started({"pid": process.pid})

        def interrupt(_stop: object) -> None:
            process.end("drain", settings.kill_grace)

        process.end_after(settings.timeout, "timeout", settings.kill_grace)
        stop.add_done_callback(interrupt)
        try:
            status = await process.wait()
        finally:
            stop.remove_done_callback(interrupt)
        stdout.close()
        stderr.close()
        asked = report_file.read(report)
        outcome, reason = self._judge(status, process.cause)
        exit_status, signal = ending(status)
        return Report(
            outcome,
            reason,
            exit_status=exit_status,
            signal=signal,
            error=log_formats.text_lines(stderr.tail) if outcome is not Outcome.DONE else "",
            output=stdout.tail,
            retry_after=asked.retry_after,
            note=asked.note,
        )

    def _judge(self, status: int, cause: str) -> tuple[Outcome, str]:
        """The one place that maps how a process ended to an outcome and its reason."""
        if cause == "drain":
            return Outcome.INTERRUPTED, "drain"
        if cause == "timeout":
            return Outcome.FAILED, "timeout"
        if status < 0:
            return Outcome.FAILED, "signal"
        if status == 0:
            return Outcome.DONE, ""
        meaning = self._settings.exit_codes.get(status, "retry")
        if meaning == "done":
            return Outcome.DONE, ""
        return Outcome.REJECTED if meaning == "dead" else Outcome.FAILED, "exit-status"

    def _spawn_failed(self, error: OSError) -> Report:
        if error.errno == errno.E2BIG:
            raise BadJob("too-large", "arguments and environment too long")
        text = self._program.cannot_run(error)
        return Report(Outcome.UNAVAILABLE, "cannot-run", error=text, ran=False)

    def _arguments(self, job: Job) -> list[bytes]:
        arguments = [self._program.path]
        options_end = False
        values = JobValues(job)
        for template in self._templates[1:]:
            argument = b"".join(
                part.encode() if isinstance(part, str) else values.of(part)
                for part in template.parts
            )
            exposed = bool(template.parts) and isinstance(template.parts[0], Placeholder)
            if exposed and argument.startswith(b"-") and not (options_end or self._settings.dashes):
                raise BadJob(
                    "bad-argument", f"the argument {argument[:80]!r} would be taken for an option"
                )
            options_end = options_end or (argument == b"--" and not exposed)
            arguments.append(argument)
        return arguments

    def _environment_for(self, job: Job) -> dict[bytes, bytes]:
        message = job.message
        environment = self._program.environment | {
            b"WORKERD_JOB_ID": job.id.encode(),
            b"WORKERD_JOB_TYPE": (job.type or "").encode(),
            b"WORKERD_QUEUE": job.queue.encode(),
            b"WORKERD_ATTEMPT": b"%d" % job.attempt,
            b"WORKERD_MAX_ATTEMPTS": b"%d" % limit(job, self._settings.retry),
            b"WORKERD_REPORT": report_file.PATH.encode(),
            b"WORKERD_REDELIVERED": b"1" if job.redelivered else b"0",
            b"WORKERD_CONTENT_TYPE": str(message.content_type or "").encode(),
            b"WORKERD_CONTENT_ENCODING": str(message.content_encoding or "").encode(),
        }
        if not message.headers:
            return environment
        room = HEADERS_LIMIT
        for name, value in message.headers.items():
            text = text_of(value)
            size = len(name) + len(text)
            if (
                isinstance(name, str)
                and b"\0" not in text
                and size <= min(HEADER_VALUE_LIMIT, room)
            ):
                room -= size
                variable = "WORKERD_HEADER_" + re.sub("[^A-Z0-9_]", "_", name.upper())
                environment[variable.encode()] = text
        parent = job.header("traceparent")
        if isinstance(parent, str) and "\0" not in parent and len(parent) <= HEADER_VALUE_LIMIT:
            environment[b"TRACEPARENT"] = parent.encode()
        return environment
