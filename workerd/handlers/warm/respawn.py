"""When a warm handler may start another process: not at once after one that did not come up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from workerd import log
from workerd.backoff import backoff
from workerd.core.handler import Degraded
from workerd.core.job import Outcome, Report

#: Seconds without an attempt to start a process after one that failed: at first, and at most.
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
#: Seconds after which one that was ready has not ended at once.
TRIAL = 1.0


class Child(Protocol):
    """A process of the handler's."""

    @property
    def pid(self) -> int:
        """Its number."""

    @property
    def is_ready(self) -> bool:
        """Whether it takes jobs."""


class Respawner:
    """What has become of the attempts of one handler to start processes.

    ``try_again`` is called when a pause is over, ``changed`` when the trouble has begun, has
    another reason, or is over.
    """

    def __init__(
        self, handler: str, try_again: Callable[[], object], changed: Callable[[], object]
    ) -> None:
        #: Why a process did not come up; None once one that came up later works.
        self.trouble: Report | None = None
        self._handler = handler
        self._try_again = try_again
        self._changed = changed
        #: The processes that were ready before the trouble: what they do proves nothing.
        self._veterans: set[Child] = set()
        self._pauses: Iterator[float] = iter(())
        self._pause: asyncio.TimerHandle | None = None

    @property
    def paused(self) -> bool:
        """Whether no process is to be started: one has just failed."""
        return self._pause is not None

    def degraded(self, children: Iterable[Child]) -> Degraded | None:
        """See `core.handler.Handler`; ``children`` are the processes that there are."""
        if self.trouble is None:
            return None
        return Degraded(not any(child.is_ready for child in children), self.trouble.error)

    def failed(self, reason: str, text: str, children: Iterable[Child]) -> None:
        """A process could not be started, or did not come up; ``children`` are the others."""
        if self.trouble is None:
            self._pauses = backoff(FIRST_PAUSE, LONGEST_PAUSE)
        pause = next(self._pauses)
        if self.trouble is None or self.trouble.error != text:
            log.error("child failed", reason=reason, error=text[-2000:])
        self.trouble = Report(Outcome.UNAVAILABLE, reason, error=text)
        self._veterans = {child for child in children if child.is_ready}
        self.end_pause()
        self._pause = asyncio.get_running_loop().call_later(pause, self._pause_is_over)
        self._changed()

    def ready(self, child: Child) -> None:
        """A process has come up. Whether it stays will be seen."""
        self.end_pause()
        if self.trouble:
            asyncio.get_running_loop().call_later(TRIAL, self._stays, child)

    def works(self, child: Child) -> None:
        """A process has done a job, or could. One that came up after the trouble began ends it."""
        if self.trouble is not None and child not in self._veterans:
            self.trouble = None
            self._veterans.clear()
            self.end_pause()
            log.event("child recovered", handler=self._handler, child=child.pid)
            self._changed()

    def end_pause(self) -> None:
        """Let the next process be started now."""
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None

    def _pause_is_over(self) -> None:
        self._pause = None
        self._try_again()

    def _stays(self, child: Child) -> None:
        if child.is_ready:
            self.works(child)
