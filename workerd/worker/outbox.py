"""Copies of jobs that the broker must take before their originals are acknowledged."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from workerd import log
from workerd.aio import first
from workerd.backoff import backoff
from workerd.core import topology
from workerd.core.job import Job, Message, Report, Run
from workerd.core.republish import Origin, dead_letter, next_attempt
from workerd.errors import BrokerError, ErrorKind, Unencodable, Unroutable
from workerd.ids import new_id
from workerd.worker.publisher import Publisher

if TYPE_CHECKING:
    from workerd.worker.worker import Worker

#: Seconds for the broker to confirm a copy that is under way when running jobs must end.
LAST_CONFIRM = 1.0
#: Seconds that a copy may take which is published instead of a return.
RENEWAL_TIMEOUT = 5.0


class Outbox:
    """Publishes each copy until it is confirmed, on a connection of its own.

    Until then the original stays unacknowledged. While the broker refuses a copy, its queue is
    paused: what comes next would need a copy as well, or could not be told from it.
    """

    def __init__(self, worker: Worker, origin: Origin) -> None:
        self.publisher = Publisher()
        #: The runs whose copies the broker does not take, and its words.
        self.refused: dict[Run, str] = {}
        self._worker = worker
        self._origin = origin

    async def retry(self, run: Run, seconds: float, report: Report) -> bool:
        """Let the job have its next attempt, after a delay; False: a drain came first."""
        copy = next_attempt(run.job, run.job.attempt, new_id(), time.time())
        if await self._delay(run, copy, seconds, "retry refused"):
            log.event(
                "retry", seconds=round(seconds), reason=report.reason, note=report.note or None
            )
            return True
        return False

    async def postpone(self, run: Run, seconds: float) -> bool:
        """Let the same attempt of the job begin later; False: a drain came first."""
        copy = next_attempt(run.job, run.job.attempt - 1, new_id(), None)
        if await self._delay(run, copy, seconds, "postponement refused"):
            log.event("postponed", self._worker.settings.log.routine, seconds=round(seconds))
            return True
        return False

    async def bury(self, run: Run, report: Report) -> bool:
        """Bring the job to the dead letters; False: a drain came first."""
        copy = dead_letter(run.job, report, self._origin, time.time())
        queue = topology.dead(run.job.queue)
        if await self._deliver(run, "", queue, copy, "dead letter refused"):
            log.warning("dead letter", reason=report.reason, note=report.note or None, to=queue)
            return True
        return False

    async def renew(self, job: Job) -> bool:
        """Publish the job once more, instead of returning it; False: not in time."""
        message, _ = next_attempt(job, job.attempt - 1, new_id(), None)
        publishing = self.publisher.publish("", job.queue, message)
        try:
            await asyncio.wait_for(publishing, RENEWAL_TIMEOUT)
        except (TimeoutError, BrokerError, Unencodable):
            return False
        return True

    async def _delay(
        self, run: Run, copy: tuple[Message, list[str]], seconds: float, refused: str
    ) -> bool:
        # A daemon that has just begun to consume may still be declaring them.
        levels = self._worker.consumer.declarations.levels
        await first(levels.wait(), self._worker.drain.interrupted())
        whole = min(round(seconds), topology.MAX_DELAY)
        return await self._deliver(run, *topology.delayed(run.job.queue, whole), copy, refused)

    async def _publish(self, run: Run, exchange: str, key: str, message: Message) -> None:
        """Publish once. Raises BrokerError, Unencodable."""
        due = topology.due(run.job.queue)
        # The broker would take it, and notice only when it comes due.
        if exchange and due in self._worker.consumer.missing:
            raise Unroutable(due)
        await self.publisher.publish(exchange, key, message)

    async def _deliver(
        self, run: Run, exchange: str, key: str, copy: tuple[Message, list[str]], refused: str
    ) -> bool:
        """Publish until the broker has confirmed it; False: running jobs must end before."""
        message, dropped = copy
        if dropped:
            log.warning("headers dropped", names=", ".join(dropped))
        drain = self._worker.drain
        known = ""
        try:
            for delay in backoff(0.5, self._worker.settings.broker.reconnect_max):
                publishing = asyncio.ensure_future(self._publish(run, exchange, key, message))
                await first(asyncio.wait({publishing}), drain.interrupted())
                if not publishing.done():
                    # Without the answer the original goes back as well, and both run.
                    await asyncio.wait({publishing}, timeout=LAST_CONFIRM)
                if not publishing.done():
                    publishing.cancel()
                    return False
                try:
                    publishing.result()
                except (BrokerError, Unencodable) as trouble:
                    if str(trouble) != known:
                        known = str(trouble)
                        log.warning(refused, text=known)
                    # One that is away is told already, and one message that cannot be sent
                    # is no reason to hold up others.
                    if isinstance(trouble, BrokerError) and trouble.kind is not ErrorKind.AWAY:
                        self.refused[run] = known
                        self._worker.pause_queues()
                else:
                    return True
                if await drain.interrupts_within(delay):
                    return False
            raise AssertionError("backoff never ends")
        finally:
            if self.refused.pop(run, ""):
                self._worker.pause_queues()
