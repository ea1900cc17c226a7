"""Running warm handlers without a daemon and a broker: real children of the test's own process.

    async with pool(python(tmp_path, "def f(job): return job.body")) as warm:
        report = await warm.do(job(b"hello"))

Every `in_loop` also checks that nothing is left behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping
from pathlib import Path
from textwrap import dedent
from typing import Any

from tests.harness import commands, processes
from tests.harness.commands import ENVIRONMENT, Ran, in_loop, job, unguarded
from tests.harness.waiting import TIMEOUT
from workerd import log, log_formats
from workerd.config.model import Handler
from workerd.core.job import Job, Report
from workerd.handlers.warm.child_process import ChildProcess
from workerd.handlers.warm.dispatch import Pace
from workerd.handlers.warm.pool import WarmHandler

__all__ = [
    "EVAL",
    "PID",
    "Warm",
    "begun",
    "do",
    "do_all",
    "filled",
    "in_loop",
    "job",
    "logged",
    "named",
    "outcome",
    "pool",
    "python",
    "sh",
    "until_deep",
    "until_logged",
]

#: What a test's handler in sh needs to take the line of a job apart.
PRELUDE = """
next() {
    IFS= read -r line <&3 || return 1
    frame=${line#'{"frame":'} frame=${frame%%,*} length=${line##*:} length=${length%\\}}
    body=$(head -c "$length" <&3)
}
answer() { printf '{"frame":%d,"outcome":"done","length":%d}\\n%s' "$frame" "${#1}" "$1" >&4; }
ready() { echo '{"ready":1}' >&4; }
"""

#: Answers with its process id; a body that is a path is waited for first.
PID = """
import os, time
def f(job):
    print("runs", flush=True)
    while job.body and not os.path.exists(job.body):
        time.sleep(0.005)
    return os.getpid()
"""

#: Does what its body says.
EVAL = "import ctypes, os, signal, sys, time\ndef f(job): return eval(job.body)"


def python(folder: Path, code: str, function: str = "f", **options: Any) -> Handler:
    """A handler with this code in the module `app` of a folder."""
    (folder / "app.py").write_text(dedent(code))
    options.setdefault("interpreter", Path(sys.executable))
    options.setdefault("working_directory", folder)
    return Handler("test", python=f"app:{function}", **options)


def sh(script: str, **options: Any) -> Handler:
    """A stream handler in sh; its script has the functions of PRELUDE."""
    return Handler("test", stream=("sh", "-c", PRELUDE + dedent(script)), **options)


class Warm(WarmHandler):
    """A pool with what tests ask of it."""

    @property
    def children(self) -> list[ChildProcess]:
        """The processes that do not leave."""
        return self._dispatch.processes

    @property
    def pace(self) -> Pace:
        return self._dispatch.pace

    async def do(self, each: Job, stop: asyncio.Future[None] | None = None) -> Report:
        """Run a job; its events have its id, and one is called "begun"."""
        never = asyncio.get_running_loop().create_future()
        with log.job_fields(job_id=each.id):
            return await self.run(each, stop or never, lambda _details: log.event("begun"))

    def soon(self, each: Job, stop: asyncio.Future[None] | None = None) -> asyncio.Task[Report]:
        return asyncio.ensure_future(self.do(each, stop))

    async def await_ready(self, count: int = 1) -> list[int]:
        """Wait until so many processes are ready; returns their ids."""
        while sum(child.is_ready for child in self.children) < count:
            await asyncio.sleep(0.01)
        return [child.pid for child in self.children]


@contextlib.contextmanager
def logged() -> Iterator[list[dict[str, Any]]]:
    """The events that are logged meanwhile, however unimportant."""
    threshold, log._log.threshold = log._log.threshold, log_formats.LEVELS["debug"]
    try:
        with commands.logged() as events:
            yield events
    finally:
        log._log.threshold = threshold


@contextlib.asynccontextmanager
async def pool(
    settings: Handler,
    *,
    environ: Mapping[str, str] = ENVIRONMENT,
    output_lines: int = 1000,
    level: log_formats.Level = "debug",
    depth: int = 1,
) -> AsyncIterator[Warm]:
    warm = Warm(settings, environ, output_lines, unguarded, level, depth)
    try:
        yield warm
    finally:
        try:
            await asyncio.wait_for(warm.close(), TIMEOUT / 2)
        finally:
            processes.kill_trees([child.pid for child in (*warm.children, *warm._leaving)])


def do_all(settings: Handler, *jobs: Job, **options: Any) -> Ran:
    """Do jobs one after another; the report is the last one's."""

    async def one_by_one() -> Report:
        async with pool(settings, **options) as warm:
            for each in jobs:
                report = await warm.do(each)
            return report

    with logged() as events:
        report = in_loop(one_by_one())
    return Ran(report, events)


def do(settings: Handler, each: Job, **options: Any) -> Report:
    return do_all(settings, each, **options).report


def outcome(work: Coroutine[Any, Any, Any]) -> tuple[Any, list[dict[str, Any]]]:
    """What an asynchronous test returns, and the events that were logged meanwhile."""
    with logged() as events:
        result = in_loop(work)
    return result, events


def named(name: str, body: bytes = b"") -> Job:
    """A job with this id."""
    return job(body, message_id=name)


async def until_logged(events: list[dict[str, Any]], event: str, **fields: object) -> None:
    """Wait until this was logged."""
    while not any(e["event"] == event and fields.items() <= e.items() for e in events):
        await asyncio.sleep(0.005)


def begun(events: list[dict[str, Any]]) -> list[str]:
    """The jobs that have begun, in order."""
    return [event["job_id"] for event in events if event["event"] == "begun"]


async def until_deep(warm: Warm) -> None:
    """Run short jobs until some may lie in a pipe; on a busy machine one may take long."""
    while warm.pace.depth < min(warm.pace.most, 8):
        await warm.do(job(b"0"))


async def filled(
    warm: Warm, events: list[dict[str, Any]], gate: Path, *stops: asyncio.Future[None]
) -> list[asyncio.Task[Report]]:
    """A job that waits, and four in the pipe behind it; with these stops, in this order."""
    await until_deep(warm)
    wait = f"[time.sleep(0.005) for _ in iter(lambda: os.path.exists({str(gate)!r}), True)]"
    tasks = [warm.soon(named("first", wait.encode()))]
    for number in range(4):
        stop = stops[number] if number < len(stops) else None
        tasks.append(warm.soon(named(str(number), b"str(os.getpid())"), stop))
    await until_logged(events, "begun", job_id="first")
    [works] = [child for child in warm.children if child.assignments]
    assert len(works.assignments) == 5
    return tasks
