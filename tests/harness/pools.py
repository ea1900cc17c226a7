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

__all__ = ["Warm", "do", "do_all", "in_loop", "job", "logged", "pool", "python", "sh"]

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
