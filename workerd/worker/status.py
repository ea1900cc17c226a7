"""What systemd is told: the status line. And what goes to the log for SIGUSR1."""

from __future__ import annotations

import asyncio
from typing import Protocol

from workerd import log
from workerd.core.job import Run
from workerd.worker.consumer import Consumer
from workerd.worker.inspect import Inspector

#: Seconds between two renewals of the status line, at the least.
INTERVAL = 1.0
#: What an orderly end may take after the drain's deadline: the last jobs' grace, the closing.
REST_OF_DRAIN = 60.0


class Notifier(Protocol):
    """Who is told how the daemon is doing: systemd."""

    def ready(self) -> None: ...
    def status(self, text: str) -> None: ...
    def stopping(self) -> None: ...
    def extend(self, seconds: float) -> None: ...
    async def beat(self) -> None:
        """Feed the watchdog, for as long as the loop that runs this makes progress."""


class Status:
    """The status line: renewed when something has changed, at most once a second."""

    def __init__(self, inspector: Inspector, notifier: Notifier) -> None:
        self._inspector = inspector
        self._notifier = notifier
        self._timer: asyncio.TimerHandle | None = None

    def touch(self) -> None:
        """Something changed."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(INTERVAL, self.show)

    def show(self) -> None:
        """Renew the line now; in a drain, ask for more time as well."""
        if self._timer:
            self._timer.cancel()
        self._timer = None
        self._notifier.status(self._inspector.line())
        drain_left = self._inspector.drain_left
        if drain_left is not None:
            self._notifier.extend(drain_left + REST_OF_DRAIN)
            self.touch()

    def log_state(self) -> None:
        """Everything that is in hand, into the log."""
        inspector = self._inspector
        log.event("state", status=inspector.line(), remembered=inspector.remembered)
        for queue in inspector.consumed:
            log.event("state queue", **inspector.in_hand(queue), paused=inspector.paused(queue))
        for run in inspector.state_of_runs():
            log.event("state job", **run)


async def watch_ages(inspector: Inspector, consumer: Consumer) -> None:
    """Warn before the broker takes a job back, at half and at 4/5 of its patience."""
    warned: dict[Run, float] = {}
    while True:
        # Often enough for a shorter limit, which the broker may tell any moment.
        await asyncio.sleep(min(INTERVAL, consumer.ack_timeout / 20))
        limit = consumer.ack_timeout
        ages = dict(inspector.unsettled())
        warned = {run: part for run, part in warned.items() if run in ages}
        for run, age in ages.items():
            part = 0.8 if age > 0.8 * limit else 0.5 if age > 0.5 * limit else 0.0
            if part > warned.get(run, 0.0):
                warned[run] = part
                log.warning(
                    "ack timeout near",
                    job_id=run.job.id,
                    queue=run.job.queue,
                    seconds=round(age),
                    ack_timeout=round(limit),
                    remedy="raise RabbitMQ's consumer_timeout above the longest job",
                )
