"""Command handlers: one process for each job, never through a shell."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
from collections.abc import Mapping

from workerd import log
from workerd.handlers import wishes
from workerd.handlers.guardian import Guardian
from workerd.handlers.output import ERROR_LIMIT, Output
from workerd.handlers.process import Process
from workerd.handlers.program import Program
from workerd.handlers.readiness import Readiness
from workerd.handlers.reports import ending
from workerd.handling import Started
from workerd.job import BadJob, Job, Outcome, Report
from workerd.retry import limit
from workerd.settings import Handler
from workerd.template import Placeholder, Template

_HEADER_VALUE_LIMIT = 4096
_HEADERS_LIMIT = 32 * 1024


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
        self._readiness = Readiness()
        self._templates = [Template.parse(argument) for argument in settings.command]
        self._output_lines = output_lines
        self._program = Program(settings.command[0], settings, environ)

    async def run(
        self,
        job: Job,
        stop: asyncio.Future[None],
        started: Started,
        _may_begin: object = None,
    ) -> Report:
        """Run the job in a process of its own until that ends, times out, or ``stop`` is done.

        Raises BadJob when there can be no such process.
        """
        try:
            report = wishes.create()
        except OSError as error:
            return self._spawn_failed(error)
        try:
            return await self._run(job, stop, started, report)
        finally:
            os.close(report)

    async def _run(
        self, job: Job, stop: asyncio.Future[None], started: Started, report: int
    ) -> Report:
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
                readiness=self._readiness,
            )
        except ValueError:
            raise BadJob("bad-argument", "an argument contains a NUL byte") from None
        except OSError as error:
            return self._spawn_failed(error)
        started(process.pid)

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
        wished = wishes.read(report)
        outcome, reason = self._judge(status, process.cause)
        exit_status, signal = ending(status)
        return Report(
            outcome,
            reason,
            exit_status=exit_status,
            signal=signal,
            error=log.text_lines(stderr.tail) if outcome is not Outcome.DONE else "",
            output=stdout.tail,
            retry_after=wished.retry_after,
            note=wished.note,
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
        values = _Values(job)
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
            b"WORKERD_REPORT": wishes.PATH.encode(),
            b"WORKERD_REDELIVERED": b"1" if job.redelivered else b"0",
            b"WORKERD_CONTENT_TYPE": str(message.content_type or "").encode(),
            b"WORKERD_CONTENT_ENCODING": str(message.content_encoding or "").encode(),
        }
        if not message.headers:
            return environment
        room = _HEADERS_LIMIT
        for name, value in message.headers.items():
            text = _text_of(value)
            size = len(name) + len(text)
            if (
                isinstance(name, str)
                and b"\0" not in text
                and size <= min(_HEADER_VALUE_LIMIT, room)
            ):
                room -= size
                variable = "WORKERD_HEADER_" + re.sub("[^A-Z0-9_]", "_", name.upper())
                environment[variable.encode()] = text
        parent = job.header("traceparent")
        if isinstance(parent, str) and "\0" not in parent and len(parent) <= _HEADER_VALUE_LIMIT:
            environment[b"TRACEPARENT"] = parent.encode()
        return environment


def _text_of(value: object) -> bytes:
    """A value as programs get it: text and bytes as they are, anything else as JSON."""
    if isinstance(value, bytes):
        return value
    # A name in a header's table that is not UTF-8 is bytes, which JSON cannot have.
    text = value if isinstance(value, str) else json.dumps(value, default=str, skipkeys=True)
    return text.encode()


class _Values:
    """The values of placeholders for one job; its body is parsed as JSON at most once."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._object: dict[str, object] | None = None

    def of(self, placeholder: Placeholder) -> bytes:
        job = self._job
        match placeholder.kind:
            case "body":
                return job.body
            case "body.key":
                return _found(self._json(), placeholder.name, "bad-body", "the body has no key")
            case "header":
                headers = job.message.headers
                return _found(headers, placeholder.name, "bad-header", "there is no header")
            case "id":
                return job.id.encode()
            case "type":
                return (job.type or "").encode()
            case "queue":
                return job.queue.encode()
            case "attempt":
                return str(job.attempt).encode()

    def _json(self) -> dict[str, object]:
        if self._object is None:
            try:
                value = json.loads(self._job.body)
            except (ValueError, RecursionError) as error:
                raise BadJob("bad-body", f"the body is not JSON: {error}") from None
            if not isinstance(value, dict):
                raise BadJob("bad-body", "the body is not a JSON object")
            self._object = value
        return self._object


def _found(values: Mapping[str, object], name: str, reason: str, missing: str) -> bytes:
    if name not in values:
        raise BadJob(reason, f"{missing} {name!r}")
    try:
        return _text_of(values[name])
    except UnicodeEncodeError:
        raise BadJob(reason, f"the value of {name!r} is half a surrogate pair") from None
