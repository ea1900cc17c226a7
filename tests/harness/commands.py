"""Running command handlers without a daemon and a broker: real children of the test's own process.

    ran = run(handler("echo", "{body}"), job(b"hello"))
    assert ran.report.output == b"hello\n"

Every run also checks that it left no descriptor and no child behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from types import MappingProxyType
from typing import Any, TypeVar

from tests.harness import processes
from tests.harness.trixie import CHECKOUT
from tests.harness.waiting import TIMEOUT, until
from workerd import log, log_formats
from workerd.config.model import Handler
from workerd.core.decode import decode
from workerd.core.job import BadJob, Job, Message, Outcome, Report
from workerd.handlers.command import CommandHandler
from workerd.handlers.guardian import Guardian

T = TypeVar("T")

#: Enough to find programs; nothing of whoever runs the tests.
ENVIRONMENT = {"PATH": "/usr/bin:/bin"}

#: A command that prints the arguments after its two dashes, each followed by a NUL.
SHOW_ARGUMENTS = ("sh", "-c", 'shift; printf "%s\\0" "$@"', "sh", "--")


class Unguarded(Guardian):
    """What the handler tells its guardian goes nowhere: a test that dies kills its own children."""

    def __init__(self) -> None:
        pass

    def spawning(self) -> dict[bytes, bytes]:
        return {}

    def not_spawned(self) -> None:
        pass

    def started(self, group: int) -> None:
        pass

    def ended(self, group: int) -> None:
        pass


@dataclass(frozen=True)
class Ran:
    """What came of a run: the report, and the events it logged, each with its name."""

    report: Report
    events: list[dict[str, Any]]

    def lines(self, stream: str = "stdout") -> list[str]:
        """The lines of output that were logged."""
        return [e["text"] for e in self.events if e["event"] == "output" and e["stream"] == stream]

    def omitted(self, stream: str = "stdout") -> int:
        """How many lines were counted instead of being logged."""
        return sum(
            event["lines"]
            for event in self.events
            if event["event"] == "output omitted" and event["stream"] == stream
        )


def handler(*command: str, **options: Any) -> Handler:
    return Handler("test", command=command, **options)


def job(body: bytes = b"", *, redelivered: bool = False, **properties: Any) -> Job:
    """The job in a message with this body and these properties; its id is "job-1"."""
    properties.setdefault("message_id", "job-1")
    return decode(Message(body=body, **properties), "work", redelivered)


def run(settings: Handler, job: Job, **options: Any) -> Ran:
    """Run one job to its end. The options are those of `prepared`."""
    return run_all(settings, [job], **options)[0]


def run_all(settings: Handler, jobs: Sequence[Job], **options: Any) -> list[Ran]:
    """Run jobs at once, to their ends."""

    async def all_of_them() -> list[Report]:
        command = prepared(settings, **options)
        never = asyncio.get_running_loop().create_future()
        return await asyncio.gather(*(run_one(command, job, never) for job in jobs))

    with logged() as events:
        reports = in_loop(all_of_them())
    return [Ran(report, events) for report in reports]


def arguments(*templates: str, job: Job, **options: Any) -> list[bytes]:
    """What a program is given for these arguments."""
    report = run(handler(*SHOW_ARGUMENTS, *templates, **options), job).report
    assert report.outcome is Outcome.DONE, report
    return report.output.split(b"\0")[:-1]


def refusal(*templates: str, job: Job, **options: Any) -> Report:
    """The report on a job that no program may be given."""
    report = run(handler("sh", "-c", "echo it ran", *templates, **options), job).report
    assert report.outcome is Outcome.REJECTED
    assert report.output == b"", "the program ran"
    return report


def environment(job: Job, environ: dict[str, str] = ENVIRONMENT, **options: Any) -> dict[str, str]:
    """The environment in which a job runs."""
    report = run(handler("env", "-0", **options), job, environ=environ).report
    assert report.outcome is Outcome.DONE, report
    lines = report.output.decode().split("\0")[:-1]
    return dict(line.split("=", 1) for line in lines)


async def run_one(command: CommandHandler, job: Job, stop: asyncio.Future[None]) -> Report:
    """Run a job as a worker does."""
    try:
        return await command.run(job, stop, lambda _details: None)
    except BadJob as bad:
        return Report(Outcome.REJECTED, bad.reason, error=str(bad), ran=False)


def in_loop(work: Coroutine[Any, Any, T]) -> T:
    """Do this in an event loop of its own, in which no callback may fail."""
    failures: list[dict[str, Any]] = []

    async def watched() -> T:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, failure: failures.append(failure))
        return await asyncio.wait_for(work, TIMEOUT)

    with leaving_nothing():
        result = asyncio.run(watched())
    assert not failures, failures
    return result


def prepared(
    settings: Handler, *, environ: Mapping[str, str] = ENVIRONMENT, output_lines: int = 1000
) -> CommandHandler:
    """A handler as the daemon makes it, for tests that run it themselves."""
    return CommandHandler(settings, environ, output_lines, unguarded)


@contextlib.contextmanager
def logged() -> Iterator[list[dict[str, Any]]]:
    """The events that are logged meanwhile."""
    events: list[dict[str, Any]] = []

    def keep(*records: log_formats.LogRecord) -> Sequence[log_formats.LogRecord]:
        for _when, level, name, fields in records:
            events.append({"event": name, "level": level, **fields})
        return ()

    write, log._log._write = log._log._write, keep
    try:
        yield events
    finally:
        log._log._write = write


@contextlib.contextmanager
def leaving_nothing() -> Iterator[None]:
    """Fail if what is done meanwhile leaves a descriptor or a process behind."""
    before = open_descriptors()
    try:
        yield
        left = open_descriptors() - before
        assert not left, f"descriptors left open: {left}"
        # What is killed with a job takes a moment to die.
        until(lambda: not processes.strays(), "no process left behind", TIMEOUT / 4)
    finally:
        processes.kill_trees(processes.strays())


def open_descriptors() -> set[str]:
    """The descriptors of this process."""
    listed = os.listdir("/proc/self/fd")
    # The listing had one of its own.
    return {fd for fd in listed if os.path.lexists(f"/proc/self/fd/{fd}")}


def alone(script: str, environ: Mapping[str, str] = MappingProxyType({})) -> str:
    """What a script prints that has a Python of its own, with this module's names in it."""
    lines = ["import os, resource, sys", "from tests.harness.commands import *", dedent(script)]
    result = subprocess.run(
        [sys.executable, "-"],
        input="\n".join(lines),
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), **environ},
        capture_output=True,
        encoding="utf-8",
        timeout=3 * TIMEOUT,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def as_nobody(script: str) -> str:
    """What a script prints that runs as a user who has no other process."""
    with tempfile.TemporaryDirectory() as folder:
        private = Path(folder, "private")
        private.mkdir()
        if os.geteuid() == 0:
            # Its processes are counted by user.
            user = 1_000_000 + os.getpid()
            for path in (folder, private):
                os.chown(path, user, user)
            script = f"os.setgroups([]); os.setgid({user}); os.setuid({user})\n{dedent(script)}"
        # What it has not imported by then may be out of its reach.
        said = alone(f"import tests.harness.pools\nos.chdir({folder!r})\n{dedent(script)}")
        private.chmod(0o700)
        return said


unguarded = Unguarded()
