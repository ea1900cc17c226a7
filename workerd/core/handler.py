"""What the worker and its handlers agree on: how a job is run, and who says what about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from workerd.config.model import Settings
from workerd.core.job import Job, Report

#: What a handler says of a job that it has begun, such as ``pid``; what it does not know is absent.
Details = Mapping[str, int | str]


class Interrupt(Protocol):
    """The wish to end a job early: done once there is one. An asyncio.Future is such a thing."""

    def done(self) -> bool: ...
    def add_done_callback(self, callback: Callable[[Any], object], /) -> object: ...
    def remove_done_callback(self, callback: Callable[[Any], object], /) -> object: ...


class Started(Protocol):
    """Called when a job has really begun, with what its handler says of that."""

    def __call__(self, facts: Details, /) -> None: ...


class MayBegin(Protocol):
    """Says whether a job may begin now, or ``behind`` one of this queue: once that has ended."""

    def __call__(self, behind: str | None = None, /) -> bool: ...


class Degraded(NamedTuple):
    """Why a handler runs no jobs (``paused``), or fewer at once than it should."""

    paused: bool
    error: str

    def __str__(self) -> str:
        # The last line of an error: a traceback's says most.
        summary = self.error.rpartition("\n")[2]
        return f"{'paused' if self.paused else 'short of processes'}: {summary}"


class Handler(Protocol):
    """What runs jobs of one type."""

    #: Whether each job begins as soon as it is run; otherwise it may have to wait.
    immediate: bool

    @property
    def capacity(self) -> int:
        """How many jobs the handler has room for, slots or not; 0: only for those with slots."""

    @property
    def degraded(self) -> Degraded | None:
        """What keeps the handler from running jobs as it should, None when nothing does."""

    async def run(
        self,
        job: Job,
        stop: Interrupt,
        started: Started,
        may_begin: MayBegin,
        /,
    ) -> Report:
        """Run the job; when ``stop`` is done, interrupt it.

        ``started`` is called when the job has really begun. Raises BadJob, before that, when the
        job never can. A handler that is not ``immediate`` begins only what ``may_begin``; see
        `Slots.may_begin`.
        """


class Registry(Protocol):
    """What makes the handlers of a configuration, and ends them."""

    @property
    def trouble(self) -> str:
        """What is wrong with what all handlers need; "" when nothing is."""

    def of(self, settings: Settings, changed: Callable[[str], None]) -> Mapping[str, Handler]:
        """The handlers of these settings, by name; those of earlier ones finish what they have.

        ``changed`` is called soon after one has become degraded, or is no longer, with its name.
        """

    def hand_out(self) -> None:
        """Jobs may begin that could not before."""

    def recall(self) -> None:
        """Jobs may not begin that could before."""

    def hold(self) -> None:
        """No job begins any more; those that wait for a process go on waiting."""

    def drain(self) -> None:
        """The jobs that wait for a process are interrupted; processes without a job leave."""

    async def close(self) -> None:
        """Wait until every process is gone, once no job runs any more."""
